"""What is asked of charts and tables."""

import random
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import TypeVar

from .chart_data import ChartData, TableData
from .english import as_sentence, listed, with_article
from .samples import Question

PARTS = MappingProxyType({"bar": "bar", "horizontal bar": "bar", "pie": "slice", "line": "point"})
"""What one value is drawn as."""

NOUNS = MappingProxyType(
    {"bar": "bar chart", "horizontal bar": "horizontal bar chart", "line": "line chart", "pie": "pie chart"}
)

WORDINGS = MappingProxyType(
    {
        "largest": (
            "Which {group} has the largest value?",
            "Which {group} has the highest value?",
            "Where is the value the largest?",
        ),
        "smallest": (
            "Which {group} has the smallest value?",
            "Which {group} has the lowest value?",
            "Where is the value the smallest?",
        ),
        "value": (
            "What is the value of {label}?",
            "What value does {label} have?",
            "How much is {label}?",
        ),
        "how many": ("How many {part}s are there?", "How many {part}s does the chart have?", "Count the {part}s."),
        "above": ("How many {part}s are above {threshold}?", "How many values are larger than {threshold}?"),
        "compare": (
            "Is {first} larger than {second}?",
            "Is the value of {first} above that of {second}?",
            "Does {first} have more than {second}?",
        ),
        "trend": (
            "Does the line go up or down?",
            "What is the trend, up or down?",
            "Do the values go up or down over time?",
        ),
        "change": (
            "Does the line rise or fall from {first} to {second}?",
            "From {first} to {second}, does it rise or fall?",
        ),
        "title": ("What is the title?", "What is the title of the chart?", "Read the title."),
        "color": ("What color is the {part} of {label}?", "Which color does {label} have?"),
        "by color": ("What does the {color} {part} stand for?", "Which {group} is {color}?"),
        "form": ("What kind of chart is this?", "Which kind of chart is it?"),
        "cell": ("What is the {column} of {label}?", "How much is {column} for {label}?", "Read {column} of {label}."),
        "cell of one": ("What is the value of {label}?", "Which number stands beside {label}?"),
        "largest in column": ("Which {group} has the largest {column}?", "Which {group} has the highest {column}?"),
        "smallest in column": ("Which {group} has the smallest {column}?", "Which {group} has the lowest {column}?"),
        "rows": ("How many rows are below the header?", "How many {group} rows does the table have?"),
        "row presence": ("Is there a row for {label}?", "Does the table have {label}?"),
        "nth row": ("Which {group} is in the {nth} row?", "What stands first in the {nth} row below the header?"),
    }
)

CAPTION_PROMPTS = ("Describe the picture.", "What does the picture show?", "Describe this chart in one sentence.")

Data = TypeVar("Data", ChartData, TableData)

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def _ask(kind: str, answer: str | int, rng: random.Random, **parts: str | int) -> Question:
    return Question(rng.choice(WORDINGS[kind]).format(**parts), str(answer), kind)


def ask_chart(data: ChartData, most: int, rng: random.Random) -> list[Question]:
    """Questions about a chart, of different kinds and with one right answer each."""
    askers: list[Callable[[ChartData, random.Random], Question | None]]
    askers = [
        _ask_extreme, _ask_extreme, _ask_value, _ask_value, _ask_number, _ask_above, _ask_compare, _ask_trend,
        _ask_change, _ask_title, _ask_color, _ask_by_color, _ask_form,
    ]  # fmt: skip
    return _first_of(askers, data, most, rng)


def ask_table(data: TableData, most: int, rng: random.Random) -> list[Question]:
    """Questions about a table, with one right answer each."""
    askers: list[Callable[[TableData, random.Random], Question | None]]
    askers = [
        _ask_cell, _ask_cell, _ask_cell, _ask_column_extreme, _ask_column_extreme, _ask_rows, _ask_row_presence,
        _ask_nth_row, _ask_table_title,
    ]  # fmt: skip
    return _first_of(askers, data, most, rng)


def _first_of(
    askers: Sequence[Callable[[Data, random.Random], Question | None]], data: Data, most: int, rng: random.Random
) -> list[Question]:
    """One question of each, in a random order, until there are enough."""
    found: dict[str, Question] = {}
    for asker in rng.sample(askers, len(askers)):
        question = asker(data, rng)
        if question is not None and len(found) < most:
            found.setdefault(question.text, question)
    return list(found.values())


def _words(data: ChartData) -> dict[str, str]:
    return {"group": data.group, "part": PARTS[data.form]}


def _ask_extreme(data: ChartData, rng: random.Random) -> Question:
    kind, pick = rng.choice((("largest", max), ("smallest", min)))
    return _ask(kind, data.labels[data.values.index(pick(data.values))], rng, **_words(data))


def _ask_value(data: ChartData, rng: random.Random) -> Question | None:
    if data.form == "pie" and not data.writes_values:
        return None
    place = rng.randrange(len(data.labels))
    unit = "%" if data.form == "pie" else ""
    return _ask("value", f"{data.values[place]}{unit}", rng, label=data.labels[place])


def _ask_number(data: ChartData, rng: random.Random) -> Question:
    return _ask("how many", len(data.labels), rng, **_words(data))


def _ask_above(data: ChartData, rng: random.Random) -> Question | None:
    """At a tick of the axis that no value comes near."""
    if data.form == "pie":
        return None
    far = [
        tick
        for tick in range(data.tick, data.top, data.tick)
        if all(abs(value - tick) >= data.tick / 2 for value in data.values)
    ]
    if not far:
        return None
    threshold = rng.choice(far)
    return _ask("above", sum(value > threshold for value in data.values), rng, threshold=threshold, **_words(data))


def _ask_compare(data: ChartData, rng: random.Random) -> Question:
    first, second = rng.sample(range(len(data.labels)), 2)
    answer = "yes" if data.values[first] > data.values[second] else "no"
    return _ask("compare", answer, rng, first=data.labels[first], second=data.labels[second])


def _ask_trend(data: ChartData, rng: random.Random) -> Question | None:
    if data.form != "line":
        return None
    if list(data.values) == sorted(data.values):
        return _ask("trend", "up", rng)
    if list(data.values) == sorted(data.values, reverse=True):
        return _ask("trend", "down", rng)
    return None


def _ask_change(data: ChartData, rng: random.Random) -> Question | None:
    if data.form != "line":
        return None
    place = rng.randrange(len(data.labels) - 1)
    answer = "rise" if data.values[place + 1] > data.values[place] else "fall"
    return _ask("change", answer, rng, first=data.labels[place], second=data.labels[place + 1])


def _ask_title(data: ChartData, rng: random.Random) -> Question:
    return _ask("title", data.title, rng)


def _ask_color(data: ChartData, rng: random.Random) -> Question | None:
    if not data.colors:
        return None
    place = rng.randrange(len(data.labels))
    return _ask("color", data.colors[place], rng, label=data.labels[place], **_words(data))


def _ask_by_color(data: ChartData, rng: random.Random) -> Question | None:
    if not data.colors:
        return None
    place = rng.randrange(len(data.labels))
    return _ask("by color", data.labels[place], rng, color=data.colors[place], **_words(data))


def _ask_form(data: ChartData, rng: random.Random) -> Question:
    return _ask("form", "bar chart" if "bar" in data.form else NOUNS[data.form], rng)


def _ask_cell(data: TableData, rng: random.Random) -> Question:
    row, column = rng.randrange(len(data.labels)), rng.randrange(len(data.columns))
    parts = {"label": data.labels[row], "column": data.columns[column]}
    return _ask("cell", data.cells[row][column], rng, **parts)


def _ask_column_extreme(data: TableData, rng: random.Random) -> Question:
    column = rng.randrange(len(data.columns))
    values = [row[column] for row in data.cells]
    kind, pick = rng.choice((("largest in column", max), ("smallest in column", min)))
    label = data.labels[values.index(pick(values))]
    return _ask(kind, label, rng, group=data.group, column=data.columns[column])


def _ask_rows(data: TableData, rng: random.Random) -> Question:
    return _ask("rows", len(data.labels), rng, group=data.group)


def _ask_row_presence(data: TableData, rng: random.Random) -> Question:
    answer = rng.choice(("yes", "no"))
    return _ask("row presence", answer, rng, label=rng.choice(data.labels if answer == "yes" else data.absent))


def _ask_nth_row(data: TableData, rng: random.Random) -> Question:
    row = rng.randrange(len(data.labels))
    return _ask("nth row", data.labels[row], rng, group=data.group, nth=_ORDINALS[row])


def _ask_table_title(data: TableData, rng: random.Random) -> Question | None:
    return _ask("title", data.title, rng) if data.title else None


def caption_chart(data: ChartData, rng: random.Random) -> Question:
    """One true sentence about a chart."""
    largest = data.labels[data.values.index(max(data.values))]
    noun = with_article(NOUNS[data.form])
    text = rng.choice(
        (
            f'{noun} called "{data.title}" with {len(data.labels)} {PARTS[data.form]}s',
            f'{noun} titled "{data.title}", where {largest} has the largest value',
            f"{noun} that shows {listed(data.labels)}",
        )
    )
    return Question(rng.choice(CAPTION_PROMPTS), as_sentence(text), "caption")


def caption_table(data: TableData, rng: random.Random) -> Question:
    """One true sentence about a table."""
    text = rng.choice(
        (
            f"a table with {len(data.labels)} rows that gives {listed(data.columns)} by {data.group}",
            f"a table of {listed(data.labels)}",
        )
    )
    return Question(rng.choice(CAPTION_PROMPTS), as_sentence(text), "caption")
