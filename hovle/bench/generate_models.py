"""Models of known shapes with random weights, which are as fast as trained ones, and what each should cost."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from ..model.configuration_hovle import HoVLEConfig
from ..model.modeling_hovle import HoVLEForConditionalGeneration

IMAGE = 5
"""Id of the placeholder; words are drawn from the ids above it."""

INTERNLM2 = {
    "vocab_size": 92553,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
"""Language model of the released HoVLE and of InternVL2-2B."""

SMOLLM2 = {
    "vocab_size": 49280,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
"""Language model of SmolVLM-256M."""

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""For tests."""


@dataclass(frozen=True)
class Variant:
    """A model to measure.

    Attributes:
        build: Makes it, given the share of its layers to keep.
        tokens_per_tile: Placeholders of a tile, given the side of the tile.
        joins_rows: Whether it takes tiles of all rows as `(N, 3, s, s)`, else as `(B, N, 3, s, s)`.
    """

    build: Callable[[float], Any]
    tokens_per_tile: Callable[[int], int]
    joins_rows: bool = True


def hovle(text: dict, num_holistic: int, num_language: int, stem: str, tile_size: int) -> Variant:
    """A HoVLE, HD with the stem `post`."""

    def build(share: float) -> HoVLEForConditionalGeneration:
        holistic, language = _part(num_holistic, share), _part(num_language, share)
        config = HoVLEConfig(
            text_config=_llama(text, holistic + language),
            num_embedding_layers=holistic,
            image_size=tile_size,
            image_token_id=IMAGE,
            pixel_shuffle_loc=stem,
        )
        return HoVLEForConditionalGeneration(config)

    return Variant(build, lambda side: (side // 28) ** 2)


def internvl(text: dict, vision: dict, num_vision: int, num_language: int, tile_size: int) -> Variant:
    """An InternVL2 as transformers has it."""

    def build(share: float) -> InternVLForConditionalGeneration:
        config = InternVLConfig(
            vision_config=InternVLVisionConfig(
                **vision, num_hidden_layers=_part(num_vision, share), image_size=tile_size, patch_size=14
            ),
            text_config=_llama(text, _part(num_language, share)),
            image_token_id=IMAGE,
            image_seq_length=(tile_size // 28) ** 2,
            tie_word_embeddings=False,
        )
        return InternVLForConditionalGeneration(config)

    return Variant(build, lambda side: (side // 28) ** 2)


def smolvlm(share: float) -> SmolVLMForConditionalGeneration:
    """SmolVLM-256M as transformers has it, tiles of 512 pixels."""
    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": _part(12, share),
            "image_size": 512,
            "patch_size": 16,
        },
        text_config=_llama(SMOLLM2, _part(30, share)).to_dict(),
        image_token_id=IMAGE,
        scale_factor=4,
    )
    return SmolVLMForConditionalGeneration(config)


VISION_300M = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}

FAMILIES: dict[str, dict[str, Variant]] = {
    "released": {
        "base": hovle(INTERNLM2, 8, 24, "pre", 448),
        "hd": hovle(INTERNLM2, 8, 24, "post", 448),
        "internvl2": internvl(INTERNLM2, VISION_300M, 24, 24, 448),
    },
    "smol": {
        "base": hovle(SMOLLM2, 8, 30, "pre", 112),
        "smolvlm": Variant(smolvlm, lambda side: (side // 64) ** 2, joins_rows=False),
    },
    "tiny": {
        "base": hovle(TINY, 1, 1, "pre", 56),
        "hd": hovle(TINY, 1, 1, "post", 56),
        "internvl2": internvl(TINY, {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}, 1, 1, 56),
    },
}
"""What is compared with what."""


def _llama(text: dict, num_layers: int) -> LlamaConfig:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaConfig(**text, **ids, num_hidden_layers=num_layers, max_position_embeddings=32768)


def _part(num_layers: int, share: float) -> int:
    return max(1, round(num_layers * share))


def build(variant: Variant, share: float, device: torch.device, dtype: torch.dtype) -> Any:
    """Make a model with random weights, the same each time, on the device and in the format it is measured in."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = variant.build(share).eval()
    finally:
        torch.set_default_dtype(default)
    model.generation_config.eos_token_id = None  # an answer is as long as it is asked for
    return model


def prompt(model: Any, variant: Variant, num_tiles: int, side: int, num_words: int, batch_size: int = 1) -> dict:
    """As `prompt_inputs`, on the model's device and in its number format."""
    inputs = prompt_inputs(variant, num_tiles, side, num_words, batch_size)
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def prompt_inputs(
    variant: Variant, num_tiles: int, side: int, num_words: int, batch_size: int = 1
) -> dict[str, torch.Tensor]:
    """A picture and words after it; each row the same."""
    generator = torch.Generator().manual_seed(num_words)
    words = torch.randint(IMAGE + 1, 60, (num_words,), generator=generator)
    ids = torch.cat([torch.full((num_tiles * variant.tokens_per_tile(side),), IMAGE), words])
    tiles = torch.randn(num_tiles, 3, side, side, generator=generator)
    tiles = tiles.repeat(batch_size, *[1] * (3 if variant.joins_rows else 4))
    inputs = {"input_ids": ids.repeat(batch_size, 1), "attention_mask": torch.ones(batch_size, len(ids)).long()}
    return inputs | ({"pixel_values": tiles} if num_tiles else {})


def expected_costs(model: HoVLEForConditionalGeneration, num_tiles: int, side: int, num_words: int) -> dict[str, int]:
    """What the cost model says of a HoVLE's prompt: FLOPs of reading it, bytes of keys and values it leaves.

    A layer computes two operations for each of its weights and each token, and four for each pair of tokens and each
    number of a hidden state, as half of the pairs that a causal mask leaves out are computed too.
    """
    config, text = model.config, model.config.text_config
    hidden, width = text.hidden_size, text.hidden_size // text.num_attention_heads
    weights = sum(weight.numel() for weight in model.model.language_model.layers[0].parameters() if weight.dim() == 2)
    tokens = num_tiles * config.tokens_per_tile(side)
    patches = num_tiles * (side // config.patch_size) ** 2
    short, long = tokens + num_words, tokens * config.slots_per_placeholder + num_words
    layers = [(long, config.num_embedding_layers), (short, config.num_language_layers)]
    flops = sum(count * (2 * weights * length + 4 * hidden * length**2) for length, count in layers)
    flops += 2 * patches * config.num_channels * config.patch_size**2 * hidden
    flops += 2 * tokens * (hidden * config.shuffle_factor**2 * hidden + hidden**2)
    flops += 2 * hidden * text.vocab_size
    element = torch.empty(0, dtype=model.dtype).element_size()
    cached = sum(count * length for length, count in layers)
    return {"flops": flops, "kv_bytes": cached * 2 * text.num_key_value_heads * width * element}
