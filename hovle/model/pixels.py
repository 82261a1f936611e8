"""Bytes of pictures, from decoded pixels to what the patch convolution takes; for training and inference alike.

Bytes are a quarter of the memory to pack, send and copy to a device, where they are normalised, and torch resizes them
several times faster than Pillow, with the same filter: tiles differ by at most two grey levels of 255, but more at the
few pixels where the filter's first pass overshoots black or white, because Pillow may start with the other axis.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:  # the model imports this file, and has no need to import an image processor with it
    from .tiling import TileGrid


def cut_pixels(pixels: torch.Tensor, grid: "TileGrid", tile_size: int) -> torch.Tensor:
    """Cut a picture of shape `(H, W, 3)`, uint8, into tiles `(N, 3, s, s)`, uint8, the thumbnail last.

    Channels stay last in memory, as decoders and resizing have them; turning them would cost a third of the time.
    """
    # Batch axis first: only then torch notices that channels are last, and takes its fast kernel.
    picture = pixels[None].permute(0, 3, 1, 2)
    tiles = grid.cut(functools.partial(_resize, picture), tile_size)
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles)


def _resize(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return nn.functional.interpolate(picture, size=(height, width), mode="bicubic", antialias=True)


def normalize_pixels(
    tiles: torch.Tensor, mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """Scale bytes to 0..1, subtract each channel's mean and divide by its deviation, wherever the tiles are.

    Gives the numbers of the image processor that has these statistics, bit for bit.

    Args:
        tiles: Shape `(N, C, s, s)`, uint8.
        mean: Of each channel.
        std: Deviation of the same.

    Returns:
        The same shape, float32.
    """
    mean, std = (
        torch.as_tensor(numbers, dtype=torch.float32, device=tiles.device).view(1, -1, 1, 1) for numbers in (mean, std)
    )
    return (tiles.float() / 255 - mean) / std
