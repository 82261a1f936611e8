"""An answer against the truth."""

import importlib
import re
from dataclasses import dataclass

from ...requirements import installed_version
from ...synthesis.samples import Question
from .bars import Metric

_ARTICLES = re.compile(r"^(?:a|an|the)\s+")

_SAYS_NOTHING_THERE = re.compile(
    r"\b(?:no (?:picture|image|photo)|(?:can(?:no|')t|unable to|not able to|don't|do not) (?:see|view|display)"
    r"|(?:without|need) (?:a|an|the) (?:picture|image|photo))\b"
)
"""What replies hold that say that there is no picture."""


@dataclass(frozen=True)
class Grade:
    """An answer's part of a score: the ratio of sums over all answers."""

    numerator: float
    denominator: float
    is_right: bool
    """For pictures of examples."""


def normal(text: str) -> str:
    """An answer without what two right ones may differ in: case, spaces, article, quotation marks, final full stop."""
    plain = " ".join(text.lower().split()).strip("\"'`").rstrip(".!").strip("\"'` ")
    return _ARTICLES.sub("", plain)


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer is the expected one or another that is accepted."""
    return normal(answer) in {normal(question.answer), *map(normal, question.accepted)}


def num_wrong_characters(expected: str, found: str) -> int:
    """Least number of characters to insert, leave out or replace; any white space counts as one space."""
    levenshtein = importlib.import_module("Levenshtein")  # an extra: whoever measures reading has it
    return levenshtein.distance(" ".join(expected.split()), " ".join(found.split()))


def grade(metric: Metric, question: Question, answer: str) -> Grade:
    """Grade one answer."""
    match metric:
        case "cer":
            length = len(" ".join(question.answer.split()))
            wrong = num_wrong_characters(question.answer, answer)
            return Grade(wrong, length, wrong == 0)
        case "false_yes":
            says_yes = normal(answer).startswith("yes")
            return Grade(says_yes, 1, not says_yes)
        case "blind":
            says_so = _SAYS_NOTHING_THERE.search(answer.lower().replace("\u2019", "'")) is not None
            return Grade(not says_so, 1, says_so)
        case _:
            right = is_right(question, answer)
            return Grade(right, 1, right)


def check_installed() -> None:
    """Raise ValueError, with what to install, where reading cannot be measured."""
    if installed_version("Levenshtein") is None:
        raise ValueError("Wrong characters are counted by Levenshtein: pip install 'hovle[smol]'")
