"""Cut a picture into square tiles, for inference, training and drawings alike: grid, canvas, tiles, thumbnail."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.utils import logging

logger = logging.get_logger(__name__)

SQUEEZED = 0.25
"""A picture of which less than this part of its height or width is left has lost its small print."""


class TileGrid(NamedTuple):
    """How many tiles go across and down; where that is more than one, the whole picture follows as the thumbnail."""

    columns: int
    rows: int

    @classmethod
    def closest(cls, height: int, width: int, tile_size: int, min_tiles: int, max_tiles: int) -> "TileGrid":
        """The grid of `min_tiles` to `max_tiles` whose aspect ratio is closest to the picture's; all sizes in pixels.

        One tile at most is one tile, whatever the least is.
        """
        if max_tiles == 1:
            return cls(1, 1)
        return cls(*get_optimal_tiled_canvas((height, width), (tile_size, tile_size), min_tiles, max_tiles))

    @property
    def has_thumbnail(self) -> bool:
        """Whether the whole picture follows as one more tile."""
        return self.columns * self.rows > 1

    @property
    def num_tiles(self) -> int:
        """Tiles, the thumbnail included."""
        return self.columns * self.rows + self.has_thumbnail

    def shares(self, height: int, width: int, tile_size: int) -> tuple[float, float]:
        """The part of a picture's height and width in pixels that is left on the canvas, 1 at most."""
        return min(1.0, self.rows * tile_size / height), min(1.0, self.columns * tile_size / width)

    def warn_if_squeezing(self, height: int, width: int, tile_size: int) -> None:
        """Say once that small print is lost where it is."""
        if min(self.shares(height, width, tile_size)) < SQUEEZED:
            logger.warning_once(
                "A picture is squeezed to less than a quarter of its height or width, so small print in it is lost: "
                "give it more tiles (max_tiles), or cut it into several pictures. `hovle tiles PICTURE` shows how "
                "pictures are cut. This is said once."
            )

    def boxes(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """Left, top, right and bottom of each tile on a canvas of this size, in reading order."""
        across = [round(width * column / self.columns) for column in range(self.columns + 1)]
        down = [round(height * row / self.rows) for row in range(self.rows + 1)]
        return [
            (across[column], down[row], across[column + 1], down[row + 1])
            for row in range(self.rows)
            for column in range(self.columns)
        ]

    def cut(self, resize: Callable[[int, int], Any], tile_size: int) -> list[Any]:
        """Tiles of a picture in reading order, the thumbnail last.

        Args:
            resize: Gives the picture at a height and width as an array or tensor of shape `(..., height, width)`. It
                is all in which inference and training differ: Pillow's filter, which the released model saw, and
                torch's, which is faster.
            tile_size: Side of a tile in pixels.
        """
        height, width = self.rows * tile_size, self.columns * tile_size
        canvas = resize(height, width)
        tiles = [canvas[..., top:bottom, left:right] for left, top, right, bottom in self.boxes(height, width)]
        return [*tiles, resize(tile_size, tile_size)] if self.has_thumbnail else tiles

    def token_sheets(self, side: int) -> list[np.ndarray]:
        """Where the tokens of a picture lie in it, as the cutter itself cuts them.

        Args:
            side: Tokens along one side of a tile.

        Returns:
            Numbers of the tokens in their order, tile by tile: on the canvas, shape `(rows * side, columns * side)`,
            and on the thumbnail where there is one, `(side, side)`. Each shows the whole picture evenly stretched.
        """
        sheets: list[np.ndarray] = []

        def numbered(height: int, width: int) -> np.ndarray:
            first = sum(sheet.size for sheet in sheets)
            sheets.append(np.arange(first, first + height * width).reshape(height, width))
            return sheets[-1]

        places = np.concatenate([tile.ravel() for tile in self.cut(numbered, side)])
        numbers = np.argsort(places)  # token at each place, where `places` has the place of each token
        return [numbers[sheet] for sheet in sheets]
