"""Lines of text as ink on a canvas, with the place of every line and character."""

import math
import random
from dataclasses import dataclass
from functools import cached_property

from PIL import Image, ImageChops, ImageDraw, ImageFont

from .samples import TILE, Box, Region

MOST_COLUMNS = 6
"""Tiles side by side."""

MOST_TILES = 8

_FAINTEST = 24
"""Least ink, of 255, that counts as a letter's."""


@dataclass(frozen=True)
class Line:
    """A line of text that has been drawn."""

    text: str
    mask: Image.Image
    """Its ink alone, as large as the canvas; mode L."""
    edges: tuple[tuple[float, float], ...]
    """Where each character begins and the last one ends, at half the height of small letters."""

    @cached_property
    def box(self) -> Box:
        """The smallest box around its ink."""
        box = self.mask.point(lambda ink: 255 * (ink >= _FAINTEST)).getbbox()
        assert box is not None, self.text  # fonts that lack a character are not written with
        return box

    def region(self) -> Region:
        """What a sample tells of it."""
        edges = tuple(round(min(max(x, 0), self.mask.width), 1) for x, _ in self.edges)
        return Region(self.box, self.text, "line", edges)


@dataclass(frozen=True)
class Lettering:
    """Lines of text on a canvas of their own."""

    lines: tuple[Line, ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.lines[0].mask.size

    @cached_property
    def ink(self) -> Image.Image:
        """The ink of all lines; mode L."""
        ink = self.lines[0].mask
        for line in self.lines[1:]:
            ink = ImageChops.lighter(ink, line.mask)
        return ink

    @property
    def is_cut(self) -> bool:
        """Whether ink touches the edge of the canvas."""
        width, height = self.size
        left, top, right, bottom = self.ink.getbbox() or (0, 0, 0, 0)
        return left == 0 or top == 0 or right == width or bottom == height

    def rotate(self, degrees: float, expand: bool) -> "Lettering":
        """Turned against the clock, on a canvas of the same size or on a larger one."""
        lines = []
        for line in self.lines:
            mask = line.mask.rotate(degrees, Image.Resampling.BICUBIC, expand)
            edges = tuple(_turned(point, degrees, line.mask.size, mask.size) for point in line.edges)
            lines.append(Line(line.text, mask, edges))
        return Lettering(tuple(lines))

    def turn_some(self, rng: random.Random) -> "Lettering":
        """Some of them turned a little on their canvas, unless that cuts ink off."""
        turned = self.rotate(rng.uniform(-2.5, 2.5), expand=False) if rng.random() < 0.3 else self
        return self if turned.is_cut else turned

    def resize(self, size: tuple[int, int]) -> "Lettering":
        """Stretched to another size."""
        across, down = size[0] / self.size[0], size[1] / self.size[1]
        return Lettering(
            tuple(
                Line(
                    line.text,
                    line.mask.resize(size, Image.Resampling.BICUBIC),
                    tuple((x * across, y * down) for x, y in line.edges),
                )
                for line in self.lines
            )
        )


def _turned(
    point: tuple[float, float], degrees: float, before: tuple[int, int], after: tuple[int, int]
) -> tuple[float, float]:
    """Where a point of a canvas lies after the canvas was turned about its middle."""
    turn = math.radians(degrees)
    x, y = point[0] - before[0] / 2, point[1] - before[1] / 2
    return (
        after[0] / 2 + x * math.cos(turn) + y * math.sin(turn),
        after[1] / 2 - x * math.sin(turn) + y * math.cos(turn),
    )


@dataclass(frozen=True)
class Block:
    """Lines of text in a font, not yet drawn."""

    texts: tuple[str, ...]
    font: ImageFont.FreeTypeFont
    spacing: float = 1.3
    """From one line to the next, in sizes of the font."""
    align: str = "left"
    """`left`, `center` or `right`."""

    @cached_property
    def width(self) -> int:
        """Of the ink, or of the letters' advance where that is more."""
        boxes = [self.font.getbbox(text, anchor="ls") for text in self.texts]
        advances = [self.font.getlength(text) for text in self.texts]
        return math.ceil(
            max(max(box[2], length) - min(box[0], 0) for box, length in zip(boxes, advances, strict=True))
        )

    @cached_property
    def _above(self) -> int:
        """Ink above the first baseline."""
        return math.ceil(-self.font.getbbox(self.texts[0], anchor="ls")[1])

    @cached_property
    def height(self) -> int:
        below = math.ceil(self.font.getbbox(self.texts[-1], anchor="ls")[3])
        return self._above + round((len(self.texts) - 1) * self.spacing * self.font.size) + max(0, below)

    def draw(self, size: tuple[int, int], left: int, top: int) -> Lettering:
        """Write the lines on a canvas, their common box beginning at a point."""
        lines = []
        for number, text in enumerate(self.texts):
            bearing = min(self.font.getbbox(text, anchor="ls")[0], 0)
            free = self.width - self.font.getlength(text) + bearing
            x = left - bearing + {"left": 0.0, "center": free / 2, "right": free}[self.align]
            y = top + self._above + round(number * self.spacing * self.font.size)
            x = float(round(x))
            mask = Image.new("L", size)
            ImageDraw.Draw(mask).text((x, y), text, fill=255, font=self.font, anchor="ls")
            middle = y - self.font.size * 0.25
            edges = tuple((x + self.font.getlength(text[:end]), middle) for end in range(len(text) + 1))
            lines.append(Line(text, mask, edges))
        return Lettering(tuple(lines))


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> tuple[str, ...]:
    """Break a text into lines no wider than so many pixels, where its words allow it."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return tuple(lines)


def letter_crop(block: Block, rng: random.Random) -> Lettering:
    """A line as someone would cut it out of a page, brought to the height of a tile."""
    size = block.font.size
    margin_x, margin_y = size * rng.uniform(0.1, 0.7), size * rng.uniform(0.08, 0.45)
    width, height = block.width + 2 * margin_x, block.height + 2 * margin_y
    columns = max(1, min(MOST_COLUMNS, round(width / height)))
    height = max(height, width / columns)
    width = columns * height * rng.uniform(0.92, 1.08)  # tiles stretch what does not fit them, a little
    width = max(width, block.width + 2)
    canvas = (math.ceil(width), math.ceil(height))
    lettering = block.draw(canvas, round((canvas[0] - block.width) / 2), round((canvas[1] - block.height) / 2))
    if rng.random() < 0.3:
        lettering = lettering.rotate(rng.uniform(-2.5, 2.5), expand=True)
    return lettering.resize((columns * TILE, TILE))


def letter_page(block: Block, rng: random.Random, most_rows: int) -> Lettering | None:
    """Lines somewhere on a page, in their own size; None where they would need more tiles than there may be."""
    margin = math.ceil(4 + 0.2 * block.font.size)
    columns, rows = (math.ceil((extent + 2 * margin) / TILE) for extent in (block.width, block.height))
    if columns > MOST_COLUMNS or rows > most_rows or columns * rows > MOST_TILES:
        return None
    canvas = (columns * TILE, rows * TILE)
    left = rng.randint(margin, canvas[0] - block.width - margin)
    top = rng.randint(margin, canvas[1] - block.height - margin)
    straight = block.draw(canvas, left, top)
    return straight.turn_some(rng)
