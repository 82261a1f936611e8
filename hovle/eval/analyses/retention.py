"""What a model kept of its language: perplexity and five text tasks, the bare language model against each stage.

examples:
  hovle eval retention runs/demo/{distillation,alignment,instruction_tuning}/model \\
      --language-model asset:smollm2-135m-instruct
  hovle eval retention MODEL --language-model FOLDER --text my.txt --output kept

Writes retention.json, retention.md (the table) and retention.png (bars). Perplexity is that of `hovle train`'s
retention: held-out text in windows, without pictures. The tasks (capitals, categories, opposites, agreement, cloze)
are scored by the log-likelihood of a few endings; a task in which the bare model is not above chance is marked, as
nothing can be lost there. All models read the same token ids; one whose tokenizer gives others is refused, and so is a
bare model whose own tokenizer does: its figures on ids it never learned would say nothing.
"""

import argparse
import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...assets import resolve_asset
from ...charts import load_pyplot
from ...files.model_folder import refuse_missing_folder, short_name
from ...language.text_perplexity import RetentionConfig, TextRetention
from ...loading import load_bare_model, load_model, load_processor, reading
from ...machine.speed import fastest_dtype
from ...model.language_model import load_language_config
from ...model.processing_hovle import HoVLEProcessor
from ..results import digest, provenance
from .drawing import FONT_SIZE, add_caption, save
from .text_tasks import TASKS, Item, TaskScore, draw_items, score_items

FILES = ("retention.json", "retention.md", "retention.png")
"""What the command writes."""

CAPTION = (
    "Perplexity: exp of the mean nats per token of held-out text without pictures; lower is better. Accuracy: share "
    "of items whose right ending has the highest log-likelihood; thin lines are 95 % intervals (Wilson), black dashes "
    "chance."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hovle eval retention`."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="HoVLE folders or Hub ids, one per stage")
    parser.add_argument(
        "--language-model",
        required=True,
        metavar="MODEL",
        help="the bare language model: folder, Hub id or asset:smollm2-135m-instruct",
    )
    parser.add_argument("--text", default="python_docs", metavar="FILE", help="UTF-8 text (default: python_docs)")
    parser.add_argument("--num-tokens", type=int, default=8192, metavar="N", help="tokens read of it (default: 8192)")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens seen at once (default: 512)")
    parser.add_argument("--items", type=int, default=200, metavar="N", help="most items of a task (default: 200)")
    parser.add_argument("--output", type=Path, default=Path("retention"), metavar="DIR", help="default: retention")


def run(args: argparse.Namespace) -> int:
    """Measure every model and write table and chart."""
    pyplot = load_pyplot()
    if args.items < 1:
        raise ValueError(f"--items must be at least 1, got {args.items}.")
    for path in args.models:
        refuse_missing_folder(path)
    config = RetentionConfig(source=args.text, num_tokens=args.num_tokens, window=args.window)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = fastest_dtype(device)
    readers = [(path, load_processor(path)) for path in args.models]
    items = {task: draw_items(task, args.items) for task in TASKS}
    ids = _all_ids(readers[0][1], config, items)
    for path, processor in readers[1:]:
        if _all_ids(processor, config, items) != ids:
            raise ValueError(
                f"The tokenizer of {path} gives other ids than that of {args.models[0]}: models around different "
                "language models have no common bare model to be compared with."
            )
    bare_name = resolve_asset(args.language_model)
    with reading(bare_name):
        load_language_config(bare_name)  # says what cannot work before the tokenizer fails for it
    _check_tokenizer(bare_name, args.models[0], readers[0][1], config, items)
    rows = []
    for path in [None, *args.models]:
        if path is None:
            model = load_bare_model(bare_name, dtype)
            _check_vocabulary(model, ids, args.language_model)
        else:
            model = load_model(path, dtype=dtype)
        name = f"bare {short_name(args.language_model.removeprefix('asset:'))}" if path is None else short_name(path)
        rows.append(measure(name, path or args.language_model, model.to(device).eval(), readers[0][1], config, items))
        print(f"{name}: {_in_words(rows[-1])}", flush=True)  # noqa: T201 - this is the command's output
        del model
    result = {
        "text": asdict(config),
        "num_items": {task: len(drawn) for task, drawn in items.items()},
        "dtype": str(dtype).removeprefix("torch."),
        "text_hash": digest(ids),
        "provenance": provenance([bare_name, *args.models], device),
        "models": rows,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / FILES[0]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.output / FILES[1]).write_text(table(result) + "\n", encoding="utf-8")
    draw(pyplot, result, args.output / FILES[2])
    print(f"\n{table(result)}\n\nWritten: {', '.join(str(args.output / name) for name in FILES)}")  # noqa: T201
    return 0


def _all_ids(processor: HoVLEProcessor, config: RetentionConfig, items: dict) -> list[list[int]]:
    """Everything a tokenizer makes of text and tasks."""
    windows = [window.tolist() for window in TextRetention(config, processor).windows]
    return [*windows, *(ids for _, ids in _task_ids(processor, items))]


def _task_ids(processor: HoVLEProcessor, items: dict) -> list[tuple[str, list[int]]]:
    """Beginnings and endings of all items with their ids."""
    texts = [(item.context, True) for drawn in items.values() for item in drawn]
    texts += [(choice, False) for drawn in items.values() for item in drawn for choice in item.choices]
    return [(text, processor._encode_text(text, at_start)) for text, at_start in texts]


def _check_tokenizer(
    bare: str, stage: str, processor: HoVLEProcessor, config: RetentionConfig, items: dict[str, list[Item]]
) -> None:
    """Refuse a bare language model that was trained on other ids than the stages give it."""
    try:
        with reading(bare):
            own = HoVLEProcessor.from_language_model(bare)
    except ValueError as error:
        raise ValueError(
            f"{bare} gives no tokenizer ({error}), so nobody knows whether it reads the ids of "
            f"{stage}: name a folder or Hub id that holds the bare language model together with its tokenizer."
        ) from error
    advice = (
        f"Name the language model {stage} was built around; perplexities over different tokens cannot be compared."
    )
    pairs = zip(_task_ids(own, items), _task_ids(processor, items), strict=True)
    for (text, found), (_, expected) in pairs:
        if found != expected:
            raise ValueError(
                f"The tokenizer of {bare} reads {text!r} as {found}, that of {stage} as {expected}. {advice}"
            )
    if _all_ids(own, config, items) != _all_ids(processor, config, items):
        raise ValueError(
            f"The tokenizer of {bare} makes other ids of {config.source} than that of {stage}, though the same of the "
            f"tasks' short texts. {advice}"
        )


def _check_vocabulary(model: nn.Module, ids: list[list[int]], name: str) -> None:
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    largest = max(max(row) for row in ids if row)
    if largest >= size:
        raise ValueError(
            f"{name} has {size} rows in its table but the models' tokenizer gives the id {largest}: name the language "
            "model they were built around."
        )


def measure(
    name: str, path: str, model: nn.Module, processor: HoVLEProcessor, config: RetentionConfig, items: dict
) -> dict:
    """Perplexity and task scores of one model.

    Args:
        name: For table and chart.
        path: Where it came from.
        model: A causal language model in evaluation mode.
        processor: Its tokenizer encodes text and tasks.
        config: The text.
        items: Task -> its items.
    """
    retention = TextRetention(config, processor)
    perplexity = retention.perplexity(model, contextlib.nullcontext())
    scores = {task: score_items(model, processor._encode_text, drawn) for task, drawn in items.items()}
    return {
        "name": name,
        "model": path,
        "perplexity": perplexity,
        "tasks": {task: _entry(score) for task, score in scores.items()},
    }


def _entry(score: TaskScore) -> dict:
    return {
        "accuracy": score.accuracy,
        "interval": list(score.interval),
        "chance": score.chance,
        "num_items": score.num_items,
        "is_above_chance": score.is_above_chance,
    }


def _in_words(row: dict) -> str:
    accuracies = ", ".join(f"{task} {entry['accuracy']:.1%}" for task, entry in row["tasks"].items())
    return f"perplexity {row['perplexity']:.2f}, {accuracies}"


def table(result: dict) -> str:
    """One row per model, in Markdown; a task in which the bare model is not above chance is marked."""
    bare = result["models"][0]["tasks"]
    heads = [
        f"{task} (chance {entry['chance']:.0%}{'' if entry['is_above_chance'] else '; bare model not above it'})"
        for task, entry in bare.items()
    ]
    lines = [["model", "perplexity", *heads], ["---"] * (2 + len(heads))]
    for row in result["models"]:
        accuracies = [f"{entry['accuracy']:.1%}" for entry in row["tasks"].values()]
        lines.append([row["name"], f"{row['perplexity']:.2f}", *accuracies])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(pyplot: Any, result: dict, path: Path) -> None:
    """Draw bars of perplexity and of accuracy in each task."""
    rows: Sequence[dict] = result["models"]
    colors = [
        "#59636e",
        *pyplot.get_cmap("viridis")([0.15 + 0.7 * place / max(1, len(rows) - 2) for place in range(len(rows) - 1)]),
    ]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), width_ratios=[1, 3])
    for place, (row, color) in enumerate(zip(rows, colors, strict=True)):
        left.bar(place, row["perplexity"], color=color, width=0.8)
        left.annotate(
            f"{row['perplexity']:.2f}", (place, row["perplexity"]), ha="center", va="bottom", fontsize=FONT_SIZE - 1
        )
    left.set_title("perplexity", fontsize=FONT_SIZE + 1)
    left.set_xticks([])
    left.margins(y=0.12)
    width = 0.8 / len(rows)
    for place, (row, color) in enumerate(zip(rows, colors, strict=True)):
        for group, entry in enumerate(row["tasks"].values()):
            x = group + (place - (len(rows) - 1) / 2) * width
            low, high = entry["interval"]
            label = row["name"] if group == 0 else None
            right.bar(x, entry["accuracy"], color=color, width=width * 0.92, label=label)
            right.plot([x, x], [low, high], color="#1b1f24", lw=0.8)
    for group, entry in enumerate(rows[0]["tasks"].values()):
        right.plot([group - 0.45, group + 0.45], [entry["chance"]] * 2, color="black", linestyle="--", lw=1)
    tasks = rows[0]["tasks"]
    marks = [task if entry["is_above_chance"] else f"{task}\n(bare: chance)" for task, entry in tasks.items()]
    right.set_xticks(range(len(tasks)), marks)
    right.set_ylim(0, 1.03)
    right.set_title("accuracy", fontsize=FONT_SIZE + 1)
    for axis in (left, right):
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=FONT_SIZE - 1)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.legend(loc="upper center", ncols=min(5, len(rows)), fontsize=FONT_SIZE, frameon=False)
    add_caption(figure, CAPTION, 175)
    save(pyplot, figure, path)
