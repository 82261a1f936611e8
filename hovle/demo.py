"""Train a small model on this machine and let it answer questions about pictures it has never seen.

A stock language model (SmolLM2-135M-Instruct) learns to see in three stages on easy-VQA: distillation from an
EfficientNet, alignment with the language model frozen, instruction tuning of everything. Finished stages are kept:
a second call continues where the first one stopped.
"""

import argparse
import json
import random
import shutil
import time
from pathlib import Path

import torch

from .assets import easy_vqa
from .eval.vqa import Question, answer_questions, exact_match, with_blank_pictures, with_shuffled_pictures
from .modeling_hovle import HoVLEForConditionalGeneration
from .processing_hovle import HoVLEProcessor

STAGES = ("distillation", "alignment", "instruction_tuning")
"""Recipes `demo/<stage>` in their order."""

NUM_QUESTIONS = 1000
"""Test questions, drawn once with a fixed seed."""

NUM_SHOWN = 24
"""Questions on the picture."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle demo`."""
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the three runs")
    parser.add_argument("--picture", type=Path, default=Path("demo.png"), help="where to draw questions and answers")
    parser.add_argument("--questions", type=int, default=NUM_QUESTIONS, help="test questions to score")
    parser.add_argument("--fresh", action="store_true", help="delete earlier runs in the output folder first")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields to replace in every stage")


def run(args: argparse.Namespace) -> int:
    """Train the stages, score them, draw the picture."""
    if args.fresh:
        shutil.rmtree(args.output, ignore_errors=True)
    training_seconds = {stage: train_stage(stage, args.output, args.overrides) for stage in STAGES}
    questions = test_questions(args.questions)
    report: dict = {"training_seconds": training_seconds, "teacher_cosine": teacher_cosine(args.output)}
    started_at = time.perf_counter()
    for stage in STAGES[1:]:
        _say(f"{stage}: answering {len(questions)} questions about unseen pictures, three times")
        report[stage], answers = score_model(args.output / stage / "model", questions)
    report["evaluation_seconds"] = round(time.perf_counter() - started_at, 1)
    shown = list(zip(questions, answers, strict=True))[:NUM_SHOWN]
    for question, answer in shown:
        mark = "right" if exact_match([answer], [question]) else f"wrong, it is {question.answer}"
        _say(f"{Path(question.picture).name:>10}  {question.text:<45} -> {answer:<12} {mark}")
    draw_report(args.picture, shown, report)
    (args.output / "report.json").write_text(json.dumps(report, indent=1))
    _say(summary(report))
    _say(f"Pictures, questions and answers: {args.picture}; figures: {args.output / 'report.json'}")
    _say(f"Talk with it: hovle chat --model {args.output / STAGES[-1] / 'model'} --image PICTURE")
    return 0


def train_stage(stage: str, output: Path, overrides: list[str]) -> float:
    """Run one stage, or keep it if it is finished; return its training time in seconds."""
    from .train import load_stage, run_stage
    from .train.checkpoint import find_checkpoint

    folder = output / stage
    settings = [f"output={folder}"]
    if stage != STAGES[0]:
        settings.append(f"model.checkpoint={output / STAGES[STAGES.index(stage) - 1] / 'model'}")
    config = load_stage(f"demo/{stage}", [*settings, *overrides])
    if (folder / "model").is_dir():
        _say(f"{stage}: already trained, see {folder} (--fresh trains again)")
    else:
        resume = find_checkpoint(folder) is not None
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)  # an interrupted start has nothing to continue
        _say(f"{stage}: {config.num_steps} steps")
        run_stage(config, resume=resume)
    entries = read_log(folder)
    return round(sum(entry.get("elapsed_seconds", 0.0) for entry in entries), 1)


def read_log(folder: Path) -> list[dict]:
    """Entries of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def teacher_cosine(output: Path) -> dict[str, float]:
    """Mean cosine to the teacher on held-out pictures, before and after distillation."""
    entries = [entry for entry in read_log(output / STAGES[0]) if entry.get("event") == "validation"]
    return {"before": round(entries[0]["image_cosine"], 4), "after": round(entries[-1]["image_cosine"], 4)}


def test_questions(count: int) -> list[Question]:
    """Draw questions about the test pictures of easy-VQA, the same ones every time."""
    from .train.data import load_easy_vqa_questions

    rows = load_easy_vqa_questions(easy_vqa() / "test")
    return [Question(*row) for row in random.Random(0).sample(rows, count)]


def score_model(folder: Path, questions: list[Question]) -> tuple[dict[str, float], list[str]]:
    """Measure exact match with true, blank and shuffled pictures; also return the answers to the true ones."""
    from .train.setup import choose_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = HoVLEForConditionalGeneration.from_pretrained(folder, dtype=choose_dtype("auto", device)).to(device).eval()
    processor = HoVLEProcessor.from_pretrained(folder)
    variants = {
        "accuracy": questions,
        "blank_pictures": with_blank_pictures(questions),
        "shuffled_pictures": with_shuffled_pictures(questions),
    }
    answers = {
        name: answer_questions(model, processor, variant, description=name.replace("_", " "))
        for name, variant in variants.items()
    }
    return {name: exact_match(answers[name], variants[name]) for name in variants}, answers["accuracy"]


def summary(report: dict) -> str:
    """The figures in a few lines."""
    cosine = report["teacher_cosine"]
    total = sum(report["training_seconds"].values())
    lines = [
        f"Training: {total / 60:.1f} minutes ("
        + ", ".join(f"{stage} {seconds / total:.0%}" for stage, seconds in report["training_seconds"].items())
        + f"); evaluation: {report['evaluation_seconds'] / 60:.1f} minutes.",
        f"Cosine to the teacher on unseen pictures: {cosine['before']:.3f} before, {cosine['after']:.3f} after.",
    ]
    for stage in STAGES[1:]:
        scores = report[stage]
        lines.append(
            f"After {stage.replace('_', ' ')}: {scores['accuracy']:.1%} exact match; "
            f"blank pictures {scores['blank_pictures']:.1%}, shuffled pictures {scores['shuffled_pictures']:.1%}."
        )
    return "\n".join(lines)


def draw_report(path: Path, shown: list[tuple[Question, str]], report: dict) -> None:
    """Draw pictures, questions and answers, right ones green and wrong ones red."""
    import matplotlib as mpl  # an extra: only the demo draws charts

    mpl.use("Agg")
    from matplotlib import pyplot

    from .pictures import load_picture

    columns = 6
    rows = -(-len(shown) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(2.3 * columns, 2.7 * rows + 0.8))
    for axis, (question, answer) in zip(axes.flat, shown, strict=False):
        is_right = bool(exact_match([answer], [question]))
        axis.imshow(load_picture(question.picture))
        axis.set_title(question.text, fontsize=8, wrap=True)
        verdict = f"{answer}" if is_right else f"{answer}  (is: {question.answer})"
        axis.set_xlabel(verdict, fontsize=10, color="#1a7f37" if is_right else "#cf222e", weight="bold")
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_color("#1a7f37" if is_right else "#cf222e")
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    final = report[STAGES[-1]]
    figure.suptitle(
        f"HoVLE in miniature: {final['accuracy']:.1%} of the answers are right "
        f"({final['blank_pictures']:.1%} with blank, {final['shuffled_pictures']:.1%} with shuffled pictures)",
        fontsize=12,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - this is the command's output
