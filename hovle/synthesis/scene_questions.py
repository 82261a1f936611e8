"""What is asked of a scene: each question has one right answer, which its layout settles."""

import random
from collections.abc import Callable, Iterable
from types import MappingProxyType

from .colors import NAMED_COLORS
from .english import as_sentence, listed, plural, so_many, with_article
from .layouts import OPPOSITE, SIDES, Layout, Thing, between, extreme, only_in_corner, only_neighbor, side_of
from .samples import Question

WORDINGS = MappingProxyType(
    {
        "count": (
            "How many {many} are there?",
            "How many {many} do you see?",
            "Count the {many}.",
            "What is the number of {many}?",
        ),
        "count all": (
            "How many things are there?",
            "How many things are there in all?",
            "Count all the things.",
        ),
        "count color": (
            "How many things are {color}?",
            "How many {color} things are there?",
            "Count the {color} things.",
        ),
        "color": ("What color is the {a}?", "Which color does the {a} have?", "Name the color of the {a}."),
        "presence": (
            "Is there {an}?",
            "Do you see {an}?",
            "Is there {an} in the picture?",
            "Does the picture show {an}?",
        ),
        "side": (
            "Is the {a} {side} the {b}?",
            "Do you see the {a} {side} the {b}?",
            "Does the {a} stand {side} the {b}?",
        ),
        "where": (
            "Where is the {a}, seen from the {b}?",
            "On which side of the {b} is the {a}?",
            "Is the {a} left of, right of, above or below the {b}?",
        ),
        "neighbor": ("What is {side} the {b}?", "Which thing is {side} the {b}?", "Name the thing {side} the {b}."),
        "between": (
            "What is between the {a} and the {b}?",
            "Which thing is between the {a} and the {b}?",
            "Name the thing between the {a} and the {b}.",
        ),
        "biggest": ("What is the biggest thing?", "Which thing is the biggest?", "Which thing is the largest?"),
        "smallest": ("What is the smallest thing?", "Which thing is the smallest?", "Name the smallest thing."),
        "corner": ("What is in the {corner} corner?", "Which thing is in the {corner} corner?"),
        "same kind": ("Are the two things of the same kind?", "Do both things have the same name?"),
        "same color": ("Do the two things have the same color?", "Are both things of the same color?"),
        "all same": ("Are all things of the same kind?", "Is every thing here of the same kind?"),
        "more": ("Are there more {many} than {others}?", "Is the number of {many} larger than that of {others}?"),
    }
)
"""How each type of question is worded; the answer to `where` is one of `SIDES` without "of"."""

CAPTION_PROMPTS = ("Describe the picture.", "What does the picture show?", "Describe this picture in one sentence.")

CAPTIONS = ("{things}.", "there {are} {things}.", "a picture of {things}.", "this picture shows {things}.")


def _ask(kind: str, answer: str, rng: random.Random, **parts: str) -> Question:
    return Question(rng.choice(WORDINGS[kind]).format(**parts), answer, kind)


def _yes_or_no(rng: random.Random) -> str:
    """The answer a question is looked for, so that both come equally often."""
    return rng.choice(("yes", "no"))


def _ask_count(layout: Layout, rng: random.Random) -> Question:
    return _ask("count", str(layout.counts[layout.target]), rng, many=plural(layout.target))


def _ask_other_count(layout: Layout, rng: random.Random) -> Question | None:
    others = sorted(layout.counts.keys() - {layout.target})
    if not others:
        return None
    name = rng.choice(others)
    return _ask("count", str(layout.counts[name]), rng, many=plural(name))


def _ask_total(layout: Layout, rng: random.Random) -> Question | None:
    return _ask("count all", str(len(layout.things)), rng) if len(layout.things) <= 9 else None


def _ask_color_count(layout: Layout, rng: random.Random) -> Question | None:
    if not layout.is_tinted:
        return None
    there = [thing.color for thing in layout.things if thing.color]
    color = rng.choice(there) if rng.random() < 0.85 else rng.choice(sorted(NAMED_COLORS))
    count = there.count(color)
    return _ask("count color", str(count), rng, color=color) if count <= 9 else None


def _ask_color(layout: Layout, rng: random.Random) -> Question | None:
    candidates = [thing for thing in layout.single if thing.color]
    if not candidates:
        return None
    thing = rng.choice(candidates)
    return _ask("color", str(thing.color), rng, a=thing.name)


def _ask_presence(layout: Layout, rng: random.Random) -> Question | None:
    answer = _yes_or_no(rng)
    if answer == "yes":
        thing = rng.choice(layout.things)
        described = thing.description if rng.random() < 0.6 else thing.name
        return _ask("presence", answer, rng, an=with_article(described))
    absent = _mixed_up(layout) if layout.is_tinted and rng.random() < 0.5 else list(layout.absent)
    return _ask("presence", answer, rng, an=with_article(rng.choice(absent))) if absent else None


def _mixed_up(layout: Layout) -> list[str]:
    """Names that are there in colors that are there, but not together."""
    there = {thing.description for thing in layout.things}
    colors = sorted({thing.color for thing in layout.things if thing.color})
    return [mixed for color in colors for name in sorted(layout.counts) if (mixed := f"{color} {name}") not in there]


def _pairs(layout: Layout) -> Iterable[tuple[Thing, Thing, str]]:
    """Things with a name of their own where one is clearly on one side of the other."""
    for first in layout.single:
        for second in layout.single:
            if first is not second and (side := side_of(first, second, layout.gap)):
                yield first, second, side


def _ask_side(layout: Layout, rng: random.Random) -> Question | None:
    pairs = list(_pairs(layout))
    if not pairs:
        return None
    first, second, side = rng.choice(pairs)
    answer = _yes_or_no(rng)
    asked = side if answer == "yes" else OPPOSITE[side]
    return _ask("side", answer, rng, a=first.name, b=second.name, side=asked)


def _ask_where(layout: Layout, rng: random.Random) -> Question | None:
    wanted = rng.choice(SIDES)
    pairs = [(first, second) for first, second, side in _pairs(layout) if side == wanted]
    if not pairs:
        return None
    first, second = rng.choice(pairs)
    return _ask("where", wanted.removesuffix(" of"), rng, a=first.name, b=second.name)


def _ask_neighbor(layout: Layout, rng: random.Random) -> Question | None:
    found = [
        (thing, side, neighbor)
        for thing in layout.single
        for side in SIDES
        if (neighbor := only_neighbor(layout, thing, side))
    ]
    if not found:
        return None
    thing, side, neighbor = rng.choice(found)
    return _ask("neighbor", neighbor.name, rng, b=thing.name, side=side)


def _ask_between(layout: Layout, rng: random.Random) -> Question | None:
    single = layout.single
    found = [
        (first, second, middle)
        for first in single
        for second in single
        if first is not second and (middle := between(layout, first, second))
    ]
    if not found:
        return None
    first, second, middle = rng.choice(found)
    return _ask("between", middle.name, rng, a=first.name, b=second.name)


def _ask_extreme(layout: Layout, rng: random.Random) -> Question | None:
    kind = rng.choice(("biggest", "smallest"))
    thing = extreme(layout, kind == "biggest")
    return _ask(kind, thing.name, rng) if thing else None


def _ask_corner(layout: Layout, rng: random.Random) -> Question | None:
    corners = [f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right")]
    found = [(corner, thing) for corner in corners if (thing := only_in_corner(layout, corner))]
    if not found:
        return None
    corner, thing = rng.choice(found)
    return _ask("corner", thing.name, rng, corner=corner)


def _ask_same_kind(layout: Layout, rng: random.Random) -> Question | None:
    if len(layout.things) < 2:
        return None
    kind = "same kind" if len(layout.things) == 2 else "all same"
    return _ask(kind, "yes" if len(layout.counts) == 1 else "no", rng)


def _ask_same_color(layout: Layout, rng: random.Random) -> Question | None:
    if len(layout.things) != 2 or not layout.is_tinted:
        return None
    first, second = layout.things
    return _ask("same color", "yes" if first.color == second.color else "no", rng)


def _ask_more(layout: Layout, rng: random.Random) -> Question | None:
    answer = _yes_or_no(rng)
    counts = layout.counts
    pairs = [(a, b) for a in sorted(counts) for b in sorted(counts) if counts[a] > counts[b]]
    if not pairs:
        return None
    more, fewer = rng.choice(pairs)
    many, others = (more, fewer) if answer == "yes" else (fewer, more)
    return _ask("more", answer, rng, many=plural(many), others=plural(others))


ASKERS: MappingProxyType[str, Callable[[Layout, random.Random], Question | None]] = MappingProxyType(
    {
        "count": _ask_count,
        "other count": _ask_other_count,
        "count all": _ask_total,
        "count color": _ask_color_count,
        "color": _ask_color,
        "presence": _ask_presence,
        "side": _ask_side,
        "where": _ask_where,
        "neighbor": _ask_neighbor,
        "between": _ask_between,
        "extreme": _ask_extreme,
        "corner": _ask_corner,
        "same kind": _ask_same_kind,
        "same color": _ask_same_color,
        "more": _ask_more,
    }
)
"""What makes a question of a layout, None where the layout settles none of that sort."""


def ask(layout: Layout, kinds: Iterable[str], most: int, rng: random.Random) -> list[Question]:
    """Questions of these kinds that the layout settles, each text once, no more than `most`."""
    found: dict[str, Question] = {}
    for kind in kinds:
        question = ASKERS[kind](layout, rng)
        if question is not None and len(found) < most:
            found.setdefault(question.text, question)
    return list(found.values())


def caption(layout: Layout, rng: random.Random) -> str:
    """One true sentence: what stands there and how often, or where where there are two."""
    if len(layout.things) == 2 and len(layout.counts) == 2 and rng.random() < 0.7:
        first, second = layout.things if rng.random() < 0.5 else layout.things[::-1]
        if side := side_of(first, second, layout.gap):
            return as_sentence(f"{with_article(first.description)} {side} {with_article(second.description)}")
    groups: dict[str, int] = {}
    for thing in layout.things:
        groups[thing.description] = groups.get(thing.description, 0) + 1
    if len(groups) > 3:
        groups = dict(layout.counts)
    parts = [so_many(count, name) for name, count in groups.items()]
    are = "is" if next(iter(groups.values())) == 1 else "are"
    return as_sentence(rng.choice(CAPTIONS).removesuffix(".").format(things=listed(parts), are=are))
