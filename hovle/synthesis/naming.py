"""Drawings of single named things, and what is asked of them."""

import random
import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from PIL import Image, ImageFilter

from .cutouts import show, slant, to_extent, trim, turn
from .encoding import to_jpeg, to_png
from .english import with_article
from .samples import TILE, Box, Question, Region, Sample
from .skill import Skill

NAME = (
    "What is this?",
    "What does the picture show?",
    "What is shown here?",
    "Name it.",
    "What is in the picture?",
    "What do you see?",
)
CAPTION_ASKED = (
    "Describe the picture in one sentence.",
    "Write a short caption.",
    "Give a caption for this picture.",
    "Describe what you see in a sentence.",
    "What could stand below this picture?",
)

_HARD_SHARE = 0.7
"""Of wrong names that are asked for, those of the same group."""

_HELD_OUT_ONE_IN = 20
"""Drawings kept for validation."""


@dataclass(frozen=True)
class Drawing:
    """One drawing of one thing."""

    key: str
    """Unlike that of any other drawing of a skill."""
    style: str
    """Whose drawing it is."""
    name: str
    """Plain English in small letters."""
    aliases: tuple[str, ...] = ()
    """Other names that are right."""
    category: str | None = None
    """What kind of thing it is, None where nobody says."""
    group: str = ""
    """Things of one group are easily taken for each other."""
    tags: tuple[str, ...] = field(default=(), repr=False)
    """Words that have to do with it, not all of them names."""
    is_distorted: bool = False
    """Whether it is tested on as training never shows it: from the side, blurred."""


Shown = tuple[Image.Image, Box, str | None]
"""A picture, the box around the thing, and the name of its color where it has one."""


def is_validation(key: str) -> bool:
    """Whether a drawing of the styles to learn from is kept for validation."""
    return zlib.crc32(key.encode()) % _HELD_OUT_ONE_IN == 0


def is_plural(name: str) -> bool:
    """Whether a name takes no `a`: several of a thing, by its first word or its last letters."""
    return name.split(" ")[0] in ("men", "women", "people") or (
        name.endswith("s") and not name.endswith(("ss", "us", "is"))
    )


def some(name: str) -> str:
    """The name with `a` or `an` where it takes one."""
    return name if is_plural(name) else with_article(name)


class Naming(Skill):
    """Draws one named thing and asks for its name, its kind, and whether it is another."""

    canvas = (TILE, TILE)
    noun: str
    """What its drawings are, such as `icon`."""
    scales = (0.6, 0.98)
    """Of the longer side of the thing, as a share of the canvas."""
    most_degrees = 10.0

    @cached_property
    @abstractmethod
    def drawings(self) -> Mapping[str, Sequence[Drawing]]:
        """Part -> drawings in a fixed order."""

    @abstractmethod
    def render(self, drawing: Drawing, extent: int) -> Image.Image:
        """A drawing on nothing, mode RGBA, its longer side so many pixels or fewer."""

    def limit(self, split: str) -> int | None:
        """Tests and validation show each drawing once; training shows it again in other ways."""
        return None if split == "train" else len(self.drawings[split])

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """Group -> names of the training part's drawings, and under `` all of them."""
        names: dict[str, set[str]] = {"": set()}
        for drawing in self.drawings["train"]:
            names.setdefault(drawing.group, set()).add(drawing.name)
            names[""].add(drawing.name)
        return {group: sorted(found) for group, found in names.items()}

    @cached_property
    def categories(self) -> list[str]:
        """All kinds of things."""
        return sorted({drawing.category for drawing in self.drawings["train"] if drawing.category})

    def draw(self, index: int, split: str, seed: int) -> Sample:
        """Draw the thing whose turn it is."""
        rng = self.rng(index, split, seed)
        drawings = self.drawings[split]
        drawing = drawings[self.place(index, len(drawings), split, seed)]
        image, box, ink = self.picture(drawing, rng)
        questions = self._questions(drawing, ink, rng)
        data = to_jpeg(image, rng.randint(70, 95)) if rng.random() < 0.15 else to_png(image)
        ids = (
            f"style:{drawing.style}",
            f"{'seen' if drawing.is_distorted else 'drawing'}:{drawing.key}",
            f"name:{drawing.name}",
        )
        facets: dict[str, str | int | float] = {"style": drawing.style, "group": drawing.group}
        if split == "test":
            facets |= {"tags": ", ".join(drawing.tags), "is_distorted": int(drawing.is_distorted)}
        return Sample(data, image.size, questions, (Region(box, drawing.name),), ids, facets)

    def picture(self, drawing: Drawing, rng: random.Random) -> Shown:
        """The picture, the box around the thing, and the name of its color where it has one."""
        image, box = show(self.cutout(drawing, rng), self.canvas, rng)
        return image, box, None

    def cutout(self, drawing: Drawing, rng: random.Random) -> Image.Image:
        """The thing at some size and angle."""
        extent = round(min(self.canvas) * rng.uniform(*self.scales))
        cutout = trim(self.render(drawing, extent))
        if rng.random() < 0.4:
            cutout = trim(turn(cutout, rng.uniform(-self.most_degrees, self.most_degrees)))
        return to_extent(cutout, extent)

    def _questions(self, drawing: Drawing, ink: str | None, rng: random.Random) -> tuple[Question, ...]:
        asked = [Question(self.ask_name(rng), drawing.name, "name", drawing.aliases), self._whether(drawing, rng)]
        if drawing.category is not None:
            asked.append(self.ask_category(drawing, rng))
        if ink is not None and rng.random() < 0.5:
            asked.append(Question(f"What color is the {self.noun}?", ink, "color"))
        if rng.random() < 0.3:
            asked.append(Question(rng.choice(CAPTION_ASKED), self.caption(drawing, ink, rng), "caption"))
        if rng.random() < 0.2:
            asked.append(self.ask_absent(drawing, rng))
        return tuple(asked)

    def ask_name(self, rng: random.Random) -> str:
        """A question for the name."""
        return rng.choice(NAME)

    def ask_whether(self, name: str, rng: random.Random) -> str:
        """A question whether this is the name."""
        wording = rng.choice(("Is this {}?", "Is there {} in the picture?", "Does the picture show {}?", "Is it {}?"))
        return wording.format(some(name))

    def caption(self, drawing: Drawing, ink: str | None, rng: random.Random) -> str:
        """One sentence about the picture."""
        wording = rng.choice(("A picture of {}.", "A drawing of {}.", "The picture shows {}.", "This is {}."))
        return wording.format(some(drawing.name))

    def _whether(self, drawing: Drawing, rng: random.Random) -> Question:
        if rng.random() < 0.5:
            return Question(self.ask_whether(drawing.name, rng), "yes", "yes/no")
        return Question(self.ask_whether(self.other_name(drawing, rng), rng), "no", "yes/no")

    def other_name(self, drawing: Drawing, rng: random.Random) -> str:
        """A name that this thing does not have, mostly of one much like it."""
        own = {drawing.name, *drawing.aliases, *drawing.tags}
        for _ in range(20):
            names = self._names.get(drawing.group if rng.random() < _HARD_SHARE else "", self._names[""])
            name = rng.choice(names)
            if name not in own and not _contain_each_other(name, drawing.name):
                return name
        return rng.choice([name for name in self._names[""] if name not in own])

    def ask_category(self, drawing: Drawing, rng: random.Random) -> Question:
        """A question for the kind of thing."""
        assert drawing.category is not None
        wording = rng.choice(("What kind of thing is it?", "What kind of thing is this?", "Which category is it?"))
        return Question(wording, drawing.category, "category")

    def ask_absent(self, drawing: Drawing, rng: random.Random) -> Question:
        """Something that is not there, which the answer says."""
        name = self.other_name(drawing, rng)
        wording = rng.choice(("What color is the {}?", "Where is the {}?", "How big is the {}?"))
        verb = "are" if is_plural(name) else "is"
        return Question(
            wording.format(name).replace(" is the", f" {verb} the"),
            f"There {verb} no {name} in the picture.",
            "absent",
        )


class Plates(Naming):
    """Flat things that stand in the world, such as signs and flags: seen from the side, and not always sharply."""

    slant, strongest_slant = 0.07, 0.18
    """How far corners are moved in training, and in tests of distortion."""
    things_absent = ("cake", "guitar", "flower", "cat", "chair", "banana", "book", "shoe")
    """What is on none of them."""

    def cutout(self, drawing: Drawing, rng: random.Random) -> Image.Image:
        """The thing at some size and angle, often seen a little from the side; tests of distortion much more so."""
        cutout = super().cutout(drawing, rng)
        if drawing.is_distorted or rng.random() < 0.5:
            strength = self.strongest_slant if drawing.is_distorted else self.slant
            cutout = to_extent(trim(slant(cutout, strength, rng)), max(cutout.size))
        return cutout

    def picture(self, drawing: Drawing, rng: random.Random) -> Shown:
        """The thing on a ground, when distorted as out of focus."""
        image, box, ink = super().picture(drawing, rng)
        if drawing.is_distorted:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.3)))
        return image, box, ink

    def ask_absent(self, drawing: Drawing, rng: random.Random) -> Question:
        """Something that is not there, which the answer says."""
        thing = rng.choice(self.things_absent)
        if rng.random() < 0.5:
            return Question(f"Is there {with_article(thing)} in the picture?", "no", "absent")
        return Question(f"What color is the {thing}?", f"There is no {thing} in the picture.", "absent")


def _contain_each_other(first: str, second: str) -> bool:
    """Whether one name says what the other says and more, such as `cat` and `cat face`."""
    words, others = set(first.split()), set(second.split())
    return words <= others or others <= words
