"""Regions: where in a picture it is known what is shown, and the words for it.

A row of a `chat`, `llava` or `huggingface` source may carry, beside its turns,

    "regions": [{"box": [left, top, right, bottom], "text": "no smoking", "layout": "line"}, ...]

They describe the row's first picture, which is the one that distillation takes, in pixels of the picture as it is
shown, upright by its EXIF orientation. `words` lays their text over image tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from .rows import is_empty
from .skips import SkipSampleError

REGIONS = "regions"
"""Key of a row."""

LINE, NAME = "line", "name"
"""Layouts: a line of text that stands in the box; the name of what the box shows."""

KEYS = ("box", "text", "layout", "edges")

EXPECTED = (
    '{"box": [left, top, right, bottom], "text": ...} with, at will, "layout": "line" or "name" and, for lines, '
    '"edges": [...]'
)


@dataclass(frozen=True)
class Region:
    """A part of a picture and the words for it."""

    box: tuple[float, float, float, float]
    """Left, top, right and bottom in pixels."""
    text: str
    """One line of text as it stands there, or a name."""
    layout: str = LINE
    edges: tuple[float, ...] = ()
    """Of a line: where each character begins and the last one ends, in pixels from the left of the picture, one more
    than there are characters; empty where nobody knows."""

    @property
    def character_edges(self) -> tuple[float, ...]:
        """As `edges`; where nobody knows, characters are equally wide and spaces at both ends of the text take no
        room, so that a box may hold a single word of a line with the space before it."""
        if self.edges:
            return self.edges
        left, _, right, _ = self.box
        begin = len(self.text) - len(self.text.lstrip())
        count = len(self.text.strip())
        places = (min(max(place - begin, 0), count) for place in range(len(self.text) + 1))
        return tuple(left + (right - left) * place / count for place in places)


def read_regions(row: Mapping, num_pictures: int, name: str) -> tuple[Region, ...]:
    """Regions of a row that shows so many pictures; none where it has no such key.

    Raises:
        SkipSampleError: When one is not as expected, or there is no picture.
    """
    given = row.get(REGIONS)
    if is_empty(given):
        return ()
    if not num_pictures:
        raise SkipSampleError(name, "malformed", "it has regions, but no picture that they could lie in.")
    if not isinstance(given, list):
        raise SkipSampleError(name, "malformed", f"expected regions [{EXPECTED}], found {given!r:.80}.")
    regions = []
    for number, item in enumerate(given, 1):
        fault = _fault(item)
        if fault:
            raise SkipSampleError(
                name,
                "malformed",
                f"region {number} of {len(given)}: {fault}; expected {EXPECTED}, found {item!r:.120}.",
            )
        box, edges = item["box"], item.get("edges") or ()
        regions.append(Region(tuple(box), item["text"], item.get("layout") or LINE, tuple(edges)))
    return tuple(regions)


def _fault(item: Any) -> str | None:
    """What is wrong with a region of a row, None where nothing is."""
    if not isinstance(item, Mapping):
        return "it is no mapping"
    unknown = [key for key in item if key not in KEYS and not is_empty(item[key])]
    if unknown:
        return f"unknown key {unknown[0]!r:.40}"
    box, text, layout = item.get("box"), item.get("text"), item.get("layout") or LINE
    if not _are_numbers(box) or len(box) != 4:
        return "box is no list of four numbers"
    if not (box[0] < box[2] and box[1] < box[3]):
        return "box has no area: left must be less than right, top less than bottom"
    if not isinstance(text, str) or not text.strip():
        return "text is no string with a character in it"
    if layout not in (LINE, NAME):
        return f"layout {layout!r:.40} is neither {LINE} nor {NAME}"
    if len(text.splitlines()) > 1 or text.splitlines()[0] != text:
        return "text has a line break: give every line a region of its own"
    edges = item.get("edges")
    if is_empty(edges):
        return None
    if layout == NAME:
        return f"edges belong to a {LINE}"
    if not _are_numbers(edges) or len(edges) != len(text) + 1 or list(edges) != sorted(edges):
        return f"edges are no {len(text) + 1} ascending numbers, one more than its text has characters"
    return None


def _are_numbers(value: Any) -> TypeGuard[Sequence[float]]:
    return isinstance(value, Sequence) and all(
        isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item) for item in value
    )


def check_inside(regions: Sequence[Region], height: int, width: int, name: str) -> None:
    """Raise SkipSampleError where a box or an edge lies outside a picture of these sizes in pixels."""
    for number, region in enumerate(regions, 1):
        left, top, right, bottom = region.box
        across = (left, right, *region.edges)
        if min(across) < 0 or max(across) > width or top < 0 or bottom > height:
            raise SkipSampleError(
                name,
                "region outside its picture",
                f"region {number} of {len(regions)} ({region.text!r:.40}) has the box {list(region.box)}"
                + (f" and edges from {region.edges[0]:g} to {region.edges[-1]:g}" if region.edges else "")
                + f", but its picture is {width} x {height} pixels.",
            )
