"""Plain shapes of which everybody knows the name, as masks to be filled with a color."""

import math
from collections.abc import Callable, Sequence
from types import MappingProxyType

from PIL import Image, ImageDraw

Point = tuple[float, float]

_SIZE = 512
"""Pixels of a mask's longer side; what is drawn is smaller."""


def _star() -> list[Point]:
    turns = [math.pi * (step / 5 - 0.5) for step in range(10)]
    radii = [1.0 if step % 2 == 0 else 0.42 for step in range(10)]
    return [(radius * math.cos(turn), radius * math.sin(turn)) for radius, turn in zip(radii, turns, strict=True)]


def _heart() -> list[Point]:
    turns = [2 * math.pi * step / 120 for step in range(120)]
    return [
        (
            16 * math.sin(turn) ** 3,
            -(13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)),
        )
        for turn in turns
    ]


def _polygon(points: Sequence[Point]) -> Callable[[ImageDraw.ImageDraw], None]:
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    top, bottom = min(y for _, y in points), max(y for _, y in points)
    scale = (_SIZE - 2) / max(right - left, bottom - top)
    moved = [((x - left) * scale + 1, (y - top) * scale + 1) for x, y in points]
    return lambda draw: draw.polygon(moved, fill=255)


def _ring(draw: ImageDraw.ImageDraw) -> None:
    draw.ellipse((1, 1, _SIZE - 2, _SIZE - 2), fill=255)
    inset = _SIZE * 0.24
    draw.ellipse((inset, inset, _SIZE - inset, _SIZE - inset), fill=0)


_SQUARE = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
_THICK, _LONG = 0.36, 1.0
_PLUS = [
    (-_THICK, -_LONG), (_THICK, -_LONG), (_THICK, -_THICK), (_LONG, -_THICK), (_LONG, _THICK), (_THICK, _THICK),
    (_THICK, _LONG), (-_THICK, _LONG), (-_THICK, _THICK), (-_LONG, _THICK), (-_LONG, -_THICK), (-_THICK, -_THICK),
]  # fmt: skip

_DRAWN = MappingProxyType(
    {
        "circle": lambda draw: draw.ellipse((1, 1, _SIZE - 2, _SIZE - 2), fill=255),
        "square": _polygon(_SQUARE),
        "triangle": _polygon([(0, -1), (1.1, 0.9), (-1.1, 0.9)]),
        "star": _polygon(_star()),
        "heart": _polygon(_heart()),
        "diamond": _polygon([(0, -1.3), (0.9, 0), (0, 1.3), (-0.9, 0)]),
        "cross": _polygon(_PLUS),
        "ring": _ring,
        "arrow": _polygon([(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)]),
    }
)

SHAPE_NAMES = tuple(_DRAWN)


def draw_shape(name: str) -> Image.Image:
    """The shape of this name, white on black, cropped to itself; mode L."""
    mask = Image.new("L", (_SIZE, _SIZE))
    _DRAWN[name](ImageDraw.Draw(mask))
    return mask.crop(mask.getbbox())
