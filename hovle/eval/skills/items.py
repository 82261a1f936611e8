"""Held-out pictures with one question each, drawn here."""

import dataclasses
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image
from tqdm.auto import tqdm

from ...assets import easy_vqa
from ...assets.vqa_questions import load_questions
from ...synthesis.registry import open_skill
from ...synthesis.samples import Question, Sample
from ...synthesis.skill import AssetFolders, Skill
from .bars import EASY_VQA, Bar

MOST_DRAWN_FOR_ONE = 60
"""Pictures drawn for each item at most: some questions are asked of few of them."""


@dataclass(frozen=True)
class Item:
    """A question about a held-out picture."""

    name: str
    """Skill, number of the picture, number of the question."""
    question: Question
    image: bytes
    source: str
    """What the picture was made from; items of one source are drawn together when intervals are made."""
    facets: dict[str, str | int | float] = field(default_factory=dict)

    @property
    def picture(self) -> Image.Image:
        """The picture as the processor takes it."""
        return picture_of(self.image)


def picture_of(image: bytes) -> Image.Image:
    """A picture from its file."""
    return Image.open(io.BytesIO(image)).convert("RGB")


class Drawer:
    """Draws items of skills, which are opened once.

    Args:
        folders: Where their assets are.
        seed: Of all that is drawn.
    """

    def __init__(self, folders: AssetFolders, seed: int):
        self.folders, self.seed = folders, seed
        self._opened: dict[str, Skill] = {}

    def items(self, bar: Bar, count: int | None) -> list[Item]:
        """Draw so many items of an ability, as many of each of its skills; None: 500, or all that a test set has.

        Raises:
            ValueError: Where pictures with such questions hardly come.
        """
        if bar.skills == (EASY_VQA,):
            return easy_vqa_items(count, self.seed)
        total = 500 if count is None else count
        shares = [total // len(bar.skills) + (place < total % len(bar.skills)) for place in range(len(bar.skills))]
        found: list[Item] = []
        with tqdm(total=total, desc=f"drawing {bar.name}", unit=" pictures", disable=None) as progress:
            for name, share in zip(bar.skills, shares, strict=True):
                of_skill = self._items_of(bar, name, share)
                for item in of_skill:
                    found.append(item)
                    progress.update()
        return found

    def skill(self, name: str) -> Skill:
        """A skill, the same one whenever it is asked for."""
        if name not in self._opened:
            self._opened[name] = open_skill(name, self.folders)
        return self._opened[name]

    def _items_of(self, bar: Bar, name: str, count: int) -> Iterator[Item]:
        """Questions of one skill, one of each picture that has any."""
        skill, num_found = self.skill(name), 0
        for index in range(MOST_DRAWN_FOR_ONE * count):
            if num_found == count:
                return
            sample = skill.draw(index, "test", self.seed)
            asked = [place for place, question in enumerate(sample.questions) if bar.wanted(sample, question)]
            if asked:
                num_found += 1
                place = random.Random(f"{self.seed}/{bar.name}/{name}/{index}").choice(asked)
                yield to_item(sample, name, index, place)
        if num_found < count:
            raise ValueError(
                f"{bar.name}: only {num_found} of {MOST_DRAWN_FOR_ONE * count} pictures of the skill {name} have such "
                f"a question; expected {count}. This is a fault of hovle's."
            )


def to_item(sample: Sample, skill: str, index: int, place: int) -> Item:
    """One question of a sample."""
    name = f"{skill}/{index:07d}/{place}"
    drawn = (source for source in sample.source_ids if source.startswith(("drawing:", "seen:", "view:")))
    return Item(name, sample.questions[place], sample.image, next(drawn, name), dict(sample.facets))


def easy_vqa_items(count: int | None, seed: int) -> list[Item]:
    """Questions of the test split as they come: all, or so many of them in a random order."""
    questions = load_questions(easy_vqa() / "test")
    places = list(range(len(questions)))
    if count is not None:
        places = sorted(random.Random(seed).sample(places, min(count, len(places))))
    return [
        Item(
            f"{EASY_VQA}/{place:07d}/0",
            Question(questions[place].text, questions[place].answer, _kind(questions[place].text)),
            questions[place].picture.read_bytes(),
            questions[place].picture.name,
        )
        for place in places
    ]


def _kind(text: str) -> str:
    first = text.split(maxsplit=1)[0].lower()
    return "yes/no" if first in ("is", "does", "are") else "shape" if "shape" in text else "color"


def without_picture(items: list[Item]) -> list[Item]:
    """The same questions with white pictures of the same sizes."""
    return [dataclasses.replace(item, image=_white(item.picture.size)) for item in items]


def _white(size: tuple[int, int]) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", size, "white").save(written, "PNG")
    return written.getvalue()
