"""Answers that say what is expected and that a benchmark's rules take for wrong: "The answer is B", "(B)", "1,200".

Benchmarks compare answers as texts, each in its own way. Whoever reads a low score must know how much of it is form.
"""

import ast
import re
from collections.abc import Callable, Sequence
from typing import Any

INTRODUCTION = re.compile(
    r"^(?:so,?\s+|therefore,?\s+)?(?:the\s+)?(?:(?:correct|right|final|best)\s+)?"
    r"(?:(?:answer|option|choice)(?:\s+is(?:\s+option)?\b|\s*:)\s*:?\s*|option\s+(?=\(?[a-z]\b))",
    re.IGNORECASE,
)
"""What may stand before an answer."""

OPTION = re.compile(r"^[(\[*\"']*([A-Z])(?:$|[)\].:,*\"']+(?:\s|$))")
"""A letter that names an option at the beginning of an answer."""

YES_OR_NO = re.compile(r"^(yes|no)\b", re.IGNORECASE)

NUMBER = re.compile(r"[$€£]?\s*(-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d+(?:\.\d+)?)\s*%?")

SIGNS = " \t\n\"'`*()[]{}.,;:!?"
"""What may stand around an answer."""

SCORES = ("score", "correct", "true_false")
"""Where the harness's values of an answer say whether it is right."""


def unread_answers(
    samples: Sequence[dict], metrics: Sequence[str], score_alone: Callable[[Any], float | None] = lambda value: None
) -> str:
    """Say how many answers only their form makes wrong, and show one; "" where there are none.

    Args:
        samples: Questions of a benchmark as the harness gives them back.
        metrics: Keys of what it made of each answer.
        score_alone: The score of such a value where it does not say so itself; None where it has none by itself.
    """
    wrong = [
        (str(sample["resps"][0][0]), sample)
        for sample in samples
        if sample["resps"] and _is_wrong([sample[name] for name in metrics if name in sample], score_alone)
    ]
    others = [answer for answer, sample in wrong if any(says(answer, target) for target in _targets(sample))]
    if not others:
        return ""
    return (
        f"{len(others)} of {len(samples)} answers say what is expected in a form that the harness's rules do not read "
        f"and count as wrong, such as {others[0]!r:.80}"
    )


def says(answer: str, expected: str) -> bool:
    """Whether an answer says what is expected, whatever stands around it."""
    text, expected = INTRODUCTION.sub("", answer.strip().strip("*")), expected.strip()
    if re.fullmatch(r"[A-Z]", expected):
        option = OPTION.match(text)
        return option is not None and option[1] == expected
    if YES_OR_NO.fullmatch(expected):
        word = YES_OR_NO.match(text.lstrip(SIGNS))
        return word is not None and word[1].lower() == expected.lower()
    return bool(_bare(expected)) and _bare(text) == _bare(expected)


def _bare(text: str) -> str:
    """A text without signs around it; a number as a number."""
    text = text.strip(SIGNS).lower()
    number = NUMBER.fullmatch(text)
    return f"{float(number[1].replace(',', '')):g}" if number else text


def _is_wrong(values: Sequence[Any], score_alone: Callable[[Any], float | None]) -> bool:
    """Whether an answer got nothing, as far as anything says what it got."""
    scores = [_score_of(value, score_alone) for value in values]
    return bool(scores) and all(score == 0 for score in scores)


def _score_of(value: Any, score_alone: Callable[[Any], float | None]) -> float | None:
    """What an answer got."""
    if isinstance(value, int | float):
        return float(value)
    told = next((value[name] for name in SCORES if name in value), None) if isinstance(value, dict) else None
    return float(told) if isinstance(told, int | float) else score_alone(value)


def _targets(sample: dict) -> list[str]:
    """Answers that are expected; the harness writes a list as text, and TextVQA has them in its documents only."""
    target = sample["target"]
    if isinstance(listed := (sample.get("doc") or {}).get("answers"), list):
        target = listed
    if isinstance(target, str) and target.startswith("[") and target.endswith("]"):
        try:
            target = ast.literal_eval(target)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return [sample["target"]]
    return [str(item) for item in target] if isinstance(target, list | tuple) else [str(target)]
