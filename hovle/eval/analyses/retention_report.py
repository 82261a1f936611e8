"""The result of `hovle eval retention` as tables and a chart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .drawing import FONT_SIZE, add_caption, save

FORMAT = 2
"""Of the result file. 1, with one text and no answers, is still read."""

CAPTION = (
    "Perplexity: exp of the mean nats per token of held-out text without pictures; lower is better. Accuracy: share "
    "of items whose right ending has the highest log-likelihood; thin lines are 95 % intervals (Wilson), black dashes "
    "chance. Numbers on the bars of perplexity are ratios to the bare language model."
)


def read_result(result: Any) -> dict:
    """A result of any format that can be drawn, in today's.

    Raises:
        ValueError: For what is no result of the command, or one of a later format.
    """
    if not isinstance(result, dict) or not isinstance(result.get("models"), list) or not result["models"]:
        raise ValueError("this is no result of `hovle eval retention`: it lists no models.")
    if result.get("format", 1) == 1:
        return _of_format_1(result)
    if result["format"] != FORMAT:
        raise ValueError(
            f"the result has format {result['format']}; this version of hovle reads up to {FORMAT}: run `hovle eval "
            "retention` again, or use the hovle that wrote it."
        )
    return result


def _of_format_1(result: dict) -> dict:
    """One text only, whose perplexity stood beside the tasks."""
    text = result["text"]
    facts = {"source": text["source"], "num_tokens": text["num_tokens"], "window": text["window"]}
    bare = result["models"][0]["perplexity"]
    models = [
        {**row, "texts": {"text": {"perplexity": row["perplexity"], "ratio": row["perplexity"] / bare}}}
        for row in result["models"]
    ]
    return {**result, "format": FORMAT, "texts": {"text": facts}, "models": models}


def table(result: dict) -> str:
    """One row per model, in Markdown; a task in which the bare model is not above chance is marked."""
    result = read_result(result)
    bare = result["models"][0]
    heads = [
        "model",
        *(f"perplexity, {name}: {Path(text['source']).name} (ratio)" for name, text in result["texts"].items()),
    ]
    for task, entry in bare.get("tasks", {}).items():
        note = "" if entry["is_above_chance"] else "; bare model not above it"
        heads.append(f"{task} (chance {entry['chance']:.0%}{note})")
    if bare.get("tasks"):
        heads.append("mean of the tasks")
    if "own_answers" in bare:
        heads.append("-log p of the bare model's answers, of its own")
    lines = [heads, ["---"] * len(heads)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *map(_cells, result["models"])])


def _cells(row: dict) -> list[str]:
    cells = [row["name"], *(f"{text['perplexity']:.2f} ({text['ratio']:.3f})" for text in row["texts"].values())]
    accuracies = [entry["accuracy"] for entry in row.get("tasks", {}).values()]
    cells += [f"{accuracy:.1%}" for accuracy in accuracies]
    cells += [f"{sum(accuracies) / len(accuracies):.1%}"] if accuracies else []
    return cells + ([f"{row['own_answers']['ratio']:.1%}"] if "own_answers" in row else [])


def answers_table(result: dict) -> str:
    """What the bare model and the last one answer to the same questions, side by side in Markdown."""
    result = read_result(result)
    bare, last = result["models"][0], result["models"][-1]
    if "answers" not in bare:
        return "This result was measured without the models' answers."
    lines = [["question", bare["name"], last["name"]], ["---"] * 3]
    lines += [
        list(map(_one_line, row))
        for row in zip(result["shown_prompts"], bare["answers"], last["answers"], strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _one_line(text: str) -> str:
    """Text that stays within a cell of a Markdown table."""
    for mark in "\\|<>*_`":
        text = text.replace(mark, f"\\{mark}")
    return "<br>".join(text.strip().splitlines())


def draw(pyplot: Any, result: dict, path: Path) -> None:
    """Draw bars of perplexity of each text and of accuracy in each task."""
    result = read_result(result)
    rows: Sequence[dict] = result["models"]
    shades = [0.15 + 0.7 * place / max(1, len(rows) - 2) for place in range(len(rows) - 1)]
    colors = ["#59636e", *pyplot.get_cmap("viridis")(shades)]
    panels = [name for name in ("texts", "tasks") if rows[0].get(name)]
    widths = [max(2, len(rows[0][name])) for name in panels]
    figure, axes = pyplot.subplots(
        1, max(1, len(panels)), figsize=(11, 3.6), width_ratios=widths or None, squeeze=False
    )
    for axis, name in zip(axes[0], panels, strict=False):
        {"texts": _draw_texts, "tasks": _draw_tasks}[name](axis, rows, colors)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=FONT_SIZE - 1)
    handles = [
        pyplot.Rectangle((0, 0), 1, 1, color=color, label=row["name"]) for row, color in zip(rows, colors, strict=True)
    ]
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.legend(handles=handles, loc="upper center", ncols=min(5, len(rows)), fontsize=FONT_SIZE, frameon=False)
    add_caption(figure, CAPTION, 175)
    save(pyplot, figure, path)


def _bars(rows: Sequence[dict], colors: Sequence, part: str) -> Any:
    """Place, entry and color of each bar; groups stand at whole numbers."""
    width = 0.8 / len(rows)
    for place, (row, color) in enumerate(zip(rows, colors, strict=True)):
        for group, entry in enumerate(row[part].values()):
            yield group + (place - (len(rows) - 1) / 2) * width, entry, color, width * 0.92


def _draw_texts(axis: Any, rows: Sequence[dict], colors: Sequence) -> None:
    found = [entry["perplexity"] for row in rows for entry in row["texts"].values()]
    for x, entry, color, width in _bars(rows, colors, "texts"):
        axis.bar(x, entry["perplexity"], color=color, width=width)
        axis.annotate(
            f"{entry['ratio']:.2f}", (x, entry["perplexity"]), ha="center", va="bottom", fontsize=FONT_SIZE - 3
        )
    if max(found) > 20 * min(found):
        axis.set_yscale("log")
    axis.margins(y=0.12)
    axis.set_xticks(range(len(rows[0]["texts"])), list(rows[0]["texts"]))
    axis.set_title("perplexity", fontsize=FONT_SIZE + 1)


def _draw_tasks(axis: Any, rows: Sequence[dict], colors: Sequence) -> None:
    for x, entry, color, width in _bars(rows, colors, "tasks"):
        axis.bar(x, entry["accuracy"], color=color, width=width)
        axis.plot([x, x], entry["interval"], color="#1b1f24", lw=0.8)
    tasks = rows[0]["tasks"]
    for group, entry in enumerate(tasks.values()):
        axis.plot([group - 0.45, group + 0.45], [entry["chance"]] * 2, color="black", linestyle="--", lw=1)
    marks = [task if entry["is_above_chance"] else f"{task}\n(bare: chance)" for task, entry in tasks.items()]
    axis.set_xticks(range(len(tasks)), marks)
    axis.set_ylim(0, 1.03)
    axis.set_title("accuracy", fontsize=FONT_SIZE + 1)
