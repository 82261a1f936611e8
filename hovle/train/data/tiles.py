"""Picture files to tiles of bytes, and tiles to what the model takes.

Training cuts pictures as `HoVLEImageProcessor` does where it gives bytes, whatever its settings: `model.pixels` tells
what that saves, and how it differs from what the image processor gives by default.
"""

import hashlib
import os
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ...model.image_processing_hovle import HoVLEImageProcessor
from ...model.pictures import load_pixels
from ...model.pixels import cut_pixels, normalize_pixels


def read_tiles(source: str | os.PathLike | bytes, image_processor: HoVLEImageProcessor) -> torch.Tensor:
    """Load one picture and cut it into tiles.

    Args:
        source: Path of a picture file, or its bytes; what `load_picture` refuses is refused here.
        image_processor: Tells tile size and grid.

    Returns:
        The tiles in reading order, thumbnail last, uint8, shape `(N, 3, s, s)`.
    """
    return cut_tiles(torch.from_numpy(load_pixels(source)), image_processor)


def cut_tiles(pixels: torch.Tensor, image_processor: HoVLEImageProcessor) -> torch.Tensor:
    """Cut a picture of shape `(H, W, 3)`, uint8, into tiles `(N, 3, s, s)`, uint8, the thumbnail last."""
    if image_processor.resample != Image.Resampling.BICUBIC:
        raise ValueError(
            f"The image processor resizes with Pillow's filter {image_processor.resample}; training resizes with the "
            "bicubic one (3) only. Set image_processor.resample to 3."
        )
    return cut_pixels(pixels, image_processor.choose_grid(*pixels.shape[:2]), image_processor.size["height"])


def picture_key(source: str | os.PathLike | bytes) -> str:
    """Name of a picture by its content: the start of its file's SHA-256, 32 hexadecimal digits."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    return hashlib.sha256(data).hexdigest()[:32]


class PixelNormalization(nn.Module):
    """`normalize_pixels` with statistics that go along to the model's device.

    Args:
        mean: Of the red, green and blue channel; by default ImageNet's, as in `HoVLEImageProcessor`.
        std: Deviation of the same.
    """

    def __init__(
        self,
        mean: tuple[float, ...] | list[float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] | list[float] = IMAGENET_DEFAULT_STD,
    ):
        super().__init__()
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def of(cls, image_processor: HoVLEImageProcessor) -> "PixelNormalization":
        """With the statistics of an image processor."""
        return cls(image_processor.image_mean, image_processor.image_std)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Normalise tiles of shape `(N, 3, s, s)`, uint8, to float32."""
        if tiles.dtype != torch.uint8:
            raise ValueError(f"Tiles must be bytes (uint8), got {tiles.dtype}: are they normalised already?")
        return normalize_pixels(tiles, self.mean, self.std)
