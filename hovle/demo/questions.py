"""Twelve pictures of different kinds that ship with the package, and one question about each.

They are drawn by skills of `hovle.synthesis`, each in a part that is not learned from, and chosen by eye.
`pictures/questions.json` also says what each was made from, by whom and under which license; `dev/draw_demo.py` draws
them again.
"""

from dataclasses import dataclass
from pathlib import Path

from ..files.documents import load_json
from ..synthesis.samples import Question

FOLDER = Path(__file__).parent / "pictures"
"""Of the shipped pictures."""

QUESTIONS = "questions.json"


@dataclass(frozen=True)
class Asked:
    """A shipped picture, and what is asked of it."""

    title: str
    """What kind of picture it is."""
    picture: Path
    question: Question


def load_questions() -> list[Asked]:
    """The pictures with their questions, always in the same order."""
    return [
        Asked(
            row["title"],
            FOLDER / row["file"],
            Question(row["question"], row["answer"], row["kind"], tuple(row["accepted"])),
        )
        for row in load_json(FOLDER / QUESTIONS)["pictures"]
    ]
