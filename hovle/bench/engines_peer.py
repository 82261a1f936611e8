"""A peer for `hovle bench engines`: SmolVLM-256M's shapes in OpenVINO; random weights are as fast as trained ones."""

import math
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, LlamaForCausalLM, SmolVLMForConditionalGeneration

from ..export.openvino import write_decoder, write_stem_graph
from ..files.checkpoint_files import HOVLE_CONFIG
from ..model.configuration_hovle import HoVLEConfig
from .generate_models import FAMILIES, IMAGE, build, prompt_inputs

SIDE = 512
"""Of its tiles in pixels."""

VARIANT = FAMILIES["smol"]["smolvlm"]


class VisionEncoder(nn.Module):
    """Encoder and connector: tiles `(N, 3, 512, 512)` to image tokens `(N, 64, D)`."""

    def __init__(self, model: SmolVLMForConditionalGeneration):
        super().__init__()
        self.encoder, self.connector = model.model.vision_model, model.model.connector

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.connector(self.encoder(pixel_values).last_hidden_state)


def write_peer(folder: Path, share: float = 1.0) -> None:
    """Write its graphs as `hovle export --to openvino` writes a HoVLE's.

    Args:
        folder: Made here.
        share: Of its layers.
    """
    model = build(VARIANT, share, torch.device("cpu"), torch.float32)
    folder.mkdir(parents=True)
    write_stem_graph(VisionEncoder(model), torch.zeros(2, 3, SIDE, SIDE), folder)
    text_config = model.config.text_config
    write_decoder(LlamaForCausalLM(text_config).eval(), folder)
    HoVLEConfig(text_config=text_config, num_embedding_layers=1, image_token_id=IMAGE).to_json_file(
        folder / HOVLE_CONFIG
    )
    GenerationConfig().save_pretrained(folder)


def num_tiles(shape: tuple[int, int] | None) -> int:
    """Tiles that cover a picture of this width and height as it is, and one of the whole; its own processor would
    enlarge small ones to 17."""
    if shape is None:
        return 0
    count = math.prod(math.ceil(side / SIDE) for side in shape)
    return count + (count > 1)


def peer_prompt(shape: tuple[int, int] | None, num_words: int) -> dict[str, torch.Tensor]:
    """A picture of random pixels and random words for its engine."""
    inputs = prompt_inputs(VARIANT, num_tiles(shape), SIDE, num_words)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"][0]  # engines take all tiles of a prompt, without its axis
    return inputs
