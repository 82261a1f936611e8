"""The questions of easy-VQA, and how they are drawn so that wording alone does not tell the answer."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.documents import load_json


@dataclass(frozen=True)
class Question:
    """One question about one picture."""

    text: str
    answer: str
    """The expected answer, compared as a whole."""
    picture: Any
    """Anything the processor reads as a picture: a path, a PIL image, an array."""


def load_questions(folder: Path) -> list[Question]:
    """Read one easy-VQA split: `questions.json` beside `images/`."""
    rows = load_json(folder / "questions.json")
    return [Question(question, answer, folder / "images" / f"{image}.png") for question, answer, image in rows]


def wording_weights(questions: Sequence[Question]) -> list[float]:
    """For each question, how little its wording tells the answer: 1 where always the same is right, else more.

    Drawn with these weights, the answers to a wording come nearly equally often while there are plenty of each.
    """
    wordings = Counter(question.text for question in questions)
    answered = Counter((question.text, question.answer) for question in questions)
    return [wordings[item.text] / answered[item.text, item.answer] for item in questions]


def describe_wording(train: Sequence[Question], test: Sequence[Question]) -> dict[str, Any]:
    """How much of a data set can be answered without its pictures.

    Args:
        train: Questions the answers may be learned from.
        test: Questions that are answered.

    Returns:
        Counts of questions and pictures; `yes_no_share`, of the test questions whose answer is yes or no; and
        `guessed_share`, of those that get their right answer when each wording gets the one it has most often in
        training.
    """
    answers: dict[str, Counter] = {}
    for question in train:
        answers.setdefault(question.text, Counter())[question.answer] += 1
    usual = {text: counts.most_common(1)[0][0] for text, counts in answers.items()}
    splits = {"train": train, "test": test}
    counts = {f"{name}_questions": len(questions) for name, questions in splits.items()}
    counts |= {f"{name}_pictures": len({item.picture for item in questions}) for name, questions in splits.items()}
    return {
        **counts,
        "yes_no_share": sum(question.answer in ("yes", "no") for question in test) / len(test),
        "guessed_share": sum(usual.get(question.text) == question.answer for question in test) / len(test),
    }


def draw_weighted(weights: Sequence[float], count: int, seed: int) -> list[int]:
    """Choose so many places by weight, or all if there are fewer, in order (Efraimidis and Spirakis, 2006)."""
    generator = random.Random(seed)
    keys = [generator.random() ** (1 / weight) for weight in weights]
    return sorted(sorted(range(len(keys)), key=lambda place: -keys[place])[:count])


def draw_questions(folder: Path, count: int, *, balanced: bool, seed: int = 0) -> list[Question]:
    """Draw so many questions of a split, the same ones every time.

    Args:
        folder: The split.
        count: How many.
        balanced: Draw by `wording_weights` instead of evenly.
        seed: Another one gives other questions.
    """
    questions = load_questions(folder)
    if not 1 <= count <= len(questions):
        raise ValueError(f"Between 1 and {len(questions)} questions can be drawn from {folder.name}, not {count}.")
    weights = wording_weights(questions) if balanced else [1.0] * len(questions)
    return [questions[place] for place in draw_weighted(weights, count, seed)]
