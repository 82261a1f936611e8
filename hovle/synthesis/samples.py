"""A drawn picture with its questions, and what is known of where things stand in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

TILE = 112
"""Widths and heights are multiples of it, so that small tiles cut a picture without resizing it."""

SPLITS = ("train", "validation", "test")

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the stored picture; right and bottom lie outside."""


@dataclass(frozen=True)
class Region:
    """What a part of a picture says or shows."""

    box: Box
    text: str
    layout: Literal["line", "name"] = "name"
    """`line`: a line of text as it is written; `name`: what the thing is called."""
    edges: tuple[float, ...] = ()
    """Of a line, where each character begins and the last one ends, in pixels from the left."""


@dataclass(frozen=True)
class Question:
    """A question that the picture answers, whatever else is asked of it."""

    text: str
    answer: str
    kind: str
    """What it asks for, such as `name`, `category`, `yes/no`, `caption`, `absent`."""
    accepted: tuple[str, ...] = ()
    """Other answers that are right."""


@dataclass(frozen=True)
class Sample:
    """One picture and what is asked of it."""

    image: bytes
    """PNG, JPEG or WebP."""
    size: tuple[int, int]
    """Width and height in pixels, multiples of `TILE`."""
    questions: tuple[Question, ...]
    regions: tuple[Region, ...] = ()
    source_ids: tuple[str, ...] = ()
    """What it was made from, as `kind:name`; a skill says which kinds its tests share with training."""
    facets: Mapping[str, str | int | float] = field(default_factory=lambda: MappingProxyType({}))
    """What results may be split by."""

    def check(self) -> None:
        """Raise ValueError where a skill has drawn what no sample may be."""
        width, height = self.size
        if width % TILE or height % TILE or not width or not height:
            raise ValueError(f"a picture of {width} x {height} pixels; expected multiples of {TILE}.")
        if not self.questions:
            raise ValueError("a picture without questions; expected at least one.")
        for question in self.questions:
            if not question.text.strip() or not question.answer.strip():
                raise ValueError(f"an empty question or answer: {question}.")
        texts = [question.text for question in self.questions]
        if len(set(texts)) < len(texts):
            raise ValueError(f"a question twice: {texts}.")
        for region in self.regions:
            left, top, right, bottom = region.box
            if not (0 <= left < right <= width and 0 <= top < bottom <= height and region.text.strip()):
                raise ValueError(f"the region {region} does not lie in a picture of {width} x {height} pixels.")
            if region.edges and len(region.edges) != len(region.text) + 1:
                raise ValueError(f"{len(region.edges)} edges of {region.text!r}; expected {len(region.text) + 1}.")
