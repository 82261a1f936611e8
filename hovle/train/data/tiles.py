"""Picture files to tiles of bytes, and tiles to what the model takes.

Training cuts pictures as `HoVLEImageProcessor` does but keeps the tiles as bytes: a quarter of the memory to pack,
send between processes and copy to the device, where they are normalised. Torch resizes bytes several times faster
than Pillow, with the same filter: tiles differ from the processor's by at most two grey levels of 255, but more at the
few pixels where the filter's first pass overshoots black or white, because Pillow may start with the other axis.
"""

import functools
import hashlib
import os
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ...model.image_processing_hovle import HoVLEImageProcessor
from ...model.pictures import load_pixels


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
    """Cut a picture of shape `(H, W, 3)`, uint8, into tiles `(N, 3, s, s)`, uint8, the thumbnail last.

    Channels stay last in memory, as decoders and resizing have them; turning them would cost a third of the time.
    """
    if image_processor.resample != Image.Resampling.BICUBIC:
        raise ValueError(
            f"The image processor resizes with Pillow's filter {image_processor.resample}; training resizes with the "
            "bicubic one (3) only. Set image_processor.resample to 3."
        )
    # Batch axis first: only then torch notices that channels are last, and takes its fast kernel.
    picture = pixels[None].permute(0, 3, 1, 2)
    grid = image_processor.choose_grid(*pixels.shape[:2])
    tiles = grid.cut(functools.partial(_resize, picture), image_processor.size["height"])
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles)


def _resize(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return nn.functional.interpolate(picture, size=(height, width), mode="bicubic", antialias=True)


def picture_key(source: str | os.PathLike | bytes) -> str:
    """Name of a picture by its content: the start of its file's SHA-256, 32 hexadecimal digits."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    return hashlib.sha256(data).hexdigest()[:32]


class PixelNormalization(nn.Module):
    """Scale bytes to 0..1, subtract each channel's mean and divide by its deviation, wherever the tiles are.

    Gives the numbers of the image processor that has these statistics, bit for bit.

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
        return (tiles.float() / 255 - self.mean) / self.std
