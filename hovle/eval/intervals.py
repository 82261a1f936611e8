"""Scores as sums over independent parts, and how far chance in drawing the questions may have moved them.

A benchmark's score is a combination of ratios, each a sum over clusters divided by another sum over them. Clusters are
what was drawn independently: a question, or all questions about one picture where they are scored together. From the
harness's per-document results this module makes the score anew, checks it against the harness's own, and gives a 95 %
interval: Wilson's for a share of right answers, else the percentile bootstrap over clusters with a fixed seed.
"""

import contextlib
import io
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Z = 1.959963984540054
"""Standard deviations of a normal variable that hold 95 % of it."""

NUM_DRAWS = 2000
"""Bootstrap samples."""


@dataclass(frozen=True)
class Units:
    """What a score is made of: for each of C clusters, what it adds to numerator and denominator of P ratios."""

    numerators: np.ndarray
    """Shape `(C, P)`."""
    denominators: np.ndarray
    """Shape `(C, P)`."""
    strata: np.ndarray
    """Shape `(C,)`: numbers of the groups that are scored apart, from 0."""
    combine: str = "mean"
    """How ratios of all strata make the score: `mean` or `sum`."""
    harness_factor: float = 1.0
    """The harness's figure divided by `score`."""
    harness_rounding: float = 0.0
    """By how much the harness rounds its figure at most."""

    @property
    def score(self) -> float:
        """The score, a share of 1 for all benchmarks but those that add points."""
        return float(self._combined(np.ones((1, len(self.strata))))[0])

    def _combined(self, weights: np.ndarray) -> np.ndarray:
        """Scores, shape `(draws,)`, when each cluster counts so often, shape `(draws, C)`."""
        ratios = []
        for stratum in range(self.strata.max() + 1):
            mask = self.strata == stratum
            numerator = weights[:, mask] @ self.numerators[mask]
            denominator = weights[:, mask] @ self.denominators[mask]
            ratios.append(np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0))
        together = np.concatenate(ratios, axis=1)  # (draws, strata x P)
        return together.sum(axis=1) if self.combine == "sum" else together.mean(axis=1)

    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the score, in its unit."""
        if self._is_share():
            return wilson(float(self.numerators.sum()), len(self.strata))
        generator = np.random.default_rng(0)
        scores = [self._combined(self._drawn(generator, 50)) for _ in range(NUM_DRAWS // 50)]
        low, high = np.percentile(np.concatenate(scores), [2.5, 97.5])
        return float(low), float(high)

    def _is_share(self) -> bool:
        is_single = self.numerators.shape[1] == 1 and self.strata.max() == 0
        return bool(is_single and (self.denominators == 1).all() and np.isin(self.numerators, (0, 1)).all())

    def _drawn(self, generator: np.random.Generator, num_draws: int) -> np.ndarray:
        """How often each cluster is drawn, within its stratum, shape `(draws, C)`."""
        weights = np.zeros((num_draws, len(self.strata)))
        for stratum in range(self.strata.max() + 1):
            mask = self.strata == stratum
            size = int(mask.sum())
            weights[:, mask] = generator.multinomial(size, [1 / size] * size, size=num_draws)
        return weights


def wilson(num_right: float, num_asked: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; unlike the bootstrap's it is right for 0 and for all, too."""
    share = num_right / num_asked
    middle = share + Z**2 / (2 * num_asked)
    half = Z * math.sqrt(share * (1 - share) / num_asked + Z**2 / (4 * num_asked**2))
    low, high = (middle - half) / (1 + Z**2 / num_asked), (middle + half) / (1 + Z**2 / num_asked)
    return max(low, 0.0), min(high, 1.0)


Aggregate = Callable[[list], float]


def _units(
    parts: Iterable[tuple[Sequence[float], Sequence[float]]], strata: Sequence[Hashable] | None = None, **fields
) -> Units:
    numerators, denominators = zip(*parts, strict=True)
    names = list(strata) if strata is not None else [0] * len(numerators)
    number_of = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return Units(
        np.array(numerators, dtype=float),
        np.array(denominators, dtype=float),
        np.array([number_of[name] for name in names]),
        **fields,
    )


def _grouped(values: Sequence[dict], key: Callable[[dict], Any]) -> dict[Any, list[dict]]:
    groups: dict[Any, list[dict]] = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    return groups


def _number(value: Any, aggregate: Aggregate) -> float:
    """Score of one document: the value itself, its `score`, or what the harness makes of it alone."""
    if isinstance(value, int | float):
        return float(value)
    if "score" in value:
        return float(value["score"])
    with contextlib.redirect_stdout(io.StringIO()):  # some aggregations print a table
        return float(aggregate([value]))


def documents(values: Sequence[Any], aggregate: Aggregate, harness_factor: float = 1.0) -> Units:
    """A mean over documents."""
    return _units((([_number(value, aggregate)], [1]) for value in values), harness_factor=harness_factor)


def percent(values: Sequence[Any], aggregate: Aggregate) -> Units:
    """A mean over documents that the harness gives in percent."""
    return documents(values, aggregate, harness_factor=100)


def true_false(values: Sequence[dict], aggregate: Aggregate) -> Units:
    """A share of documents found true, in percent with two decimals (MathVista with a judge)."""
    units = documents([int(value["true_false"]) for value in values], aggregate, harness_factor=100)
    return replace(units, harness_rounding=0.005)


def ocrbench(values: Sequence[dict], aggregate: Aggregate) -> Units:
    """A mean over documents; the harness divides by 1000 however many were asked."""
    return documents(values, aggregate, harness_factor=len(values) / 1000)


def f1(values: Sequence[dict], _: Aggregate) -> Units:
    """F1 of answering yes (POPE), counted as the harness does: what is neither yes nor no is no miss."""

    def parts(value: dict) -> tuple[list[int], list[int]]:
        called, is_yes = value["prediction"] == "yes", value["ground_truth"] == "yes"
        is_missed = is_yes and value["prediction"] == "no"
        return [2 * (called and is_yes)], [called + (called and is_yes) + is_missed]

    return _units(map(parts, values))


def unread_yes_no(values: Sequence[dict]) -> str:
    """How many answers POPE's F1 takes for neither yes nor no, a "Yes." with its full stop among them; "" for none."""
    others = [value["prediction"] for value in values if value["prediction"] not in ("yes", "no")]
    if not others:
        return ""
    share = f"{len(others)} of {len(values)} answers"
    return f'{share} are neither "yes" nor "no" alone and count neither as found nor as missed, such as {others[0]!r}'


def mmstar(values: Sequence[dict], _: Aggregate) -> Units:
    """A mean over categories of the means over their documents."""
    return _units((([value["score"]], [1]) for value in values), [value["l2_category"] for value in values])


def mme(values: Sequence[dict], _: Aggregate) -> Units:
    """Points: over categories, the sum of accuracy and of the share of pictures with both questions right, in percent.

    Raises:
        ValueError: When a picture has not exactly two questions, which an odd --limit brings about.
    """
    pictures = _grouped(values, lambda value: (value["category"], value["question_id"]))
    if odd := [key for key, pair in pictures.items() if len(pair) != 2]:
        raise ValueError(f"MME asks two questions about each picture, but {odd[0][1]} has another number.")
    points = [
        100 * (sum(each["score"] for each in pair) / 2 + all(each["score"] for each in pair))
        for pair in pictures.values()
    ]
    return _units((([point], [1]) for point in points), [category for category, _ in pictures], combine="sum")


def mmbench(values: Sequence[dict], aggregate: Aggregate) -> Units:
    """A share of questions answered right however their options are turned around; the harness reads the options."""
    # The aggregation itself would write a file for every question.
    evaluator = aggregate.__globals__["mmbench_evaluator"]  # type: ignore[attr-defined]
    questions = _grouped(values, lambda value: int(value["index"]) % 1_000_000)
    whole = [rows for rows in questions.values() if any(int(row["index"]) < 1_000_000 for row in rows)]
    with contextlib.redirect_stdout(io.StringIO()):
        hits = [float(evaluator.eval_result(rows, eval_method="static")[0]) for rows in whole]
    return _units((([hit], [1]) for hit in hits), harness_factor=100)


def hallusion(values: Sequence[dict], _: Aggregate) -> Units:
    """The mean of three shares: right answers, questions right on all pictures, pictures with all right."""
    sets = _grouped(values, lambda value: (value["category"], value["subcategory"], value["set_id"]))

    def parts(rows: list[dict]) -> tuple[list[float], list[float]]:
        questions = _grouped(rows, lambda row: row["question_id"]).values()
        pictures = _grouped(rows, lambda row: row["figure_id"]).values()
        groups: tuple[Iterable[list[dict]], ...] = ([[row] for row in rows], questions, pictures)
        right = [sum(all(row["correct"] for row in group) for group in each) for each in groups]
        return [float(count) for count in right], [float(len(list(each))) for each in groups]

    return _units(map(parts, sets.values()))


READINGS: dict[str, Callable[[Sequence[Any], Aggregate], Units]] = {
    reading.__name__: reading
    for reading in (documents, percent, true_false, ocrbench, f1, mmstar, mme, mmbench, hallusion)
}
"""Values of `units` in suites.yaml; `none` stands for scores without an interval."""

UNREAD: dict[str, Callable[[Sequence[Any]], str]] = {"f1": unread_yes_no}
"""For `units` that pass over answers they cannot read: what to say about those, or ""."""
