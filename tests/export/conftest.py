"""A tiny flat HoVLE with its processor, and pictures of odd shapes and kinds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import shake
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hovle import HoVLEConfig, HoVLEForConditionalGeneration, HoVLEProcessor

FAMILIES: dict[str, dict] = {
    "cohere2": {"logit_scale": 0.5, "sliding_window": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "llama": {},
    "mistral": {"sliding_window": None},
    "phi": {"partial_rotary_factor": 0.5},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}
"""Families of decoders that differ in what a stock class does around its layers -> fields of the text config."""

TEXT = {
    "vocab_size": 416,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def save_model(make_tokenizer) -> Callable[..., HoVLEForConditionalGeneration]:
    """`save_model(folder, family, text, **fields)`: a HoVLE of 2 + 2 layers, tiles of 56 px with 4 tokens, saved."""

    def save(
        folder: Path, family: str = "llama", text: dict | None = None, with_processor: bool = True, **fields
    ) -> HoVLEForConditionalGeneration:
        torch.manual_seed(0)
        text_config = CONFIG_MAPPING[family](**{**TEXT, **FAMILIES.get(family, {}), **(text or {})})
        defaults = {"num_embedding_layers": 2, "image_size": 56, "image_token_id": 402}
        if family == "phi":
            defaults["language_head_bias"] = True
        config = HoVLEConfig(text_config=text_config, **{**defaults, **fields})
        model = shake(HoVLEForConditionalGeneration(config)).eval()
        model.generation_config.eos_token_id = 2
        model.save_pretrained(folder)
        if with_processor:
            processor = HoVLEProcessor.from_language_model(
                make_tokenizer(), config, max_tiles=4, text_after_image="\n"
            )
            processor.save_pretrained(folder)
        return model

    return save


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, save_model) -> Path:
    """A saved Llama-like HoVLE."""
    folder = tmp_path_factory.mktemp("hovle")
    save_model(folder)
    return folder


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Wide, tall, small, turned and transparent ones."""
    generator = np.random.default_rng(0)

    def noise(width: int, height: int, channels: int = 3) -> Image.Image:
        coarse = generator.integers(0, 256, (7, 9, channels), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    turned = noise(150, 60)
    turned.getexif()[274] = 6
    grey = noise(64, 64).convert("L")
    return [noise(150, 60), noise(60, 170), noise(20, 20), noise(300, 290), turned, noise(70, 60, 4), grey]
