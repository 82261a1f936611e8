"""Compiled answers: the same tokens, few graphs, and memory that is taken once."""

import copy
import functools
import types

import pytest
import torch
import torch._dynamo
from tiny_models import IMAGE, TEXT, shake
from torch import nn
from torch._dynamo.utils import counters
from torchao.quantization import Int8WeightOnlyConfig
from transformers import DynamicCache, LlamaConfig, MistralConfig, TorchAoConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hovle
from hovle import HoVLEConfig, HoVLEForConditionalGeneration
from hovle.inference import PrefixCache, compiled
from hovle.model.backbones import CACHE

TOKENS = 4  # placeholders of one tile, each 4 patches in HoVLE-HD's holistic layers
GRAPHS = 3  # holistic layers, language model, a new token


def tiny_model(stem: str = "pre", config_class=LlamaConfig, text: dict | None = None, **fields):
    """1 holistic layer and 1 of the language model."""
    torch.manual_seed(0)
    text_config = config_class(**{**TEXT, "num_hidden_layers": 2, "max_position_embeddings": 1024, **(text or {})})
    fields = {"image_size": 56, "image_token_id": IMAGE, "pixel_shuffle_loc": stem, **fields}
    config = HoVLEConfig(text_config=text_config, num_embedding_layers=1, **fields)
    return shake(HoVLEForConditionalGeneration(config)).eval()


def prompt(num_words: int, num_tiles: int = 0) -> dict:
    generator = torch.Generator().manual_seed(num_words)
    words = torch.randint(5, 59, (1, num_words), generator=generator)
    ids = torch.cat([torch.tensor([[5, 6]]), torch.full((1, TOKENS * num_tiles), IMAGE), words], dim=1)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if num_tiles:
        found["pixel_values"] = torch.randn(num_tiles, 3, 56, 56, generator=generator)
    return found


def batch(*prompts: dict) -> dict:
    """Prompts as one, padded on the left."""
    longest = max(one["input_ids"].shape[1] for one in prompts)
    padded = {
        name: torch.cat([nn.functional.pad(one[name], (longest - one[name].shape[1], 0)) for one in prompts])
        for name in ("input_ids", "attention_mask")
    }
    return padded | {"pixel_values": torch.cat([one["pixel_values"] for one in prompts if "pixel_values" in one])}


PROMPTS = [prompt(6), prompt(9, 1), prompt(20, 3), prompt(33), prompt(5, 2), prompt(300, 2), prompt(14, 1)]
"""The fifth outgrows the slots that the first ones need."""


def greedy(model, inputs: dict, new: int = 5, **options) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)


def go_on(answer: torch.Tensor, inputs: dict, num_words: int) -> dict:
    """The next turn of a conversation."""
    ids = torch.cat([answer, torch.arange(20, 20 + num_words)[None]], dim=1)
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def graphs(monkeypatch) -> list[torch.fx.GraphModule]:
    """Graphs as torch traces them, without the minutes of a C++ compiler."""
    found: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs, **_options):
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(compiled, "compiler_problem", lambda _device: None)
    return found


@pytest.mark.parametrize("stem", ["pre", "post"])
def test_answers_are_the_same_and_other_lengths_compile_nothing(stem, graphs):
    model = tiny_model(stem)
    expected = [greedy(model, inputs) for inputs in PROMPTS]
    turns = [go_on(expected[2], PROMPTS[2], num_words) for num_words in (3, 4, 11)]
    expected_turns = [greedy(model, inputs) for inputs in turns]
    assert hovle.optimize(model) is model
    for inputs, answer in zip(PROMPTS, expected, strict=True):
        assert torch.equal(greedy(model, inputs), answer)
        assert len(graphs) == GRAPHS
    prefixes = PrefixCache(model)
    prefixes.generate(PROMPTS[2], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    for inputs, answer in zip(turns, expected_turns, strict=True):
        found = prefixes.generate(inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert torch.equal(found, answer)
        assert prefixes.num_reused > len(PROMPTS[2]["input_ids"][0])
        assert len(graphs) == GRAPHS + 2  # layers that go on from what is cached
    assert not counters["graph_break"]


def test_a_new_token_s_graph_writes_into_memory_that_is_taken_once(graphs):
    model = hovle.optimize(tiny_model(), max_length=300)
    where = set()
    for inputs in PROMPTS[:5]:
        greedy(model, inputs)
        where.add(tuple(layer.keys.data_ptr() for layer in model._graphs._static.layers))
        assert {layer.keys.shape[2] for layer in model._graphs._static.layers} == {512}
    assert len(where) == 1
    step = graphs[-1]
    joined = [node for node in step.graph.nodes if node.target is torch.cat]
    assert {node.kwargs["dim"] for node in joined} == {-1}  # halves that are rotated; a growing cache joins along -2
    assert sum(node.target == "index_copy_" for node in step.graph.nodes) == 2 * len(model.model.language_model.layers)
    read = [node for node in step.graph.nodes if node.target is nn.functional.scaled_dot_product_attention]
    assert all(node.args[1].meta["example_value"].shape[1] == 2 for node in read)  # heads of keys, not of queries
    assert len(read) == len(model.model.language_model.layers)


@pytest.mark.parametrize("stem", ["pre", "post"])
def test_rows_of_different_lengths_and_bidirectional_pictures_give_the_same_tokens(stem, graphs):
    model = tiny_model(stem, image_attention="bidirectional")
    requests = [PROMPTS[2], batch(PROMPTS[1], PROMPTS[2], PROMPTS[0])]
    expected = [greedy(model, inputs) for inputs in requests]
    hovle.optimize(model)
    for inputs, answer in zip(requests, expected, strict=True):
        assert torch.equal(greedy(model, inputs), answer)


def test_a_cache_that_is_returned_is_left_alone_by_later_answers(graphs):
    plain, model = tiny_model("post"), hovle.optimize(tiny_model("post"))
    whole = greedy(model, PROMPTS[1], return_dict_in_generate=True)
    assert type(whole[CACHE]) is DynamicCache
    greedy(model, PROMPTS[2])
    turn = go_on(whole.sequences, PROMPTS[1], 3)
    del turn["pixel_values"]
    found = greedy(model, turn, **{CACHE: whole[CACHE]})
    assert torch.equal(found, greedy(plain, turn | {"pixel_values": PROMPTS[1]["pixel_values"]}))


def test_sampling_draws_what_it_drew(graphs):
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": True, "top_k": 0}
    model = tiny_model()
    torch.manual_seed(3)
    expected = model.generate(**PROMPTS[1], **options)
    hovle.optimize(model)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**PROMPTS[1], **options), expected)


def test_other_ways_to_generate_run_uncompiled_and_say_so(graphs, caplog):
    model = tiny_model()
    ways = {
        "beam_search reorders": {"num_beams": 2},
        "prefill_chunk_size": {"prefill_chunk_size": 4},
        "Another cache": {"cache_implementation": "static", "disable_compile": True},
        "hidden states": {"output_hidden_states": True},
        "custom_generate": {"custom_generate": lambda model, ids, **_kwargs: ids},
    }
    expected = [greedy(model, PROMPTS[0], **options) for options in ways.values()]
    hovle.optimize(model)
    for (reason, options), answer in zip(ways.items(), expected, strict=True):
        assert torch.equal(greedy(model, PROMPTS[0], **options), answer)
        assert reason in caplog.messages[-1]
    assert not graphs


def test_a_forward_pass_of_one_s_own_is_as_it_was(graphs):
    model = tiny_model()
    with torch.no_grad():
        expected = model(**PROMPTS[1]).logits
        torch.testing.assert_close(hovle.optimize(model)(**PROMPTS[1]).logits, expected, atol=1e-6, rtol=0)
    assert not graphs


def test_wrong_prompts_are_refused_as_ever(graphs):
    model = hovle.optimize(tiny_model())
    with pytest.raises(ValueError, match="The prompts hold 4 image tokens but the 2 tiles fill 8"):
        greedy(model, PROMPTS[1] | {"pixel_values": torch.zeros(2, 3, 56, 56)})
    assert torch.equal(greedy(model, PROMPTS[1]), greedy(tiny_model(), PROMPTS[1]))  # and nothing is left behind


def test_weights_that_changed_are_refused(graphs):
    model = hovle.optimize(tiny_model())
    greedy(model, PROMPTS[0])
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(ValueError, match="weights changed after it was optimized"):
        greedy(model, PROMPTS[0])


def test_int8_weights_give_the_same_tokens(graphs, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = HoVLEForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config)
    expected = greedy(model, PROMPTS[1])
    assert torch.equal(greedy(hovle.optimize(model), PROMPTS[1]), expected)
    assert len(graphs) == GRAPHS


def test_a_saved_model_is_a_plain_one(graphs, tmp_path):
    model = hovle.optimize(tiny_model())
    model.save_pretrained(tmp_path)
    loaded = HoVLEForConditionalGeneration.from_pretrained(tmp_path)
    assert type(loaded) is HoVLEForConditionalGeneration
    assert loaded.config.architectures == ["HoVLEForConditionalGeneration"]
    assert loaded.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(greedy(loaded, PROMPTS[0]), greedy(tiny_model(), PROMPTS[0]))


def on_two_devices():
    model = tiny_model()
    model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    return model


REFUSED = {
    "is in training mode": lambda: tiny_model().train(),
    "optimized already": lambda: hovle.optimize(tiny_model()),
    "takes a HoVLEForConditionalGeneration, got HoVLEModel": lambda: tiny_model().model,
    "lies on several devices": on_two_devices,
    "needs sdpa or eager attention, not flex_attention": lambda: _with_attention("flex_attention"),
    "mistral has layers with a sliding window": lambda: tiny_model("pre", MistralConfig, {"sliding_window": 8}),
    "depend on a prompt's length": lambda: tiny_model(
        text={"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    ),
}


def _with_attention(name: str):
    model = tiny_model()
    model.set_attn_implementation(name)
    return model


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_compiled_is_refused_with_the_reason(reason, graphs):
    model = REFUSED[reason]()
    with pytest.raises(ValueError, match=reason):
        hovle.optimize(model)


def test_a_machine_without_a_compiler_is_told(graphs, monkeypatch):
    monkeypatch.setattr(compiled, "compiler_problem", lambda _device: "no C++ compiler")
    with pytest.raises(ValueError, match=r"torch\.compile does not work here: no C\+\+ compiler"):
        hovle.optimize(tiny_model())


def test_an_optimized_model_cannot_be_copied(graphs):
    with pytest.raises(ValueError, match="copy the model first"):
        copy.deepcopy(hovle.optimize(tiny_model()))


@pytest.mark.parametrize("length", [1, 5])
def test_packed_attention_is_sdpa(length):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, length, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 7, 8, generator=generator)
    mask = torch.rand(2, 1, length, 7, generator=generator) > 0.3
    mask[..., 0] = True
    module = types.SimpleNamespace(num_key_value_groups=3, is_causal=True)
    found, _ = compiled.packed_sdpa(module, query, key, value, mask, scaling=0.4)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.4)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # measured: 1.2e-7


@pytest.mark.parametrize(("length", "slots"), [(1, 256), (256, 256), (257, 512), (2048, 2048), (4216, 5120)])
def test_slots_are_a_quarter_more_than_tokens_at_most(length, slots):
    assert compiled.num_slots(length) == slots


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["pre", "post"])
def test_real_graphs_give_the_same_tokens(stem):
    torch._dynamo.reset()
    model = tiny_model(stem)
    expected = [greedy(model, inputs) for inputs in PROMPTS]
    hovle.optimize(model)
    for inputs, answer in zip(PROMPTS, expected, strict=True):
        assert torch.equal(greedy(model, inputs), answer)
