"""A flat HoVLE is its stock decoder: one call on embeddings of words and images gives what its two sections give."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from tiny_models import IMAGE, TEXT, shake
from torch import nn
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hovle import HoVLEConfig, HoVLEForConditionalGeneration
from hovle.model.decoder import STOCK_FAMILIES

WINDOW = {"sliding_window": 4}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES = {
    "cohere2": {**MIXED, "logit_scale": 0.5},
    "gemma": {"head_dim": 8},
    "gemma2": {**MIXED, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**MIXED, "head_dim": 8},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "internlm3": {"head_dim": 8},
    "llama": {},
    "mistral": WINDOW,
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None},
    "olmo": {},
    "olmo2": {},
    "olmo3": MIXED,
    "phi": {"partial_rotary_factor": 0.5, "embd_pdrop": 0.1},
    "phi3": WINDOW,
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {"head_dim": 8},
    "smollm3": {"no_rope_layer_interval": 2},
    "starcoder2": {"sliding_window": None, "embedding_dropout": 0.1},
}


def build(family: str = "llama", text: dict | None = None, **fields) -> HoVLEForConditionalGeneration:
    """2 holistic and 2 language layers; a tile of 56 px is 4 tokens."""
    torch.manual_seed(0)
    text_config = CONFIG_MAPPING[family](
        **{**TEXT, "num_hidden_layers": 4, **FAMILIES.get(family, {}), **(text or {})}
    )
    defaults = {"num_embedding_layers": 2, "image_size": 56, "image_token_id": IMAGE}
    return shake(HoVLEForConditionalGeneration(HoVLEConfig(text_config=text_config, **{**defaults, **fields}))).eval()


@contextlib.contextmanager
def counted(model: HoVLEForConditionalGeneration) -> Iterator[dict[str, int]]:
    """Calls of the decoder and of each of its layers."""
    decoder = model.model.language_model
    parts = {"decoder": decoder} | {str(index): layer for index, layer in enumerate(decoder.layers)}
    calls = dict.fromkeys(parts, 0)

    def note(name: str) -> Callable:
        def hook(*_) -> None:
            calls[name] += 1

        return hook

    hooks = [part.register_forward_hook(note(name)) for name, part in parts.items()]
    yield calls
    for hook in hooks:
        hook.remove()


@contextlib.contextmanager
def in_sections(model: HoVLEForConditionalGeneration) -> Iterator[None]:
    """Let a model run as those do that have two ropes."""
    model.model.has_one_rope = False
    yield
    model.model.has_one_rope = True


def pixels(num_tiles: int) -> torch.Tensor:
    return torch.randn(num_tiles, 3, 56, 56, generator=torch.Generator().manual_seed(num_tiles))


PICTURE = [IMAGE] * 4
PADDED = {
    "input_ids": torch.tensor([[5, *PICTURE, 6, *PICTURE, 7], [0, 0, 0, 0, 8, 9, *PICTURE, 10]]),
    "attention_mask": torch.tensor([[1] * 11, [0] * 4 + [1] * 7]),
    "pixel_values": pixels(3),
}
PACKED = {
    "input_ids": torch.tensor([[5, *PICTURE, 6, 7, *PICTURE, 8, 9]]),
    "position_ids": torch.tensor([[*range(6), *range(7)]]),
    "pixel_values": pixels(2),
}
SEEN_BOTH_WAYS = torch.ones(1, 1, 13, 13, dtype=torch.bool).tril() | (torch.arange(13) < 6)
INPUTS = {
    "words": {"input_ids": torch.arange(5, 17)[None]},
    "embeddings": {"inputs_embeds": torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))},
    "padded": PADDED,
    "packed": PACKED,
    "packed, no cache": {**PACKED, "use_cache": False},
    "restarting positions in one document": {**PACKED, "attention_mask": torch.ones(1, 13), "use_cache": False},
    "a mask of one's own": {**PACKED, "position_ids": None, "attention_mask": SEEN_BOTH_WAYS},
}


def assert_same(found, expected) -> None:
    """Bit by bit, whatever there is."""
    assert found.keys() == expected.keys()
    assert torch.equal(found.logits, expected.logits)
    for name in ("hidden_states", "attentions"):
        assert len(found.get(name) or ()) == len(expected.get(name) or ())
        assert all(map(torch.equal, found.get(name) or (), expected.get(name) or ()))
    if "image_hidden_states" in expected:
        assert torch.equal(found.image_hidden_states, expected.image_hidden_states)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(STOCK_FAMILIES & set(CONFIG_MAPPING)))
def test_one_call_gives_what_the_sections_give(family, attention):
    model = build(family)
    if attention == "eager" or family != "gemma2":  # which knows eager only
        model.set_attn_implementation(attention)
    own_mask = "a mask of one's own"
    for name, inputs in INPUTS.items():
        if name == own_mask and "sliding_attention" in model.model.attention_types:
            continue  # refused, as `test_attention_that_would_ignore_a_mask_is_refused` holds
        wanted = {"output_hidden_states": True, "output_attentions": attention == "eager"}
        with torch.no_grad(), counted(model) as calls:
            found = model(**inputs, **wanted)
            assert calls == {"decoder": 1, "0": 1, "1": 1, "2": 1, "3": 1}, name
            with in_sections(model):
                expected = model(**inputs, **wanted)
            assert calls["decoder"] == 1
        assert_same(found, expected)
        assert len(found.hidden_states) == 5


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite", "mistral"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_one_call_generates_what_the_sections_generate(family, cache):
    model = build(family)
    kwargs = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if cache == "static":
        kwargs |= {"cache_implementation": "static", "disable_compile": True}
    with counted(model) as calls:
        found = model.generate(**PADDED, **kwargs)
        assert set(calls.values()) == {5}
    with in_sections(model):
        expected = model.generate(**PADDED, **kwargs)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(map(torch.equal, found.logits, expected.logits))


@pytest.mark.parametrize("make_cache", [lambda c: DynamicCache(config=c), lambda c: StaticCache(c, max_cache_len=20)])
def test_one_call_continues_a_cache_as_the_sections_do(make_cache):
    model, outputs = build(), []
    for way in (contextlib.nullcontext(), in_sections(model)):
        cache = make_cache(model.config.text_config)
        with torch.no_grad(), way:
            first = model(**PADDED, cache=cache)
            mask = nn.functional.pad(PADDED["attention_mask"], (0, 2), value=1)
            second = model(torch.tensor([[11, 12], [13, 14]]), attention_mask=mask, cache=cache)
        outputs.append((first, second))
    for found, expected in zip(*outputs, strict=True):
        assert_same(found, expected)


NOT_FLAT = {
    "hd": {"pixel_shuffle_loc": "post"},
    "bidirectional": {"image_attention": "bidirectional"},
    "normalised": {"normalize_encoder_output": True},
    "another rope": {"embedding_rope_parameters": {"rope_theta": 7.0}},
    "a family nobody compared": {"family": "stablelm"},
}


@pytest.mark.parametrize("kind", NOT_FLAT)
def test_what_happens_between_the_sections_is_not_left_out(kind):
    model = build(**NOT_FLAT[kind])
    with torch.no_grad(), counted(model) as calls:
        model(PADDED["input_ids"], PADDED["pixel_values"], PADDED["attention_mask"])
    assert calls == {"decoder": 0, "0": 1, "1": 1, "2": 1, "3": 1}


def test_the_same_rope_said_twice_is_one_rope():
    model = build(embedding_rope_parameters={"rope_theta": LlamaConfig().rope_parameters["rope_theta"]})
    with torch.no_grad(), counted(model) as calls:
        model(**PADDED)
    assert calls["decoder"] == 1


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_decoder_alone_compiles_as_one_graph_on_merged_embeddings(family, whole_graph):
    model = build(family)
    decoder = model.model.language_model
    torch._dynamo.reset()
    with torch.no_grad(), whole_graph:
        expected = model(**PADDED, use_cache=False).logits
        embeds = model.get_input_embeddings()(PADDED["input_ids"])
        features = model.get_image_features(PADDED["pixel_values"]).pooler_output
        embeds[PADDED["input_ids"] == IMAGE] = features.flatten(0, 1)
        graph = torch.compile(decoder, fullgraph=True, backend="aot_eager")
        mask = PADDED["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        states = graph(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
        found = model.compute_logits(states.last_hidden_state)
        # Measured: equal to the bit, on logits of size 3.
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama", "phi", "starcoder2"])
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_one_call_trains_as_the_sections_do(family, checkpointing):
    """Without checkpoints, with re-entrant and other ones; what the images became carries its gradient."""
    model = build(family).train()
    if checkpointing is not None:
        # transformers 5.23 renamed it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": checkpointing})
    for loss_of in (lambda outputs: outputs.loss, lambda outputs: outputs.image_hidden_states.square().mean()):
        gradients = []
        for way in (contextlib.nullcontext(), in_sections(model)):
            model.zero_grad()
            torch.manual_seed(0)
            with way, counted(model) as calls:
                loss_of(model(**PACKED, labels=PACKED["input_ids"])).backward()
            assert calls["decoder"] == (not gradients)
            gradients.append({name: part.grad for name, part in model.named_parameters() if part.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        assert "model.patch_embedding.projection.weight" in gradients[0]
        assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())


def test_layers_compiled_one_by_one_keep_their_graph_and_give_the_images():
    model = build()
    with torch.no_grad():
        expected = model(**PADDED)
        for layer in model.model.language_model.layers:
            layer.compile(backend="eager")
        with counted(model) as calls:
            found = model(**PADDED)
    assert calls["decoder"] == 0
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.image_hidden_states, expected.image_hidden_states, atol=1e-5, rtol=0)


def test_a_pass_leaves_no_hook_behind():
    model = build()
    layers = model.model.language_model.layers
    with torch.no_grad():
        model(**PADDED)
        with pytest.raises(RuntimeError):
            model(**{**PADDED, "position_ids": torch.zeros(2, 3, dtype=torch.long)})
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers)
