"""What transformers asks of every model it ships, adapted to HoVLE: loading, resizing, outputs, training, generation.

Each check runs over the table `KINDS`. Checks that `test_modeling_hovle.py` and `test_generation.py` make are not
repeated here.
"""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache

from hovle import HoVLEConfig, HoVLEForConditionalGeneration, HoVLEModel
from hovle.model.backbones import CACHE

KINDS: dict[str, dict] = {
    "pre": {},
    "hd": {"pixel_shuffle_loc": "post"},
    "plain": {"pixel_shuffle_loc": "none", "patch_size": 28},
    "tied": {"text_config": {"tie_word_embeddings": True}},
    "bidirectional": {"image_attention": "bidirectional"},
    "qwen2": {"model_type": "qwen2"},  # biases in its attention
    "head_bias": {"language_head_bias": True},
}
PLACEHOLDER = 402
"""As in `tiny_config`; a tile is 4 of them."""


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def config_of(tiny_config) -> Callable[[str], HoVLEConfig]:
    def build(kind: str) -> HoVLEConfig:
        fields = dict(KINDS[kind])
        model_type = fields.pop("model_type", "llama")
        config = tiny_config(**fields)
        text = {**config.text_config.to_dict(), "model_type": model_type}
        return HoVLEConfig(**{**config.to_dict(), "text_config": text})

    return build


@pytest.fixture(scope="module")
def model_of(config_of) -> Callable[[str], HoVLEForConditionalGeneration]:
    """`model_of(kind)`: one model of each kind, which tests only read."""

    @functools.cache
    def build(kind: str) -> HoVLEForConditionalGeneration:
        torch.manual_seed(0)
        return HoVLEForConditionalGeneration(config_of(kind)).eval()

    return build


@pytest.fixture
def model(kind, model_of) -> HoVLEForConditionalGeneration:
    return model_of(kind)


@pytest.fixture
def own_model(model) -> HoVLEForConditionalGeneration:
    """A copy that a test may change."""
    return copy.deepcopy(model)


def row(*parts: int | str) -> list[int]:
    """Token ids; "tile" stands for the placeholders of one tile."""
    return [token for part in parts for token in ([PLACEHOLDER] * 4 if part == "tile" else [part])]


def batch() -> dict[str, torch.Tensor]:
    """Two prompts, of one tile and of two, padded on the left."""
    rows = [row(5, "tile", 6, 7), row(8, "tile", "tile", 9, 10, 11)]
    length = max(map(len, rows))
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": torch.tensor([[0] * (length - len(ids)) + ids for ids in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows]),
        "pixel_values": pixels,
    }


def logits_of(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**(inputs or batch())).logits


# --- loading ---------------------------------------------------------------------------------------------------------


def test_weights_that_no_file_holds_start_like_those_of_a_new_model(model, config_of, kind):
    """Loading from nothing must not leave memory as it was found."""
    loaded = HoVLEForConditionalGeneration.from_pretrained(None, config=config_of(kind), state_dict={})
    for name, weights in [*model.named_parameters(), *loaded.named_parameters()]:
        if "norm" in name:
            assert (weights == 1).all(), name
        elif name.endswith("bias"):
            assert (weights == 0).all(), name
        else:
            torch.testing.assert_close(weights.mean(), torch.tensor(0.0), atol=0.003, rtol=0, msg=name)
            torch.testing.assert_close(weights.std(), torch.tensor(0.02), atol=0, rtol=0.1, msg=name)
    for (name, found), (_, buffer) in zip(loaded.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(found, buffer), name


def edit_weights(folder: Path, drop: list[str], add: dict[str, torch.Tensor] | None = None) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in drop:
        del weights[name]
    save_file({**weights, **(add or {})}, folder / "model.safetensors", metadata={"format": "pt"})


def test_loading_says_which_weights_were_missing_and_which_unknown(model, tmp_path):
    model.save_pretrained(tmp_path)
    missing = ["model.patch_embedding.position_embedding", "model.language_model.layers.1.mlp.up_proj.weight"]
    edit_weights(tmp_path, missing, {"model.nonsense": torch.zeros(2)})
    loaded, info = HoVLEForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set(missing)
    assert info["unexpected_keys"] == {"model.nonsense"}
    for name, weights in loaded.state_dict().items():
        assert torch.equal(weights, model.state_dict()[name]) == (name not in missing), name


@pytest.mark.parametrize("load", [HoVLEForConditionalGeneration, HoVLEModel, AutoModelForImageTextToText, AutoModel])
def test_a_folder_with_missing_weights_is_refused(model, load, tmp_path):
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, ["model.language_model.layers.1.mlp.up_proj.weight"])
    gone = "language_model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=rf"{tmp_path} lacks 1 weights, among them (model\.)?{gone}; random ones"):
        load.from_pretrained(tmp_path)


def save_llama(folder: Path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).save_pretrained(folder)


@pytest.mark.parametrize("load", [HoVLEForConditionalGeneration, HoVLEModel, HoVLEConfig])
def test_a_folder_of_another_model_type_is_refused_with_the_way_to_build_one(load, tmp_path):
    save_llama(tmp_path)
    with pytest.raises(ValueError, match=r"holds a model of type 'llama', not 'hovle'.*from_language_model"):
        load.from_pretrained(tmp_path)


def test_weights_of_another_size_are_refused_or_on_request_started_anew(model, config_of, kind, tmp_path):
    model.save_pretrained(tmp_path)
    config = config_of(kind)
    config.text_config.vocab_size += 8
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        HoVLEForConditionalGeneration.from_pretrained(tmp_path, config=config)
    loaded, info = HoVLEForConditionalGeneration.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    changed = {name for name, *_ in info["mismatched_keys"]}
    assert "model.language_model.embed_tokens.weight" in changed
    for name, weights in loaded.state_dict().items():
        if name not in changed | {"lm_head.weight"}:
            assert torch.equal(weights, model.state_dict()[name]), name
    assert loaded.eval()(**batch()).logits.shape[-1] == config.text_config.vocab_size


def test_the_bare_model_and_the_whole_one_load_each_others_folders(model, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    bare, info = HoVLEModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"]
    bare.save_pretrained(tmp_path / "bare")
    whole, info = HoVLEForConditionalGeneration.from_pretrained(tmp_path / "bare", output_loading_info=True)
    expected = {"lm_head.weight", *(["lm_head.bias"] if model.config.language_head_bias else [])}
    assert info["missing_keys"] == (set() if model.config.tie_word_embeddings else expected)
    with torch.no_grad():
        found, wanted = (part(**batch()).last_hidden_state for part in (whole.eval().model, model.model))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("saved", "asked", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_the_number_format_is_the_saved_one_unless_another_is_asked_for(model_of, saved, asked, expected, tmp_path):
    copy.deepcopy(model_of("pre")).to(saved).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(saved).removeprefix("torch.")
    loaded = HoVLEForConditionalGeneration.from_pretrained(tmp_path, **({} if asked is None else {"dtype": asked}))
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    assert loaded.dtype == loaded.config.dtype == loaded.config.text_config.dtype == expected


def test_use_does_not_change_the_saved_configuration(model, tmp_path):
    model.save_pretrained(tmp_path / "new")
    loaded = HoVLEForConditionalGeneration.from_pretrained(tmp_path / "new")
    loaded.save_pretrained(tmp_path / "before")
    loaded(**batch(), output_hidden_states=True)
    loaded.generate(**batch(), max_new_tokens=2, do_sample=False)
    loaded.save_pretrained(tmp_path / "after")
    assert (tmp_path / "before" / "config.json").read_text() == (tmp_path / "after" / "config.json").read_text()


@pytest.mark.parametrize("asked", ["eager", {"text_config": "eager", "": "eager"}])
def test_the_attention_may_be_chosen_by_name_and_by_part(kind, model, asked, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = HoVLEForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=asked).eval()
    assert loaded.config.text_config._attn_implementation == "eager"
    expected, is_token = logits_of(model), batch()["attention_mask"].bool()  # rows of padding are nobody's business
    torch.testing.assert_close(logits_of(loaded)[is_token], expected[is_token], atol=1e-5, rtol=0)
    loaded.set_attn_implementation("sdpa")
    assert loaded.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(loaded), expected)


def test_layers_may_wait_on_the_disk(model, tmp_path):
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    layers = len(model.model.language_model.layers)
    device_map = {
        "model.patch_embedding": "cpu",
        **({} if model.model.projector is None else {"model.projector": "cpu"}),
        "model.embedding_rotary_emb": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "model.language_model.norm": "cpu",
        "lm_head": "cpu",
        **{f"model.language_model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(layers)},
    }
    loaded = HoVLEForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()
    assert loaded.model.language_model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(logits_of(loaded), logits_of(model))


# --- vocabulary ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"new_num_tokens": 530}, 530),
        ({"new_num_tokens": 410}, 410),
        ({"new_num_tokens": 500, "pad_to_multiple_of": 64}, 512),
    ],
)
def test_the_vocabulary_grows_and_shrinks_with_its_head(own_model, arguments, expected):
    is_tied = own_model.config.tie_word_embeddings
    before = logits_of(own_model)
    own_model.resize_token_embeddings(**arguments, mean_resizing=False)
    table, head = own_model.get_input_embeddings(), own_model.get_output_embeddings()
    assert len(table.weight) == len(head.weight) == table.num_embeddings == head.out_features == expected
    assert own_model.config.text_config.vocab_size == own_model.config.get_text_config().vocab_size == expected
    assert (head.weight is table.weight) == is_tied
    if head.bias is not None:
        assert head.bias.shape == (expected,)
    common = min(expected, before.shape[-1])
    assert torch.equal(logits_of(own_model)[..., :common], before[..., :common])
    answer = own_model.generate(**batch(), max_new_tokens=2, do_sample=False)
    assert answer.shape[1] <= batch()["input_ids"].shape[1] + 2


def test_a_vocabulary_without_room_for_the_placeholder_is_refused(own_model):
    with pytest.raises(ValueError, match=r"no row for image_token_id 402: keep at least 403"):
        own_model.resize_token_embeddings(PLACEHOLDER)
    own_model.resize_token_embeddings(PLACEHOLDER + 1, mean_resizing=False)
    assert torch.isfinite(logits_of(own_model)).all()


def test_the_tables_can_be_looked_up_and_replaced(own_model):
    vocab_size, hidden_size = own_model.get_input_embeddings().weight.shape
    table = torch.nn.Embedding(vocab_size, hidden_size)
    head = torch.nn.Linear(hidden_size, vocab_size)
    own_model.set_input_embeddings(table)
    own_model.set_output_embeddings(head)
    assert own_model.get_input_embeddings() is own_model.model.get_input_embeddings() is table
    assert own_model.model.language_model.embed_tokens is table
    assert own_model.get_output_embeddings() is own_model.lm_head is head
    assert own_model.get_decoder() is own_model.model.get_decoder()


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_two_runs_give_the_same_numbers(model):
    assert torch.equal(logits_of(model), logits_of(model))


def test_gradients_of_inner_states_can_be_kept(own_model):
    own_model.set_attn_implementation("eager")
    outputs = own_model(**batch(), output_hidden_states=True, output_attentions=True)
    inner = (*outputs.hidden_states, *outputs.attentions)
    for values in inner:
        values.retain_grad()
    outputs.logits[:, -1].pow(2).sum().backward()
    assert all(values.grad is not None and values.grad.abs().sum() > 0 for values in inner)


def test_a_cache_holds_every_token_once_in_every_layer(model):
    inputs = batch()
    with torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
    text = model.config.text_config
    is_hd = model.config.pixel_shuffle_loc == "post"
    num_tokens = inputs["input_ids"].shape[1]
    num_patches = num_tokens + 2 * 4 * 3  # the row of two tiles, whose placeholders stand for 4 patches each
    head_size = text.hidden_size // text.num_attention_heads
    assert len(cache) == text.num_hidden_layers
    assert cache.get_seq_length() == num_tokens
    for index, layer in enumerate(cache.layers):
        is_long = is_hd and index >= model.config.num_language_layers
        shape = (2, text.num_key_value_heads, num_patches if is_long else num_tokens, head_size)
        assert layer.keys.shape == layer.values.shape == shape


def test_a_whole_model_in_bfloat16_takes_float32_pixels(own_model, model):
    half = own_model.to(torch.bfloat16)
    logits = logits_of(half)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), logits_of(model), atol=0.02, rtol=0)  # measured: 0.006
    assert half.generate(**batch(), max_new_tokens=2, do_sample=False).shape[0] == 2


@pytest.mark.parametrize("kind", ["pre", "hd", "bidirectional"])
def test_the_forward_pass_exports(model):
    """HD needs one prompt: the length of its longest row would depend on the ids."""
    inputs = {name: values[:1] for name, values in batch().items()}
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][:, 5:], inputs["attention_mask"][:, 5:]
    exported = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False).module()
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    with torch.no_grad():
        for example in (inputs, other):
            found = exported(**example, use_cache=False).logits
            torch.testing.assert_close(found, logits_of(model, **example), atol=1e-6, rtol=0)


# --- training --------------------------------------------------------------------------------------------------------


def test_a_few_steps_lower_the_loss_and_move_every_weight(own_model):
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    own_model.train()
    before = {name: parameter.detach().clone() for name, parameter in own_model.named_parameters()}
    optimizer = torch.optim.AdamW(own_model.parameters(), lr=5e-3)
    losses = []
    for _ in range(15):
        loss = own_model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    still = [name for name, parameter in own_model.named_parameters() if torch.equal(parameter, before[name])]
    assert not still


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_pass_through_frozen_layers_under_checkpointing(own_model, use_reentrant):
    """As LoRA needs it: everything frozen, inputs made to require gradients, one layer trains."""
    own_model.requires_grad_(False)
    trained = own_model.model.language_model.layers[0].mlp.up_proj.weight.requires_grad_()
    inputs = batch()
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            own_model.enable_input_require_grads()
            # The second is the name before transformers 5.23.
            name = "activation_checkpointing_enable"
            enable = getattr(own_model, name, None) or own_model.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
        own_model.train()
        own_model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append(trained.grad.clone())
        trained.grad = None
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)
    assert gradients[0].abs().sum() > 0


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "num_rows"),
    [
        ({"do_sample": False}, 2),
        ({"do_sample": True, "num_return_sequences": 2}, 4),
        ({"do_sample": False, "num_beams": 3}, 2),
    ],
    ids=["greedy", "sample", "beam"],
)
def test_generation_returns_everything_on_request(own_model, options, num_rows):
    own_model.set_attn_implementation("eager")
    inputs = batch()
    outputs = own_model.generate(
        **inputs,
        **options,
        max_new_tokens=3,
        min_new_tokens=3,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    num_beams = options.get("num_beams", 1)
    prompt_length, text = inputs["input_ids"].shape[1], own_model.config.text_config
    assert outputs.sequences.shape == (num_rows, prompt_length + 3)
    assert len(outputs.scores) == len(outputs.logits) == len(outputs.hidden_states) == len(outputs.attentions) == 3
    for scores in (*outputs.scores, *outputs.logits):
        assert scores.shape == (num_rows * num_beams, text.vocab_size)
    language_layers = own_model.config.split_layers(outputs.hidden_states[0]).language
    assert language_layers[-1].shape == (num_rows * num_beams, prompt_length, text.hidden_size)
    for step in outputs.hidden_states[1:]:
        assert [tuple(states.shape) for states in step] == [(num_rows * num_beams, 1, text.hidden_size)] * 5
    for step in outputs.attentions:
        assert len(step) == text.num_hidden_layers
    if num_beams == 1:
        chosen = torch.stack(outputs.scores, dim=1).gather(2, outputs.sequences[:, prompt_length:, None])
        assert torch.isfinite(chosen).all()


def test_a_cache_has_two_names(model):
    """transformers 5.24 calls `cache` what was `past_key_values` before; hovle takes either, on any version."""
    ids = torch.tensor([[5, 6, 7]])

    def fresh() -> Cache:
        return model(ids, use_cache=True)[CACHE]

    with torch.no_grad():
        new, old = model(ids, cache=fresh()), model(ids, past_key_values=fresh())
        embedded = [
            model.get_holistic_embeddings(ids, **{name: fresh()}).last_hidden_state
            for name in ("cache", "past_key_values")
        ]
        assert new[CACHE].get_seq_length() == old[CACHE].get_seq_length() == 6
        assert torch.equal(new.logits, old.logits)
        assert torch.equal(*embedded)
        with pytest.raises(ValueError, match="not both"):
            model(ids, cache=fresh(), past_key_values=fresh())


def test_an_answer_goes_on_from_its_cache(model):
    inputs = batch()
    greedy = {"do_sample": False, "return_dict_in_generate": True}
    whole = model.generate(**inputs, **greedy, max_new_tokens=6, min_new_tokens=6).sequences
    first = model.generate(**inputs, **greedy, max_new_tokens=3, min_new_tokens=3)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    second = model.generate(
        input_ids=first.sequences,
        attention_mask=mask,
        **{CACHE: first[CACHE]},
        **greedy,
        max_new_tokens=3,
        min_new_tokens=3,
    )
    assert torch.equal(second.sequences, whole)


@pytest.mark.parametrize(
    "options",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"dola_layers": "high"},
        {"force_words_ids": [[3]], "num_beams": 2},
    ],
    ids=["contrastive", "group beams", "dola", "constrained beams"],
)
def test_ways_to_generate_that_left_transformers_are_refused(model_of, options):
    with pytest.raises(ValueError, match=r"requires `trust_remote_code=True`"):
        model_of("pre").generate(**batch(), do_sample=False, max_new_tokens=2, **options)


def test_an_answer_stops_at_words(model_of, tokenizer):
    model = model_of("pre")
    prompt = batch()["input_ids"].shape[1]
    greedy = {**batch(), "do_sample": False, "max_new_tokens": 12}
    answer = model.generate(**greedy)[0, prompt:]
    stop = tokenizer.decode(answer[4])
    stopped = model.generate(**greedy, stop_strings=[stop], tokenizer=tokenizer)[0, prompt:]
    text = tokenizer.decode([token for token in stopped if token != 0])
    assert text.endswith(stop)
    assert len(text) < len(tokenizer.decode(answer))
