"""Caches in the hands of others: edited, continued, of a kind that cannot work."""

import copy

import pytest
import torch
from tiny_models import IMAGE, TEXT, shake
from torch import nn
from transformers import DynamicCache, LlamaConfig, MistralConfig, Phi3Config, Phi3ForCausalLM, StaticCache

from hovle import HoVLEConfig, HoVLEForConditionalGeneration
from hovle.model.backbones import CACHE

TOKENS = 4  # placeholders of one tile, each 4 patches in HoVLE-HD's holistic layers
# Measured worst case: 1.7e-6, on logits of size 3.
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
FIELDS = {"image_size": 56, "image_token_id": IMAGE}


def tiny_model(stem: str, config_class=LlamaConfig, text: dict | None = None, **fields):
    """2 holistic and 3 language layers."""
    torch.manual_seed(0)
    text_config = config_class(**{**TEXT, "num_hidden_layers": 5, **(text or {})})
    config = HoVLEConfig(
        text_config=text_config, num_embedding_layers=2, pixel_shuffle_loc=stem, **{**FIELDS, **fields}
    )
    return shake(HoVLEForConditionalGeneration(config)).eval()


def tables_of(model) -> tuple[nn.Module, nn.Module]:
    """Rotary tables of the holistic layers and of the language model."""
    return model.embedding_rotary_emb, model.language_model.rotary_emb


def test_holistic_layers_may_switch_longrope_s_factors_elsewhere():
    model = longrope_model("pre", embedding_rope_parameters={"original_max_position_embeddings": 20}).model
    few, many = torch.arange(16)[None], torch.arange(18)[None]
    own, language = ([rope(torch.zeros(1, 1, 8), ids)[0][:, :16] for ids in (few, many)] for rope in tables_of(model))
    assert torch.equal(*own)
    assert not torch.allclose(*language)


@pytest.fixture(params=["pre", "post"])
def stem(request) -> str:
    return request.param


def prompt(*parts: int | list[int]) -> torch.Tensor:
    """Token ids of one row; `[n]` stands for the placeholders of n tiles."""
    row = [token for part in parts for token in ([IMAGE] * TOKENS * part[0] if isinstance(part, list) else [part])]
    return torch.tensor([row])


def tiles(num_tiles: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_tiles, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


def pad_left(*rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack rows of different lengths; ids and mask."""
    length = max(row.shape[1] for row in rows)
    ids = torch.cat([nn.functional.pad(row, (length - row.shape[1], 0)) for row in rows])
    mask = torch.cat([nn.functional.pad(torch.ones_like(row), (length - row.shape[1], 0)) for row in rows])
    return ids, mask


def greedy(model, *args, new: int = 5, **kwargs) -> torch.Tensor:
    return model.generate(*args, max_new_tokens=new, min_new_tokens=new, do_sample=False, **kwargs)


SWITCH = 16
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 4.0, 8.0, 16.0],
    "factor": 16.0,
    "original_max_position_embeddings": SWITCH,
}


def longrope_model(stem: str, **fields) -> HoVLEForConditionalGeneration:
    """Phi-3 rotates sequences of more than 16 tokens by other factors."""
    torch.manual_seed(0)
    config = Phi3Config(**TEXT, num_hidden_layers=4, original_max_position_embeddings=SWITCH, rope_parameters=LONGROPE)
    bare = shake(Phi3ForCausalLM(config)).eval()
    return HoVLEForConditionalGeneration.from_language_model(
        bare, 2, pixel_shuffle_loc=stem, **FIELDS, **fields
    ).eval()


SHORT = torch.arange(5, 17)[None]
"""12 tokens: with 5 new ones, the last of which is not read, the sequence ends at the switch."""


def test_generation_that_would_outgrow_longrope_s_short_factors_is_refused(stem):
    model = longrope_model(stem)
    with pytest.raises(ValueError, match=r"Beyond 16 tokens .* from 12 to 17 tokens .* at most 5 new tokens"):
        greedy(model, SHORT, new=6)
    with pytest.raises(ValueError, match="Beyond 16 tokens"):
        greedy(model, SHORT, new=6, num_beams=2)
    with pytest.raises(ValueError, match="Beyond 16 tokens"):
        greedy(model, inputs_embeds=model.get_input_embeddings()(SHORT), new=6)
    with pytest.raises(ValueError, match="prefill_chunk_size cannot be used"):
        greedy(model, SHORT, new=6, prefill_chunk_size=4)
    assert greedy(model, SHORT, new=6, use_cache=False).shape[1] == 18


def test_generation_on_one_side_of_longrope_s_switch_runs_with_a_cache(stem):
    model = longrope_model(stem)
    for ids, mask in [(SHORT, None), (torch.arange(5, 22)[None], None), pad_left(SHORT, SHORT[:, :7])]:
        inputs = {"input_ids": ids, "attention_mask": mask}
        assert torch.equal(greedy(model, **inputs), greedy(model, **inputs, use_cache=False))
    padded = nn.functional.pad(SHORT, (3, 0))  # padding is no part of the sequence
    inputs = {"input_ids": padded, "attention_mask": (padded > 0).long()}
    assert torch.equal(greedy(model, **inputs), greedy(model, **inputs, use_cache=False))
    with pytest.raises(ValueError, match="from 12 to 17"):
        greedy(model, **inputs, new=6)


def test_pictures_of_hd_reach_longrope_s_switch_in_the_holistic_layers():
    model = longrope_model("post")
    ids, pixels = prompt(5, [1], 6, 7), tiles(1)  # 7 tokens, 19 in the holistic layers
    assert torch.equal(
        greedy(model, ids, pixel_values=pixels), greedy(model, ids, pixel_values=pixels, use_cache=False)
    )
    with pytest.raises(ValueError, match="from 7 to 17 tokens"):
        greedy(model, ids, pixel_values=pixels, new=11)
    with pytest.raises(ValueError, match=r"Beyond 16 tokens .* from 16 to 17 tokens"):
        greedy(model, prompt([1]), pixel_values=pixels, new=2)


def test_a_second_turn_beyond_longrope_s_switch_is_refused(stem):
    model = longrope_model(stem)
    turns = torch.arange(5, 22)[None]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(SHORT, cache=cache)
    with pytest.raises(ValueError, match="from 12 to 17 tokens"):
        greedy(model, turns, new=1, **{CACHE: cache})


@pytest.mark.parametrize("make_cache", [lambda c: DynamicCache(config=c), lambda c: StaticCache(c, max_cache_len=60)])
def test_hd_s_own_padding_within_a_sliding_window_is_refused(make_cache):
    model = tiny_model("post", MistralConfig, {"sliding_window": 6})
    first = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        cache = make_cache(model.config.text_config)
        model(first, cache=cache)
        with pytest.raises(ValueError, match="with a sliding window cannot continue a cache"):
            model(torch.cat([prompt(13, [1], 14), prompt(15, 16, 17, 18, 19, 20)]), tiles(1), cache=cache)
        second = torch.cat([prompt(13, [1], 14), prompt([1], 15, 16)])  # rows that gain the same
        cache = make_cache(model.config.text_config)
        model(first, cache=cache)
        found = model(second, tiles(2), cache=cache).logits
        for row in range(2):
            whole = torch.cat([first[row : row + 1], second[row : row + 1]], dim=1)
            expected = model(whole, tiles(2)[row : row + 1], use_cache=False).logits[:, 4:]
            torch.testing.assert_close(found[row : row + 1], expected, **TOLERANCE)


CONVERSATIONS = [prompt(5, [1], 6, 7, 8), prompt(9, 10, [3], 11, [1], 12)]
PICTURES = [tiles(1, 1), tiles(4, 2)]


def cached_batch(model) -> tuple[DynamicCache, torch.Tensor]:
    """A cache that holds the two conversations, the first one padded; and their mask."""
    ids, mask = pad_left(*CONVERSATIONS)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, torch.cat(PICTURES), mask, cache=cache)
    return cache, mask


def go_on(model, cache, mask, token: int = 7) -> torch.Tensor:
    """Logits after one more token."""
    mask = nn.functional.pad(mask, (0, 1), value=1)
    with torch.no_grad():
        return model(torch.full((len(mask), 1), token), attention_mask=mask, cache=cache).logits[:, -1]


def alone(model, row: int, *tokens: int) -> torch.Tensor:
    """Logits after a conversation and more tokens, without a cache."""
    ids = torch.cat([CONVERSATIONS[row], torch.tensor([tokens])], dim=1)
    with torch.no_grad():
        return model(ids, PICTURES[row], use_cache=False).logits[0, -1]


EDITS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([0])), [0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_rows_of_a_cache_that_others_moved_are_right_or_refused(stem, edit):
    model = tiny_model(stem)
    move, rows = EDITS[edit]
    cache, mask = cached_batch(model)
    move(cache)
    if stem == "post":
        with pytest.raises(ValueError, match="Rows of this cache were reordered"):
            go_on(model, cache, mask[rows])
    else:
        expected = torch.stack([alone(model, row, 7) for row in rows])
        torch.testing.assert_close(go_on(model, cache, mask[rows]), expected, **TOLERANCE)


def test_rows_without_padding_may_be_moved(stem):
    model = tiny_model(stem)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(CONVERSATIONS[0], PICTURES[0], cache=cache)
    cache.batch_repeat_interleave(2)
    mask = torch.ones(2, CONVERSATIONS[0].shape[1], dtype=torch.long)
    expected = alone(model, 0, 7).expand(2, -1)
    torch.testing.assert_close(go_on(model, cache, mask), expected, **TOLERANCE)


def test_generate_reorders_the_padding_of_hd_with_its_rows():
    model = tiny_model("post")
    cache, mask = cached_batch(model)
    model._reorder_cache(cache, torch.tensor([1, 0]))
    expected = torch.stack([alone(model, row, 7) for row in (1, 0)])
    torch.testing.assert_close(go_on(model, cache, mask[[1, 0]]), expected, **TOLERANCE)


def test_a_cache_may_be_copied(stem):
    model = tiny_model(stem)
    cache, mask = cached_batch(model)
    copied = copy.deepcopy(cache)
    assert torch.equal(go_on(model, copied, mask), go_on(model, cache, mask))


def test_words_of_an_answer_may_be_taken_back(stem):
    model = tiny_model(stem)
    cache, mask = cached_batch(model)
    for _ in range(2):
        go_on(model, cache, mask, token=20)
        mask = nn.functional.pad(mask, (0, 1), value=1)
    cache.crop(-1)
    expected = torch.stack([alone(model, row, 20, 7) for row in (0, 1)])
    torch.testing.assert_close(go_on(model, cache, mask[:, :-1]), expected, **TOLERANCE)


@pytest.mark.parametrize("padded", [True, False])
def test_hd_refuses_a_cache_whose_pictures_were_cropped(padded):
    model = tiny_model("post")
    if padded:
        cache, mask = cached_batch(model)
    else:
        cache, mask = DynamicCache(config=model.config), torch.ones_like(CONVERSATIONS[0])
        with torch.no_grad():
            model(CONVERSATIONS[0], PICTURES[0], cache=cache)
    num_text = 0 if padded else int((CONVERSATIONS[0] == IMAGE).flip(1).cumsum(1).eq(0).sum())
    assert num_text < 5
    cache.crop(-5)
    with pytest.raises(ValueError, match=f"can take back only the last {num_text}, which follow all pictures"):
        go_on(model, cache, mask[:, :-5])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 5), r"\(1, 5\), but 1 rows of 8 cached and 5 new tokens need \(1, 13\)"),
        ((1, 14), r"need \(1, 13\)"),
        ((2, 13), r"need \(1, 13\)"),
    ],
)
@pytest.mark.parametrize("make_cache", [lambda c: DynamicCache(config=c), lambda c: StaticCache(c, max_cache_len=60)])
def test_a_mask_that_does_not_cover_cached_and_new_tokens_is_refused(stem, make_cache, shape, message):
    model = tiny_model(stem)
    cache = make_cache(model.config.text_config)
    with torch.no_grad():
        model(CONVERSATIONS[0], PICTURES[0], cache=cache)
        with pytest.raises(ValueError, match=message):
            model(torch.arange(20, 25)[None], attention_mask=torch.ones(shape, dtype=torch.long), cache=cache)


def test_a_mask_of_another_length_than_the_prompt_is_refused(stem):
    model = tiny_model(stem)
    for length in (4, 6):
        with pytest.raises(ValueError, match=rf"\(1, {length}\), but 1 rows of 0 cached and 5 new tokens"):
            model(torch.arange(20, 25)[None], attention_mask=torch.ones(1, length, dtype=torch.long))


PACKED = {"input_ids": torch.arange(5, 11)[None], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}


def test_packed_documents_in_a_cache_that_cannot_part_them_are_refused(stem):
    model = tiny_model(stem)
    static = StaticCache(config=model.config.text_config, max_cache_len=40)
    used = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(20, 25)[None], cache=used)
        for cache in (static, used):
            with pytest.raises(ValueError, match="position_ids restart or jump"):
                model(**PACKED, cache=cache)
        found = model(**PACKED, cache=DynamicCache(config=model.config)).logits[:, 3:]
        expected = model(PACKED["input_ids"][:, 3:], use_cache=False).logits
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("kind", [{}, {"image_attention": "bidirectional"}])
def test_flex_attention_with_a_static_cache_is_refused(stem, kind):
    model = tiny_model(stem, **kind)
    model.set_attn_implementation("flex_attention")
    ids = torch.arange(5, 11)[None]
    with pytest.raises(ValueError, match="flex_attention with a static cache"):
        model(ids, cache=StaticCache(config=model.config.text_config, max_cache_len=40))
    with pytest.raises(ValueError, match="flex_attention with a static cache"):
        greedy(model, ids, cache_implementation="static", disable_compile=True)


def test_a_bidirectional_picture_in_two_passes_is_refused(stem):
    ids, pixels = prompt(5, [2], 6, 7), tiles(2)
    with torch.no_grad():
        model = tiny_model(stem, image_attention="bidirectional")
        cache = DynamicCache(config=model.config)
        model(ids[:, :5], pixels[:1], cache=cache)
        with pytest.raises(ValueError, match="A pass ended within a picture"):
            model(ids[:, 5:], pixels[1:], cache=cache)
        cache = DynamicCache(config=model.config)
        outputs = [model(ids[:, :5], pixels[:1], cache=cache), model(ids[:, -1:], cache=cache)]
        outputs.append(model(prompt([1], 7), pixels[1:], cache=cache))  # another picture, after a word
        found = torch.cat([output.logits for output in outputs], dim=1)
        expected = model(torch.cat([ids[:, :5], ids[:, -1:], prompt([1], 7)], dim=1), pixels, use_cache=False).logits
        torch.testing.assert_close(found, expected, **TOLERANCE)
        causal = tiny_model(stem)
        cache = DynamicCache(config=causal.config)
        parts = [causal(ids[:, :5], pixels[:1], cache=cache), causal(ids[:, 5:], pixels[1:], cache=cache)]
        expected = causal(ids, pixels, use_cache=False).logits
        torch.testing.assert_close(torch.cat([part.logits for part in parts], dim=1), expected, **TOLERANCE)
