"""Implementations of attention beside sdpa and eager: the same numbers, or a clear refusal."""

import pytest
import torch

from hovle import HoVLEForConditionalGeneration

# transformers' own call of torch.
pytestmark = pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")

PLACEHOLDER = 402
"""As in `tiny_config`; a tile is 4 of them."""

KINDS = {
    "pre": {},
    "bidirectional": {"image_attention": "bidirectional"},
    "hd": {"pixel_shuffle_loc": "post"},
    "hd bidirectional": {"pixel_shuffle_loc": "post", "image_attention": "bidirectional"},
}


def build_model(tiny_config, kind: str) -> HoVLEForConditionalGeneration:
    torch.manual_seed(0)
    model = HoVLEForConditionalGeneration(tiny_config(**KINDS[kind])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # attention that matters
    return model


@pytest.fixture(params=KINDS)
def model(request, tiny_config) -> HoVLEForConditionalGeneration:
    return build_model(tiny_config, request.param)


def row(*parts: int | str) -> list[int]:
    """Token ids; "tile" stands for the placeholders of one tile."""
    return [token for part in parts for token in ([PLACEHOLDER] * 4 if part == "tile" else [part])]


ROWS = [row(5, "tile", 6, 7), row(8, "tile", "tile", 9, "tile", 10, 11), row(12, 13, 14, 15)]
NUM_TILES = 4


def inputs_of(form: str) -> dict[str, torch.Tensor]:
    """The three rows as a "batch" padded on the left, or "packed" into one row."""
    pixels = torch.randn(NUM_TILES, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    if form == "packed":
        positions = [position for ids in ROWS for position in range(len(ids))]
        ids = [token for ids in ROWS for token in ids]
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "pixel_values": pixels,
        }
    length = max(map(len, ROWS))
    return {
        "input_ids": torch.tensor([[0] * (length - len(ids)) + ids for ids in ROWS]),
        "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in ROWS]),
        "pixel_values": pixels,
    }


def logits_of(model, attention: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits at real tokens."""
    model.set_attn_implementation(attention)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    return logits[inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("form", ["batch", "packed"])
def test_flex_attention_gives_the_numbers_of_sdpa(model, form):
    """Its masks, that is; compiling its kernels takes minutes and is left to the test below."""
    inputs = inputs_of(form)
    expected = logits_of(model, "sdpa", inputs)
    with torch.compiler.set_stance("force_eager"):
        found = logits_of(model, "flex_attention", inputs)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bidirectional", "hd"])
def test_compiled_flex_attention_gives_the_numbers_of_sdpa(tiny_config, kind):
    model, inputs = build_model(tiny_config, kind), inputs_of("batch")
    expected = logits_of(model, "sdpa", inputs)
    torch.testing.assert_close(logits_of(model, "flex_attention", inputs), expected, atol=2e-5, rtol=0)


def test_flash_attention_without_its_package_is_refused_by_name(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="the package for FlashAttention2"):
        HoVLEForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


def test_bidirectional_pictures_refuse_flash_attention(tiny_config):
    for kind in ("bidirectional", "hd bidirectional"):
        model = build_model(tiny_config, kind)
        model.config.text_config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="bidirectional pictures need sdpa, eager or flex_attention"):
            model(**inputs_of("batch"))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["pre", "hd"])
@pytest.mark.parametrize("form", ["batch", "packed"])
def test_flash_attention_gives_the_numbers_of_sdpa(tiny_config, kind, form):
    """Needs flash-attn; both in bfloat16, the only format they share here."""
    model = build_model(tiny_config, kind).to("cuda", torch.bfloat16)
    inputs = {name: values.cuda() for name, values in inputs_of(form).items()}
    expected = logits_of(model, "sdpa", inputs)
    torch.testing.assert_close(logits_of(model, "flash_attention_2", inputs), expected, atol=0.05, rtol=0.05)
