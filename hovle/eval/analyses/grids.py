"""Where the image tokens of one picture lie: tiles in reading order, put back into the picture's own geometry."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """How one picture is cut. The picture is stretched to fill the tiles, so cells spread evenly over it."""

    columns: int
    """Tiles across."""
    rows: int
    """Tiles down."""
    side: int
    """Tokens along a side of a tile."""
    has_thumbnail: bool
    """Whether the whole picture follows as one more tile."""

    @classmethod
    def from_counts(cls, columns: int, rows: int, num_tiles: int, num_tokens: int) -> "TokenGrid":
        """Settle the grid from what a processor made of the picture.

        Args:
            columns: Tiles across.
            rows: Tiles down.
            num_tiles: Tiles there are, the thumbnail included.
            num_tokens: Image tokens of all of them.

        Raises:
            ValueError: When the counts do not fit together.
        """
        thumbnails = num_tiles - columns * rows
        if thumbnails not in (0, 1):
            raise ValueError(
                f"The picture has {num_tiles} tiles, but a grid of {columns} x {rows} has {columns * rows}, or one "
                "more with a thumbnail: model and processor do not belong together."
            )
        side = round((num_tokens / num_tiles) ** 0.5)
        if side * side * num_tiles != num_tokens:
            raise ValueError(f"{num_tokens} image tokens do not make {num_tiles} square tiles.")
        return cls(columns=columns, rows=rows, side=side, has_thumbnail=bool(thumbnails))

    @property
    def num_tokens(self) -> int:
        """Image tokens of the picture, the thumbnail included."""
        return (self.columns * self.rows + self.has_thumbnail) * self.side**2

    def finer(self, factor: int) -> "TokenGrid":
        """The same tiles with `factor` times as many tokens along a side: the patches of HoVLE-HD."""
        return TokenGrid(
            columns=self.columns, rows=self.rows, side=self.side * factor, has_thumbnail=self.has_thumbnail
        )

    def split(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Lay one value per image token out over the picture.

        Args:
            values: In prompt order, shape `(num_tokens,)`.

        Returns:
            Over the picture, shape `(rows * side, columns * side)`, and over the thumbnail, `(side, side)`, if there
            is one.
        """
        if values.shape != (self.num_tokens,):
            raise ValueError(
                f"Expected {self.num_tokens} values, one for each image token, got {tuple(values.shape)}."
            )
        tiles = values.view(-1, self.side, self.side)
        body = tiles[: self.columns * self.rows].view(self.rows, self.columns, self.side, self.side)
        body = body.permute(0, 2, 1, 3).reshape(self.rows * self.side, self.columns * self.side)
        return body, tiles[-1] if self.has_thumbnail else None
