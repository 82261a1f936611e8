"""Scenes of named things on a ground: how many, what color, where, alike or not, there or not."""

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from PIL import Image

from ..colors import NAMED_COLORS, Rgb, vary
from ..encoding import to_png
from ..grounds import choose_ground, draw_ground
from ..layouts import Box, Layout, Size, Thing, on_grid, scatter
from ..samples import Question, Region, Sample
from ..scene_questions import CAPTION_PROMPTS, ask, caption
from ..skill import AssetFolders, Skill, fetched
from ..stamps import Stamp, StampBox

FAMILIES = MappingProxyType({"shapes": 0.4, "icons": 0.2, "pictograms": 0.4})
"""How often the things of a scene are shapes, icons or pictograms."""

_SIZES = ((224, 224), (336, 224), (224, 336))
_FEWEST_QUESTIONS, _MOST_QUESTIONS = 2, 6
_MOST_COUNTED, _MOST_THINGS = 9, 13
_MOST_COLORS = 5
"""In one scene: a ground must differ from all of them."""


def held_out_color(name: str) -> str:
    """The one color that things of a name have in test scenes only."""
    return tuple(NAMED_COLORS)[zlib.crc32(name.encode()) % len(NAMED_COLORS)]


@dataclass(frozen=True)
class Piece:
    """A thing that has no place yet."""

    stamp: Stamp
    color: str | None
    length: float
    """Of its longer side, in pixels."""

    @property
    def extent(self) -> Size:
        return self.stamp.extent(self.length)


@dataclass(frozen=True)
class Plan:
    """What is put into a scene and what is asked of it."""

    pieces: Sequence[Piece]
    boxes: Sequence[Box]
    target: str
    kinds: tuple[str, ...]
    """Of questions, in the order in which they are tried."""
    needed: frozenset[str]
    """Kinds of questions one of which the scene is made for."""


class Cast:
    """The names and colors one scene may have."""

    def __init__(self, stamps: StampBox, family: str, split: str, rng: random.Random):
        self._family, self._stamps, self._split, self._rng = family, stamps, split, rng
        self.names = rng.sample(stamps.names(family), len(stamps.names(family)))
        self._palette = rng.sample(sorted(NAMED_COLORS), _MOST_COLORS)

    def colors(self, name: str) -> list[str]:
        """Colors that a thing of this name may have; none where it has its own."""
        if self._family == "pictograms":
            return []
        return [color for color in self._palette if self._split == "test" or color != held_out_color(name)]

    def color(self, name: str) -> str | None:
        """One of its colors."""
        colors = self.colors(name)
        return self._rng.choice(colors) if colors else None

    def piece(self, name: str, length: float, color: str | None = None) -> Piece:
        """A thing of this name, in the color given or any that it may have."""
        stamp = self._stamps.draw(self._family, name, self._rng)
        return Piece(stamp, (color or self.color(name)) if stamp.is_tinted else None, length)


def _plan_counts(cast: Cast, size: Size, rng: random.Random) -> Plan:
    """So many of one thing among none to two others."""
    count = rng.randint(0, _MOST_COUNTED)
    num_others = rng.choice((0, 0, 1, 1, 2)) if count else rng.randint(1, 2)
    target, *others = cast.names[: num_others + 1]
    names = [target] * count
    for other in others:
        names += [other] * rng.randint(1, min(6, (_MOST_THINGS - count) // num_others))
    length = min(size) * rng.uniform(0.13, 0.24)
    spread = rng.choice((0.0, 0.0, 0.25))
    one_color = {name: cast.color(name) for name in sorted(set(names))} if rng.random() < 0.5 else {}
    pieces = [cast.piece(name, length * rng.uniform(1 - spread, 1 + spread), one_color.get(name)) for name in names]
    if rng.random() < 0.3:
        columns = rng.choice([columns for columns in (3, 4, 5) if columns * 5 >= len(pieces)])
        rows = max(-(-len(pieces) // columns), rng.randint(2, 4))
        boxes = on_grid(size, [piece.extent for piece in pieces], (columns, rows), rng)
    else:
        boxes = scatter(size, [piece.extent for piece in pieces], rng)
    rest = ["other count", "presence", "count color", "color", "more", "count all", "same kind"]
    rng.shuffle(rest)
    return Plan(pieces, boxes, target, ("count", *rest), frozenset({"count"}))


def _plan_relations(cast: Cast, size: Size, rng: random.Random) -> Plan:
    """Two to four different things of about the same size."""
    names = cast.names[: rng.choice((2, 2, 3, 3, 4))]
    length = min(size) * rng.uniform(0.18, 0.3)
    pieces = [cast.piece(name, length * rng.uniform(0.85, 1.15)) for name in names]
    extents = [piece.extent for piece in pieces]
    boxes = scatter(size, extents, rng) if rng.random() < 0.4 else on_grid(size, extents, (3, 3), rng)
    rest = ["color", "presence", "corner", "between", "count all"]
    rng.shuffle(rest)
    relations = ["where", "side", "neighbor"]
    rng.shuffle(relations)
    return Plan(pieces, boxes, names[0], (*relations, *rest), frozenset(relations))


def _plan_row(cast: Cast, size: Size, rng: random.Random) -> Plan:
    """Three or four different things in a row or a column."""
    names = cast.names[: rng.choice((3, 3, 4))]
    length = min(size) * rng.uniform(0.18, 0.28)
    pieces = [cast.piece(name, length * rng.uniform(0.9, 1.1)) for name in names]
    shape = (len(names), 1) if rng.random() < 0.5 else (1, len(names))
    boxes = _shifted(size, on_grid(size, [piece.extent for piece in pieces], shape, rng, jitter=0.04), shape, rng)
    rest = ["where", "neighbor", "side", "color", "presence"]
    rng.shuffle(rest)
    return Plan(pieces, boxes, names[0], ("between", *rest), frozenset({"between"}))


def _shifted(size: Size, boxes: Sequence[Box], shape: Size, rng: random.Random) -> list[Box]:
    """The whole row or column a random way off the middle."""
    free_before = min(box[1] if shape[1] == 1 else box[0] for box in boxes)
    free_after = min(size[1] - box[3] if shape[1] == 1 else size[0] - box[2] for box in boxes)
    shift = rng.randint(2 - free_before, free_after - 2)
    x, y = (0, shift) if shape[1] == 1 else (shift, 0)
    return [(left + x, top + y, right + x, bottom + y) for left, top, right, bottom in boxes]


def _plan_sizes(cast: Cast, size: Size, rng: random.Random) -> Plan:
    """Three to five different things, one of them far bigger or far smaller than the others, or one each."""
    names = cast.names[: rng.choice((3, 3, 4, 5))]
    middle = min(size) * rng.uniform(0.19, 0.23)
    lengths = [middle * rng.uniform(0.92, 1.08) for _ in names]
    extremes = rng.choice(("big", "small", "both"))
    if extremes != "small":
        lengths[0] = middle * rng.uniform(1.8, 2.3)
    if extremes != "big":
        lengths[1] = middle * rng.uniform(0.42, 0.55)
    pieces = [cast.piece(name, length) for name, length in zip(names, lengths, strict=True)]
    boxes = scatter(size, [piece.extent for piece in pieces], rng)
    rest = ["color", "presence", "where", "side", "count all"]
    rng.shuffle(rest)
    return Plan(pieces, boxes, names[0], ("extreme", *rest), frozenset({"biggest", "smallest"}))


def _plan_pair(cast: Cast, size: Size, rng: random.Random) -> Plan:
    """Two things that are or are not of the same kind, or of the same color."""
    first = cast.names[0]
    second = first if rng.random() < 0.5 else cast.names[1]
    length = min(size) * rng.uniform(0.22, 0.38)
    pieces = [cast.piece(first, length)]
    color = _color_beside(cast, second, pieces[0].color, rng)
    if second == first and not pieces[0].stamp.is_tinted:
        pieces.append(Piece(pieces[0].stamp, None, length * rng.uniform(0.8, 1.2)))
    else:
        pieces.append(cast.piece(second, length * rng.uniform(0.8, 1.2), color))
    extents = [piece.extent for piece in pieces]
    boxes = scatter(size, extents, rng) if rng.random() < 0.6 else on_grid(size, extents, (2, 2), rng)
    kinds = ("same kind", "same color", "where", "count", "presence", "color")
    return Plan(pieces, boxes, first, kinds, frozenset({"same kind"}))


def _color_beside(cast: Cast, name: str, color: str | None, rng: random.Random) -> str | None:
    """In half of all cases the color of the other thing, else another; held-out pairs stay out either way."""
    if color is None:
        return None
    if rng.random() < 0.55 and color in cast.colors(name):
        return color
    return rng.choice([other for other in cast.colors(name) if other != color])


_PLANNERS: Mapping[str, Callable[[Cast, Size, random.Random], Plan]] = MappingProxyType(
    {
        "counts": _plan_counts,
        "relations": _plan_relations,
        "row": _plan_row,
        "sizes": _plan_sizes,
        "pair": _plan_pair,
    }
)

PLANS = MappingProxyType({"counts": 0.4, "relations": 0.24, "row": 0.12, "sizes": 0.12, "pair": 0.12})
"""How often a scene is of each plan."""


def choose(weights: Mapping[str, float], rng: random.Random) -> str:
    """One of the names, by weight."""
    return rng.choices(tuple(weights), tuple(weights.values()))[0]


class Scenes(Skill):
    """Scenes of named things on a ground."""

    name = "scenes"
    description = "shapes, icons and pictograms on a ground: how many, what color, where, alike or not, there or not"
    revision = 2
    sizes = MappingProxyType(
        {
            "small": MappingProxyType({"train": 600, "validation": 60, "test": 120}),
            "full": MappingProxyType({"train": 20_000, "validation": 500, "test": 1_500}),
        }
    )
    held_out = ("color-of-name",)
    sources = (fetched("emoji-datasource-google"), fetched("emoji-datasource-twitter"), fetched("phosphor-icons"))

    extras = MappingProxyType({"resvg_py": "hovle[smol]"})

    def __init__(self, folders: AssetFolders):
        super().__init__(folders)
        self._stamps = StampBox(folders)

    def draw(self, index: int, split: str, seed: int) -> Sample:
        """Draw a scene and ask what its layout settles."""
        rng = self.rng(index, split, seed)
        size = rng.choices(_SIZES, (5, 1, 1))[0]
        plan_name, family = choose(PLANS, rng), choose(FAMILIES, rng)
        while True:  # most plans settle enough at once
            cast = Cast(self._stamps, family, split, rng)
            plan = _PLANNERS[plan_name](cast, size, rng)
            layout = _layout(plan, cast, size)
            questions = ask(layout, plan.kinds, rng.randint(3, _MOST_QUESTIONS), rng)
            if len(questions) >= _FEWEST_QUESTIONS and questions[0].kind in plan.needed:
                break
        rng.shuffle(questions)
        questions.append(Question(rng.choice(CAPTION_PROMPTS), caption(layout, rng), "caption"))
        image = _paint(plan, layout, rng)
        regions = tuple(Region(thing.box, thing.description) for thing in layout.things)
        source_ids = {piece.stamp.source_id for piece in plan.pieces}
        source_ids |= {
            f"color-of-name:{thing.description}"
            for thing in layout.things
            if thing.color == held_out_color(thing.name)
        }
        facets: dict[str, str | int] = {"plan": plan_name, "family": family, "things": len(layout.things)}
        return Sample(to_png(image), size, tuple(questions), regions, tuple(sorted(source_ids)), facets)


def _layout(plan: Plan, cast: Cast, size: Size) -> Layout:
    things = tuple(
        Thing(piece.stamp.name, piece.color, box) for piece, box in zip(plan.pieces, plan.boxes, strict=True)
    )
    there = {thing.name for thing in things}
    absent = [name for name in cast.names if name not in there][:6]
    return Layout(size, things, plan.target, tuple(absent))


def _paint(plan: Plan, layout: Layout, rng: random.Random) -> Image.Image:
    shared: dict[str, Rgb] = {}
    if rng.random() < 0.6:  # things of one color name are all of the same shade
        shared = {color: vary(color, rng) for color in sorted({piece.color for piece in plan.pieces if piece.color})}
    shades = [
        None if piece.color is None else shared.get(piece.color) or vary(piece.color, rng) for piece in plan.pieces
    ]
    seen = [
        piece.stamp.edge_color if shade is None else shade for piece, shade in zip(plan.pieces, shades, strict=True)
    ]
    image = draw_ground(layout.size, choose_ground(rng, seen), rng)
    for piece, shade, box in zip(plan.pieces, shades, plan.boxes, strict=True):
        drawn = piece.stamp.at_size((box[2] - box[0], box[3] - box[1]), shade)
        image.paste(drawn, box[:2], drawn)
    return image
