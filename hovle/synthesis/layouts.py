"""Where things stand in a scene, and what can be said of that without doubt."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom lie outside."""

Size = tuple[int, int]
"""Width and height in pixels."""

SIDES = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

GAP_RATIO = 0.03
"""Free space between two things, as a share of the picture's shorter side."""

_AXIS_RATIO = 2.2
"""How many times farther one thing is along a side's axis than across it, to be on that side and no other."""

_LENGTH_RATIO, _AREA_RATIO = 1.3, 2.0
"""How many times larger the biggest thing is than the next."""


@dataclass(frozen=True)
class Thing:
    """One thing in a scene."""

    name: str
    color: str | None
    """None for a thing of several colors."""
    box: Box

    @property
    def description(self) -> str:
        """Its name, with its color where it has one."""
        return f"{self.color} {self.name}" if self.color else self.name

    @property
    def size(self) -> Size:
        left, top, right, bottom = self.box
        return right - left, bottom - top

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Layout:
    """A scene without its looks."""

    size: Size
    things: tuple[Thing, ...]
    target: str
    """Name of what is counted; there may be none of it."""
    absent: tuple[str, ...] = field(default=())
    """Names of the same kind of things that are not there."""

    @cached_property
    def counts(self) -> Counter[str]:
        """How many there are of each name."""
        return Counter(thing.name for thing in self.things)

    @property
    def single(self) -> list[Thing]:
        """Things that their name alone points out."""
        return [thing for thing in self.things if self.counts[thing.name] == 1]

    @property
    def is_tinted(self) -> bool:
        """Whether each thing has one color."""
        return all(thing.color is not None for thing in self.things)

    @property
    def gap(self) -> float:
        return GAP_RATIO * min(self.size)


def side_of(first: Thing, second: Thing, gap: float) -> str | None:
    """On which of `SIDES` of the second thing the first one is; None when that is not clear."""
    along_x, along_y = (a - b for a, b in zip(first.center, second.center, strict=True))
    if abs(along_x) >= _AXIS_RATIO * abs(along_y):
        left, right = (first, second) if along_x < 0 else (second, first)
        if right.box[0] - left.box[2] >= gap:
            return "left of" if along_x < 0 else "right of"
    elif abs(along_y) >= _AXIS_RATIO * abs(along_x):
        upper, lower = (first, second) if along_y < 0 else (second, first)
        if lower.box[1] - upper.box[3] >= gap:
            return "above" if along_y < 0 else "below"
    return None


def _is_beyond(thing: Thing, other: Thing, side: str) -> bool:
    """Whether any part of the thing stands out over the other on that side."""
    return {
        "left of": thing.box[0] < other.box[0],
        "right of": thing.box[2] > other.box[2],
        "above": thing.box[1] < other.box[1],
        "below": thing.box[3] > other.box[3],
    }[side]


def only_neighbor(layout: Layout, thing: Thing, side: str) -> Thing | None:
    """The one thing on a side of another, where nothing else reaches farther to that side."""
    others = [other for other in layout.things if other is not thing]
    beyond = [other for other in others if _is_beyond(other, thing, side)]
    if len(beyond) == 1 and side_of(beyond[0], thing, layout.gap) == side:
        return beyond[0]
    return None


def between(layout: Layout, first: Thing, second: Thing) -> Thing | None:
    """The one thing between two others in a row or a column; None when that is not clear."""
    side = side_of(first, second, layout.gap)
    if side is None:
        return None
    hull = tuple(pick(a, b) for pick, a, b in zip((min, min, max, max), first.box, second.box, strict=True))
    others = [thing for thing in layout.things if thing not in (first, second) and _touches(thing.box, hull)]
    if len(others) != 1:
        return None
    (middle,) = others
    is_in_line = side_of(first, middle, layout.gap) == side == side_of(middle, second, layout.gap)
    return middle if is_in_line else None


def _touches(box: Sequence[float], other: Sequence[float]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def extreme(layout: Layout, largest: bool) -> Thing | None:
    """The biggest or smallest thing where it is so by far, in length and in area; None when that is not clear."""
    if len(layout.things) < 2:
        return None
    ordered = sorted(layout.things, key=lambda thing: max(thing.size), reverse=largest)
    first, rest = ordered[0], ordered[1:]
    for other in rest:
        big, small = (first, other) if largest else (other, first)
        if max(big.size) < _LENGTH_RATIO * max(small.size):
            return None
        if big.size[0] * big.size[1] < _AREA_RATIO * small.size[0] * small.size[1]:
            return None
    return first


def corner_of(layout: Layout, thing: Thing) -> str | None:
    """The corner of the picture a thing is in, in the outer 45 % both ways; None elsewhere."""
    (width, height), (left, top, right, bottom) = layout.size, thing.box
    column = "left" if right < 0.45 * width else "right" if left > 0.55 * width else None
    row = "top" if bottom < 0.45 * height else "bottom" if top > 0.55 * height else None
    return f"{row} {column}" if row and column else None


def only_in_corner(layout: Layout, corner: str) -> Thing | None:
    """The one thing in a corner, where no other reaches into that quarter of the picture."""
    width, height = layout.size
    left, top = (0 if "left" in corner else width / 2), (0 if "top" in corner else height / 2)
    quarter = (left, top, left + width / 2, top + height / 2)
    inside = [thing for thing in layout.things if _touches(thing.box, quarter)]
    if len(inside) == 1 and corner_of(layout, inside[0]) == corner:
        return inside[0]
    return None


def scatter(size: Size, extents: Sequence[Size], rng: random.Random) -> list[Box]:
    """Place boxes anywhere in a picture, apart from each other and from its edges.

    Args:
        size: Of the picture.
        extents: Of each box; all are made smaller where they find no room.
        rng: Draws the places.

    Returns:
        A box for each extent, in the same order.
    """
    scale = 1.0
    while True:
        boxes = _try_to_scatter(size, [_scaled(extent, scale) for extent in extents], rng)
        if boxes is not None:
            return boxes
        scale *= 0.9


def _try_to_scatter(size: Size, extents: Sequence[Size], rng: random.Random) -> list[Box] | None:
    gap = GAP_RATIO * min(size) + 1
    placed: dict[int, Box] = {}
    for place in sorted(range(len(extents)), key=lambda place: -extents[place][0] * extents[place][1]):
        for _ in range(60):
            box = _drop(size, extents[place], rng)
            if box is None:
                return None
            padded = (box[0] - gap, box[1] - gap, box[2] + gap, box[3] + gap)
            if not any(_touches(padded, other) for other in placed.values()):
                placed[place] = box
                break
        else:
            return None
    return [placed[place] for place in range(len(extents))]


def _drop(size: Size, extent: Size, rng: random.Random) -> Box | None:
    margin = 2
    free_x, free_y = size[0] - extent[0] - 2 * margin, size[1] - extent[1] - 2 * margin
    if free_x < 0 or free_y < 0:
        return None
    left, top = margin + rng.randint(0, free_x), margin + rng.randint(0, free_y)
    return left, top, left + extent[0], top + extent[1]


def _scaled(extent: Size, scale: float) -> Size:
    return max(4, round(extent[0] * scale)), max(4, round(extent[1] * scale))


def on_grid(size: Size, extents: Sequence[Size], shape: Size, rng: random.Random, jitter: float = 0.12) -> list[Box]:
    """Place boxes in cells of a grid, each a little off the middle of its cell.

    Args:
        size: Of the picture.
        extents: Of each box, no more than there are cells; each is made smaller where it would not fit its cell.
        shape: Columns and rows.
        rng: Draws the cells and how far off.
        jitter: How far off at most, as a share of a cell.

    Returns:
        A box for each extent, in the same order.
    """
    columns, rows = shape
    if len(extents) > columns * rows:
        raise ValueError(f"{len(extents)} boxes do not fit {columns} x {rows} cells; expected at most one a cell.")
    width, height = size[0] / columns, size[1] / rows
    gap = GAP_RATIO * min(size) + 2
    cells = rng.sample([(column, row) for row in range(rows) for column in range(columns)], len(extents))
    boxes = []
    for (column, row), extent in zip(cells, extents, strict=True):
        room = width - gap, height - gap
        extent = _scaled(extent, min(1.0, room[0] / extent[0], room[1] / extent[1]))
        off_x, off_y = (jitter * side * rng.uniform(-1, 1) for side in (width, height))
        slack_x, slack_y = (room[0] - extent[0]) / 2, (room[1] - extent[1]) / 2
        left = (column + 0.5) * width - extent[0] / 2 + max(-slack_x, min(slack_x, off_x))
        top = (row + 0.5) * height - extent[1] / 2 + max(-slack_y, min(slack_y, off_y))
        boxes.append((round(left), round(top), round(left) + extent[0], round(top) + extent[1]))
    return boxes
