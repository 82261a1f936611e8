"""The result for people: a table, and a picture of examples with right and wrong answers."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tabulate import tabulate

from ...synthesis.samples import Question, Sample
from ...synthesis.sheets import COLUMNS, draw_sheet
from .scoring import Answered

FILES = ("skills.json", "answers.jsonl", "README.md", "examples.png")
"""What the command writes."""

METRICS = {
    "exact": "right",
    "macro": "right, mean over answers",
    "cer": "wrong characters",
    "false_yes": "says yes",
    "blind": "does not say so",
}
"""How tables call what is measured."""

NUM_LINES = 5
"""Of text below an example."""

HEADS = (
    *("ability", "measured", "model", "95 % interval", "asked for"),
    *("one answer", "white pictures", "another network", "items"),
)
"""Of the table."""

RIVALS = {"neighbours": "nearest drawing", "ocr": "RapidOCR"}
"""How tables call what is asked the same."""

SHOWN = 3
"""Right answers of each ability in the picture of examples; as many wrong ones as the row has room for."""


def table(result: dict) -> str:
    """A row for each ability, in Markdown."""
    rows = [
        (
            row["title"],
            METRICS[row["metric"]],
            percent(row["score"]),
            " to ".join(map(percent, row["interval"])),
            _asked_for(row),
            _baseline(row["majority"]),
            _baseline(row["blank"]),
            "" if row["rival"] is None else f"{percent(row['rival']['score'])} ({RIVALS[row['rival']['name']]})",
            f"{row['num_items']:,}",
        )
        for row in result["abilities"]
    ]
    return tabulate(rows, HEADS, tablefmt="github", disable_numparse=True)


def percent(share: float) -> str:
    """A share, to a tenth of a percent."""
    return f"{100 * share:.1f} %"


def _asked_for(row: dict) -> str:
    if row["bar"] is None:
        return ""
    sign = "<=" if row["metric"] in ("cer", "false_yes", "blind") else ">="
    return f"{sign} {percent(row['bar'])} {'met' if row['is_met'] else 'missed'}"


def _baseline(found: dict | None) -> str:
    return "" if found is None else f"{percent(found['score'])} ({_short(found['answer'])})"


def _short(text: str) -> str:
    plain = " ".join(text.split()).replace("|", "/")
    return plain if len(plain) <= 24 else plain[:23] + "\u2026"


def page(result: dict, answered: Sequence[Answered]) -> str:
    """The table with what it means, and where answers fell short."""
    [model] = result["provenance"]["models"]
    environment = result["provenance"]["environment"]
    parts = [
        f"# What {model['name']} can do with pictures",
        f"`hovle eval skills {model['name']}`, hash {model['hash']}, {result['provenance']['date']}, "
        f"{environment['device']}, {result['dtype']}, seed {result['seed']}, greedy answers in the model's own words.",
        "`one answer`: what the answer that is right most often gets without a model; `white pictures`: the model's "
        "answers to white pictures of the same sizes, with the one it gives most often; `another network`: what it "
        "gets on the same pictures, the names of the nearest drawings to learn from in the features of "
        "EfficientNet-Lite0 or what RapidOCR reads. Pictures are drawn from what training has none of: see `hovle "
        "data build --help`.",
        table(result),
        "![Answers, right and wrong](examples.png)",
    ]
    if parted := _parts_table(result):
        parts += ["## Told apart", parted]
    if wrong := _wrong_table(answered):
        parts += ["## Some wrong answers", wrong]
    return "\n\n".join(parts) + "\n"


def _parts_table(result: dict) -> str:
    rows = [
        (row["title"], facet, value, percent(found["score"]), f"{found['num_items']:,}")
        for row in result["abilities"]
        for facet, values in row["by"].items()
        for value, found in values.items()
    ]
    rows += [
        (row["title"], "tags count too", "", percent(row["with_tags"]), f"{row['num_items']:,}")
        for row in result["abilities"]
        if "with_tags" in row
    ]
    return tabulate(rows, ("ability", "by", "", "model", "items"), tablefmt="github") if rows else ""


def _wrong_table(answered: Sequence[Answered]) -> str:
    rows = [
        (found.bar.name, _short(item.question.text), _short(item.question.answer), _short(answer))
        for found in answered
        for item, answer in _of_grade(found, is_right=False)[:SHOWN]
    ]
    return tabulate(rows, ("ability", "question", "expected", "answer"), tablefmt="github") if rows else ""


def _of_grade(found: Answered, *, is_right: bool) -> list:
    pairs = zip(found.items, found.answers, found.grades, strict=True)
    return [(item, answer) for item, answer, grade in pairs if grade.is_right == is_right]


def draw_examples(answered: Sequence[Answered]) -> Image.Image:
    """A row of pictures for each ability whose pictures are shown: right answers first, then wrong ones."""
    sheets = []
    for found in answered:
        if found.blank_answers is None:
            continue
        right, wrong = (_of_grade(found, is_right=is_right) for is_right in (True, False))
        num_right = min(len(right), max(SHOWN, COLUMNS - len(wrong)))
        chosen = [("right", *pair) for pair in right[:num_right]]
        chosen += [("wrong", *pair) for pair in wrong[: COLUMNS - num_right]]
        sheets.append(draw_sheet([_example(*one) for one in chosen], found.bar.title, NUM_LINES))
    return _stacked(sheets)


def _example(verdict: str, item, answer: str) -> Sample:
    told = f"{answer.strip() or '(nothing)'} [{verdict}]"
    if verdict == "wrong":
        told += f" expected: {item.question.answer}"
    return Sample(item.image, item.picture.size, (Question(item.question.text, told, item.question.kind),))


def _stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def write(folder: Path, result: dict, answered: Sequence[Answered]) -> None:
    """Write the files; the result last, so that it stands for whole ones."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"ability": found.bar.name, "item": item.name, "question": item.question.text, "answer": answer}
        | {"expected": item.question.answer, "accepted": list(item.question.accepted), "is_right": grade.is_right}
        for found in answered
        for item, answer, grade in zip(found.items, found.answers, found.grades, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "answers.jsonl").write_text(text, encoding="utf-8")
    if any(found.blank_answers is not None for found in answered):
        draw_examples(answered).save(folder / "examples.png")
    (folder / "README.md").write_text(page(result, answered), encoding="utf-8")
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (folder / "skills.json").write_text(text, encoding="utf-8")
