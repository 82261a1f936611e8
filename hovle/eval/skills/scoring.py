"""Scores with intervals, beside what is got without looking."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...synthesis.samples import Question
from ..intervals import Units
from .bars import Bar, is_met
from .grading import Grade, grade, normal
from .items import Item

Answer = Callable[[Sequence[Item], int, str], list[str]]
"""Answers to items, each in so many tokens at most; the last argument is told beside the progress."""

LETTER_SIZES = (20, 28, 40, 65)
"""Pixels between which sizes of letters are told apart."""


@dataclass(frozen=True)
class Answered:
    """An ability with what was asked and answered."""

    bar: Bar
    items: list[Item]
    answers: list[str]
    blank_answers: list[str] | None
    """To the same questions with white pictures; None where none is shown anyway."""
    rival_answers: list[str] | None = None
    """What the bar's rival says; None where nobody asked it."""

    @property
    def grades(self) -> list[Grade]:
        """Of the answers."""
        return grades_of(self.bar, self.items, self.answers)


def grades_of(bar: Bar, items: Sequence[Item], answers: Sequence[str]) -> list[Grade]:
    """Grade answers to items."""
    return [grade(bar.metric, item.question, answer) for item, answer in zip(items, answers, strict=True)]


def units(bar: Bar, items: Sequence[Item], grades: Sequence[Grade]) -> Units:
    """Grades added up by what pictures were made from, which intervals draw as a whole."""
    strata = {name: number for number, name in enumerate(sorted({_stratum(bar, item) for item in items}))}
    sums: dict[tuple[int, str], list[float]] = {}
    for item, found in zip(items, grades, strict=True):
        key = (strata[_stratum(bar, item)], item.source)
        before = sums.setdefault(key, [0.0, 0.0])
        sums[key] = [before[0] + found.numerator, before[1] + found.denominator]
    totals = np.array(list(sums.values()))
    return Units(totals[:, :1], totals[:, 1:], np.array([stratum for stratum, _ in sums]))


def _stratum(bar: Bar, item: Item) -> str:
    return normal(item.question.answer) if bar.metric == "macro" else ""


def score(bar: Bar, items: Sequence[Item], grades: Sequence[Grade]) -> float:
    """The score alone."""
    return units(bar, items, grades).score


def result_of(found: Answered) -> dict:
    """All that is told of an ability, as plain values."""
    bar, items, grades = found.bar, found.items, found.grades
    together = units(bar, items, grades)
    measured = {
        "score": together.score,
        "interval": list(together.interval()),
        "num_items": len(items),
        "num_sources": len(together.strata),
    }
    rival_score = None
    if found.rival_answers is not None:
        rival_score = score(bar, items, grades_of(bar, items, found.rival_answers))
    bound = rival_score if bar.beats_rival else bar.bound
    result = {
        "name": bar.name,
        "title": bar.title,
        "skills": list(bar.skills),
        "metric": bar.metric,
        "bar": bound,
        "is_met": is_met(bar, bound, together.score),
        **measured,
        "majority": None if bar.metric == "blind" else majority(bar, items),
        "blank": None,
        "rival": None if rival_score is None else {"name": bar.rival, "score": rival_score},
    }
    if found.blank_answers is not None:
        answer, share = majority_answer(found.blank_answers)
        blank = score(bar, items, grades_of(bar, items, found.blank_answers))
        result["blank"] = {"score": blank, "answer": answer, "share": share}
    if any(item.facets.get("tags") for item in items):
        result["with_tags"] = sum(map(_is_tag_or_right, items, found.answers)) / len(items)
    result["by"] = {facet: split_by(bar, facet, items, grades) for facet in bar.split_by}
    return result


def majority_answer(answers: Sequence[str]) -> tuple[str, float]:
    """The most frequent answer and its share."""
    [(answer, count)] = Counter(map(normal, answers)).most_common(1)
    return answer, count / len(answers)


def majority(bar: Bar, items: Sequence[Item]) -> dict:
    """What the answer that is right most often gets; for wrong characters, the one that is expected most often."""
    answer = Counter(item.question.answer for item in items).most_common(1)[0][0]
    return {"score": score(bar, items, grades_of(bar, items, [answer] * len(items))), "answer": answer}


def _is_tag_or_right(item: Item, answer: str) -> bool:
    tags = tuple(filter(None, str(item.facets.get("tags", "")).split(", ")))
    question = Question(item.question.text, item.question.answer, item.question.kind, item.question.accepted + tags)
    return grade("exact", question, answer).is_right


def split_by(bar: Bar, facet: str, items: Sequence[Item], grades: Sequence[Grade]) -> dict[str, dict]:
    """Score and number of items for each value of a facet."""
    groups: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(_group(facet, item), []).append(place)
    return {
        value: {
            "score": score(bar, [items[place] for place in places], [grades[place] for place in places]),
            "num_items": len(places),
        }
        for value, places in sorted(groups.items())
    }


def _group(facet: str, item: Item) -> str:
    value = item.facets.get(facet, "unknown")
    if facet != "letter_size":
        return str(value)
    above = [size for size in LETTER_SIZES if float(value) >= size]
    below = [size for size in LETTER_SIZES if float(value) < size]
    return f"{above[-1] if above else 0}-{below[0] - 1} px" if below else f"{above[-1]} px and more"
