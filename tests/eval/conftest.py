"""Tiny models in folders of their own, as analyses load them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
)

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.language_model import add_image_tokens

INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for item in message['content'] %}"
    "{{ '<IMG_CONTEXT>' if item['type'] == 'image' else item['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def strengthen(model: torch.nn.Module) -> None:
    """Scale random weights up until attention is far from even."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)


@pytest.fixture
def save_hovle(tmp_path, tiny_config, make_tokenizer) -> Callable[..., str]:
    """`save_hovle(name, **config fields)` writes a random HoVLE with its processor; gives the folder."""

    def save(name: str = "hovle", max_tiles: int = 6, **fields) -> str:
        torch.manual_seed(0)
        config = tiny_config(**fields)
        model = HoVLEForConditionalGeneration(config)
        strengthen(model)
        model.save_pretrained(tmp_path / name)
        processor = HoVLEProcessor.from_language_model(make_tokenizer(), config, max_tiles=max_tiles)
        processor.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def save_internvl(tmp_path, make_tokenizer) -> Callable[[], str]:
    """`save_internvl()` writes a random transformers InternVL with tiles of 56 px, 4 tokens each; gives the folder."""

    def save() -> str:
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        add_image_tokens(tokenizer)
        tokenizer.add_tokens(["<video>"], special_tokens=True)
        tokenizer._set_model_specific_special_tokens(special_tokens={"video_token": "<video>"})
        vision = InternVLVisionConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=[56, 56],
            patch_size=[14, 14],
        )
        text = LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        config = InternVLConfig(
            vision_config=vision, text_config=text, image_token_id=tokenizer.context_image_token_id, image_seq_length=4
        )
        model = InternVLForConditionalGeneration(config)
        strengthen(model)
        model.save_pretrained(tmp_path / "internvl")
        processor = InternVLProcessor(
            GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=6),
            tokenizer,
            InternVLVideoProcessor(size={"height": 56, "width": 56}),
            image_seq_length=4,
            chat_template=INTERNVL_TEMPLATE,
        )
        processor.save_pretrained(tmp_path / "internvl")
        return str(tmp_path / "internvl")

    return save


@pytest.fixture
def picture() -> Image.Image:
    """Three times as wide as high: with tiles of 56 px a grid of 3 x 1, and a thumbnail."""
    drawing = Image.effect_noise((150, 50), 90).convert("RGB")
    ImageDraw.Draw(drawing).rectangle([110, 10, 140, 40], fill="red")
    return drawing


@pytest.fixture
def picture_file(picture, tmp_path) -> Path:
    """The same picture as a file."""
    picture.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"
