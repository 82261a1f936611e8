"""Answers that grow together are those that each prompt gets alone."""

import copy

import pytest
import torch
from PIL import Image
from tiny_models import shake
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.models.auto import AutoConfig

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.inference import Batch, PrefixCache
from hovle.inference.batch import ROOM

KINDS = {
    "flat": {},
    "two sections": {"normalize_encoder_output": True},
    "hd": {"pixel_shuffle_loc": "post"},
    "bidirectional": {"image_attention": "bidirectional"},
    "dynamic rope": {"text_config": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}},
}


def build(tiny_config, model_type: str = "llama", attention: str = "sdpa", text_config: dict | None = None, **fields):
    torch.manual_seed(0)
    if model_type == "llama":
        config = tiny_config(text_config=text_config, **fields)
    else:
        given = tiny_config().text_config.to_dict()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        more = ("num_key_value_heads", "max_position_embeddings", "eos_token_id", "pad_token_id")
        text = AutoConfig.for_model(model_type, **{name: given[name] for name in (*names, *more)}, **text_config)
        config = tiny_config()
        config.text_config = text
    config._attn_implementation = attention
    model = HoVLEForConditionalGeneration._from_config(config, attn_implementation=attention)
    return shake(model).eval()


@pytest.fixture(params=KINDS)
def model(request, tiny_config) -> HoVLEForConditionalGeneration:
    return build(tiny_config, **KINDS[request.param])


@pytest.fixture
def processor(make_tokenizer, model) -> HoVLEProcessor:
    return make_processor(make_tokenizer, model)


def make_processor(make_tokenizer, model) -> HoVLEProcessor:
    return HoVLEProcessor.from_language_model(make_tokenizer(), model.config, max_tiles=4)


def prompts(processor) -> list:
    """Of different lengths, with and without pictures; two begin alike."""
    asked = [
        ("what is it?", (150, 100), "red"),
        ("hi", None, None),
        ("where does it stand now, and how many apples are on the table?", (150, 100), "red"),
        ("Describe the image in one short sentence, please.", (60, 60), "green"),
    ]
    found = []
    for text, size, color in asked:
        content = [{"type": "text", "text": text}]
        if size:
            content.insert(0, {"type": "image", "image": Image.new("RGB", size, color)})
        found.append(
            processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        )
    return found


def settings(model, num_new: int, **fields) -> GenerationConfig:
    config = copy.deepcopy(model.generation_config)
    config.update(**{"do_sample": False, "max_new_tokens": num_new, "eos_token_id": None, **fields})
    return config


def alone(model, inputs, config, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return model.generate(**inputs, generation_config=config)[0]


def together(batch: Batch, asked: list, configs: list, seeds=None) -> list[torch.Tensor]:
    """One prompt joins after each step."""
    rows = []
    for number, (inputs, config) in enumerate(zip(asked, configs, strict=True)):
        rows.append(batch.join(inputs, config, seed=seeds[number] if seeds else None))
        if batch.rows:
            batch.step()
    while batch.rows:
        batch.step()
    return [row.input_ids[0] for row in rows]


@pytest.mark.parametrize("max_bytes", [2**30, 0], ids=["prefixes", "no prefixes"])
def test_answers_equal_those_of_each_prompt_alone(model, processor, max_bytes):
    asked = prompts(processor)
    configs = [settings(model, num_new) for num_new in (9, 4, 12, 1)]
    expected = [alone(model, inputs, config) for inputs, config in zip(asked, configs, strict=True)]
    batch = Batch(PrefixCache(model, max_bytes))
    for _ in range(2):  # the second time, prompts and answers have been read
        for one, other in zip(expected, together(batch, asked, configs), strict=True):
            assert torch.equal(one, other)
    assert bool(batch.prefixes.num_bytes) == bool(max_bytes)


@pytest.mark.parametrize(
    ("model_type", "attention", "text_config"),
    [
        ("llama", "eager", {}),
        ("mistral", "sdpa", {"sliding_window": 12, "head_dim": 16}),
        ("gemma2", "eager", {"sliding_window": 12, "head_dim": 16, "query_pre_attn_scalar": 16}),
        ("qwen3", "sdpa", {"head_dim": 16}),
    ],
)
def test_so_do_those_of_other_families(tiny_config, make_tokenizer, monkeypatch, model_type, attention, text_config):
    monkeypatch.setattr("hovle.inference.batch.ROOM", 2)
    model = build(tiny_config, model_type, attention, text_config)
    asked = prompts(make_processor(make_tokenizer, model))
    configs = [settings(model, num_new) for num_new in (9, 4, 12, 6)]
    expected = [alone(model, inputs, config) for inputs, config in zip(asked, configs, strict=True)]
    for one, other in zip(expected, together(Batch(PrefixCache(model)), asked, configs), strict=True):
        assert torch.equal(one, other)
    assert model.config.text_config._attn_implementation == attention


@pytest.fixture
def plain(tiny_config):
    return build(tiny_config)


def test_each_answer_draws_by_its_own_seed_and_settings(plain, make_tokenizer):
    asked = prompts(make_processor(make_tokenizer, plain))
    configs = [
        settings(plain, 10, do_sample=True, temperature=temperature, top_p=top_p, repetition_penalty=penalty)
        for temperature, top_p, penalty in ((1.5, 1.0, 1.0), (0.5, 0.9, 1.0), (1.0, 0.5, 1.3), (2.0, 1.0, 1.0))
    ]
    seeds = [7, 8, 2**62, -5]
    expected = [alone(plain, *pair, seed) for *pair, seed in zip(asked, configs, seeds, strict=True)]
    state = torch.get_rng_state()
    found = together(Batch(PrefixCache(plain)), asked, configs, seeds)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    unseeded = [together(Batch(PrefixCache(plain)), asked[:1], configs[:1])[0].tolist() for _ in range(3)]
    assert len({tuple(ids) for ids in unseeded}) == 3


class Failing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > self.longest:
            raise RuntimeError("no more")
        return scores


class Ended(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.ones(len(input_ids), dtype=torch.bool)


def test_a_row_whose_tokens_cannot_be_chosen_leaves_the_others_alone(plain, make_tokenizer):
    asked = prompts(make_processor(make_tokenizer, plain))
    batch, failing = Batch(PrefixCache(plain)), Failing()
    failing.longest = asked[1]["input_ids"].shape[1] + 2
    broken = batch.join(asked[1], settings(plain, 20), processors=[failing])
    whole = batch.join(asked[0], settings(plain, 9))
    while batch.rows:
        batch.step()
    assert str(broken.error) == "no more"
    assert whole.error is None
    assert torch.equal(whole.input_ids[0], alone(plain, asked[0], settings(plain, 9)))


def test_an_answer_that_ends_with_its_first_token_never_joins(plain, make_tokenizer):
    asked = prompts(make_processor(make_tokenizer, plain))
    batch = Batch(PrefixCache(plain))
    for config, criteria in ((settings(plain, 1), []), (settings(plain, 5), [Ended()])):
        row = batch.join(asked[0], config, criteria)
        assert row.is_done
        assert row.input_ids.shape[1] == asked[0]["input_ids"].shape[1] + 1
    assert not batch.rows


def test_what_is_kept_of_a_prompt_is_not_what_its_answer_grows_in(plain, make_tokenizer):
    asked = prompts(make_processor(make_tokenizer, plain))
    batch = Batch(PrefixCache(plain))
    rows = [batch.join(asked[0], settings(plain, num_new)) for num_new in (4, 12)]
    assert rows[1].begun.num_reused == asked[0]["input_ids"].shape[1] - 1
    while batch.rows:
        batch.step()
    for row, num_new in zip(rows, (4, 12), strict=True):
        assert torch.equal(row.input_ids[0], alone(plain, asked[0], settings(plain, num_new)))


def test_no_more_prompts_are_kept_than_are_worth_comparing(plain, make_tokenizer, monkeypatch):
    monkeypatch.setattr("hovle.inference.prefixes.MAX_PROMPTS", 2)
    batch = Batch(PrefixCache(plain))
    for inputs in prompts(make_processor(make_tokenizer, plain)):
        batch.join(inputs, settings(plain, 1))
        assert len(batch.prefixes._reads) <= 2


def test_memory_of_what_is_kept_is_counted_with_the_room_that_answers_left(plain):
    batch = Batch(PrefixCache(plain, max_bytes=2 * (8 + ROOM) * 1024))  # a token takes 1 KiB
    for number in range(4):
        batch.join({"input_ids": torch.tensor([[3, 4, 5 + number]])}, settings(plain, 3))
    while batch.rows:
        batch.step()
    layers = [layer for read in batch.prefixes._reads for layer in read.cache.layers]
    held = sum(item.untyped_storage().nbytes() for layer in layers for item in (layer.keys, layer.values))
    assert 0 < held <= batch.prefixes.max_bytes
