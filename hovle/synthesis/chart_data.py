"""Charts and tables as numbers, made so that every question about them has one clear answer."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .chart_words import GROUPS, MEASURES, PERIODS
from .colors import NAMED_COLORS

Form = Literal["bar", "horizontal bar", "line", "pie"]

_STEPS = (1, 2, 4, 10, 20, 40, 100, 200)
"""What half of a tick may be worth."""

_MOST_STEPS = 12
"""Half ticks of the value axis: in a plot 110 pixels high they are 9 pixels apart."""

SLICE_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray")
"""Colors of slices and of bars that each have their own."""


@dataclass(frozen=True)
class ChartData:
    """What one chart shows."""

    form: Form
    title: str
    group: str
    """What is compared: `fruit`, or a period of a line."""
    measure: str
    labels: tuple[str, ...]
    values: tuple[int, ...]
    """Of a pie, shares in percent."""
    tick: int
    """Distance of the value axis' ticks; values are multiples of half of it unless they are written."""
    writes_values: bool
    """Whether each value stands in the chart as a number."""
    colors: tuple[str, ...]
    """Color name of each label; empty where all have one that nobody asks for."""

    @property
    def top(self) -> int:
        """The value axis' last tick."""
        return (max(self.values) // self.tick + 1) * self.tick


@dataclass(frozen=True)
class TableData:
    """What one table shows: numbers of things."""

    title: str
    """Empty for none."""
    group: str
    columns: tuple[str, ...]
    """Measures, without the first column's name."""
    labels: tuple[str, ...]
    cells: tuple[tuple[int, ...], ...]
    """Row by row."""
    absent: tuple[str, ...]
    """Names of the same group that have no row."""


def vocabulary(split: str) -> str:
    """Whose words a part has: validation has those of training."""
    return "test" if split == "test" else "train"


def draw_chart_data(form: Form, split: str, rng: random.Random) -> ChartData:
    """The numbers of a chart, with clear gaps between them."""
    words = vocabulary(split)
    measure = rng.choice(MEASURES[words])
    if form == "line":
        group = rng.choice(sorted(PERIODS[words]))
        labels = _successive(PERIODS[words][group], rng.randint(4, 7), rng)
    else:
        group = rng.choice(sorted(GROUPS[words]))
        labels = tuple(rng.sample(GROUPS[words][group], rng.randint(3, 5 if form == "pie" else 6)))
    title = rng.choice((f"{measure} by {group}", f"{measure} per {group}", measure))
    writes_values = rng.random() < (0.6 if form == "pie" else 0.4 if form != "line" else 0.2)
    if form == "pie":
        tick, values = 1, _shares(len(labels), rng)
    else:
        tick, values = _heights(len(labels), form, writes_values, rng)
    has_colors = form == "pie" or (form != "line" and rng.random() < 0.35)
    colors = tuple(rng.sample(SLICE_COLORS, len(labels))) if has_colors else ()
    return ChartData(form, title, group, measure, labels, values, tick, writes_values, colors)


def _successive(names: Sequence[str], count: int, rng: random.Random) -> tuple[str, ...]:
    count = min(count, len(names))
    first = rng.randint(0, len(names) - count)
    return tuple(names[first : first + count])


def _heights(count: int, form: Form, writes_values: bool, rng: random.Random) -> tuple[int, tuple[int, ...]]:
    """A tick and distinct values on half ticks; values that are written lie a little off them."""
    step = rng.choice(_STEPS)
    lowest = 1
    steps = rng.sample(range(lowest, _MOST_STEPS + 1), count)
    if form == "line" and rng.random() < 0.5:
        steps = sorted(steps, reverse=rng.random() < 0.5)
    values = [height * step for height in steps]
    if writes_values and step >= 4:
        values = [value + rng.randint(-step // 4, step // 4) for value in values]
    return 2 * step, tuple(values)


def _shares(count: int, rng: random.Random) -> tuple[int, ...]:
    """Shares of 100 that differ by 5 or more, none below 6."""
    while True:
        cuts = sorted(rng.sample(range(6, 95), count - 1))
        shares = [end - start for start, end in zip([0, *cuts], [*cuts, 100], strict=True)]
        ordered = sorted(shares)
        gaps = [high - low for low, high in itertools.pairwise(ordered)]
        if ordered[0] >= 6 and min(gaps) >= 5:
            return tuple(shares)


def draw_table_data(split: str, rng: random.Random) -> TableData:
    """The numbers of a table; no column has one twice."""
    words = vocabulary(split)
    group = rng.choice(sorted(GROUPS[words]))
    names = rng.sample(GROUPS[words][group], len(GROUPS[words][group]))
    num_rows = rng.randint(2, min(6, len(names) - 1))
    labels, absent = tuple(names[:num_rows]), tuple(names[num_rows:])
    columns = tuple(rng.sample(MEASURES[words], rng.randint(1, 3)))
    top = rng.choice((20, 100, 100, 500))
    by_column = [rng.sample(range(1, top), len(labels)) for _ in columns]
    title = rng.choice(("", f"{group.capitalize()} table", f"All {columns[0].lower()}"))
    return TableData(title, group, columns, labels, tuple(zip(*by_column, strict=True)), absent)


def named(colors: Sequence[str]) -> list[tuple[int, int, int]]:
    """Values of named colors, for renderers."""
    return [NAMED_COLORS[color] for color in colors]
