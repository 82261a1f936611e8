"""Stem and table of words of a flat HoVLE as modules whose graphs are written, and inputs to trace a decoder with."""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from ..model.backbones import CACHE
from .flat import FlatModel


class ImageStem(nn.Module):
    """Tiles of the size that the processor cuts to image tokens.

    Args:
        flat: The model.
        whole_picture_only: Take the last tile of a picture only, which shows all of it; for models of one tile in
            engines that always cut pictures.
    """

    def __init__(self, flat: FlatModel, whole_picture_only: bool = False):
        super().__init__()
        stem = flat.model.model.patch_embedding
        self.projection, self.projector = stem.projection, flat.model.model.projector
        grid = flat.image_processor.tile_size // flat.config.patch_size
        self.positions = nn.Parameter(stem.positions_for(grid).detach(), requires_grad=False)
        self.whole_picture_only = whole_picture_only

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map `(N, C, s, s)` to `(N, S, D)`."""
        if self.whole_picture_only:
            pixel_values = pixel_values[-1:]
        features = self.projection(pixel_values).flatten(2).transpose(1, 2) + self.positions
        return features if self.projector is None else self.projector(features)


class TokenEmbeddings(nn.Module):
    """Ids to embeddings; what a family does to them in its forward pass, the decoder's graph does."""

    def __init__(self, decoder: PreTrainedModel):
        super().__init__()
        self.table = decoder.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Map `(B, T)` to `(B, T, D)`."""
        return self.table(input_ids)


def sample_pixels(flat: FlatModel, num_tiles: int = 2) -> torch.Tensor:
    """Tiles to trace the stem with, shape `(N, C, s, s)`."""
    side = flat.image_processor.tile_size
    return torch.zeros(num_tiles, flat.config.num_channels, side, side)


def sample_decoder_inputs(config: PreTrainedConfig) -> dict[str, Any]:
    """What a decoder is traced with: three new tokens in each of two rows, after four that the cache holds."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = DynamicCache(config=config)
    for index in range(config.num_hidden_layers):
        keys = torch.zeros(2, config.num_key_value_heads, 4, head_size)
        cache.update(keys, keys.clone(), index)
    return {
        "inputs_embeds": torch.zeros(2, 3, config.hidden_size),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
        "position_ids": torch.arange(4, 7).expand(2, 3).clone(),
        CACHE: cache,
    }
