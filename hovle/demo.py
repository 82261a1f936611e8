"""Train a small model on this machine and let it answer questions about pictures it has never seen.

A stock language model (SmolLM2-135M-Instruct) learns to see in three stages on easy-VQA: distillation from an
EfficientNet, alignment with the language model frozen, instruction tuning of everything. Finished stages are kept: a
second call does what is missing. An interrupted stage starts again.
"""

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from .assets import easy_vqa
from .assets.vqa_questions import Question, draw_questions
from .charts import load_pyplot
from .eval.vqa import exact_match, score_model

STAGES = ("distillation", "alignment", "instruction_tuning")
"""Recipes `demo/<stage>` in their order."""

MINUTES = 30.0
"""How long it all may take after set-up."""

TRAINING_SHARE = 0.7
"""Part of that for training steps; compiling, validating and scoring take the rest."""

ENVIRONMENT = ("device", "processor", "num_threads", "dtype", "compiled", "torch", "commit")
"""What the report says of the machine, from a run's log."""

NUM_QUESTIONS = 1000
"""Test questions, drawn once with a fixed seed."""

NUM_SHOWN = 24
"""Questions on the picture."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle demo`."""
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the three runs")
    parser.add_argument("--picture", type=Path, default=Path("demo.png"), help="where to draw questions and answers")
    parser.add_argument("--questions", type=int, default=NUM_QUESTIONS, help="test questions to score")
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help="about how long it may take: where this machine is too slow for the recipes' steps, it does fewer; not "
        "looked at with num_steps=N",
    )
    parser.add_argument("--fresh", action="store_true", help="delete earlier demo runs in the output folder first")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields to replace in every stage")


def run(args: argparse.Namespace) -> int:
    """Train the stages, score them, draw the picture."""
    from .train.config import load_stage

    # All that can be wrong is found before the first of thirty minutes.
    configs = {stage: load_stage(f"demo/{stage}", stage_settings(stage, args)) for stage in STAGES}
    split = easy_vqa() / "test"
    draw_questions(split, args.questions, balanced=True)
    pyplot = load_pyplot()
    if args.fresh:
        delete_runs(args.output)
    configs = check_kept_stages(args.output, configs, args.overrides)
    if not any(item.startswith("num_steps=") for item in args.overrides):
        configs = fit_steps(args.output, configs, args.minutes)
    for stage, config in configs.items():
        train_stage(stage, args.output / stage, config)
    started_at = time.perf_counter()
    report: dict = {"stages": {stage: stage_facts(args.output / stage) for stage in STAGES}}
    for stage in STAGES[1:]:
        _say(f"{stage}: answering {args.questions} questions about unseen pictures, five times")
        scores, answers = score_model(args.output / stage / "model", split, args.questions)
        report["stages"][stage].update(scores)
    report["num_questions"] = args.questions
    report["scoring_seconds"] = round(time.perf_counter() - started_at, 1)
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    shown = answers[:NUM_SHOWN]
    for question, answer in shown:
        mark = "right" if exact_match([answer], [question]) else f"wrong, it is {question.answer}"
        _say(f"{Path(question.picture).name:>10}  {question.text:<45} -> {answer:<12} {mark}")
    _say(summary(report))
    draw_report(pyplot, args.picture, shown, report)
    _say(f"Pictures, questions and answers: {args.picture}; figures: {args.output / 'report.json'}")
    _say(f"Talk with it: hovle chat --model {args.output / STAGES[-1] / 'model'} --image PICTURE")
    return 0


def stage_settings(stage: str, args: argparse.Namespace) -> list[str]:
    """Overrides that chain the stages in the output folder, then the user's."""
    settings = [f"output={args.output / stage}"]
    if stage != STAGES[0]:
        settings.append(f"model.checkpoint={args.output / STAGES[STAGES.index(stage) - 1] / 'model'}")
    return [*settings, *args.overrides]


def delete_runs(output: Path) -> None:
    """Delete the stages' run folders and nothing else."""
    for stage in STAGES:
        _delete_run(output / stage)


def _delete_run(folder: Path) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"{folder} holds no training run (no recipe.yaml), so the demo does not delete it.")
    shutil.rmtree(folder)


def check_kept_stages(output: Path, configs: dict, overrides: Sequence[str] = ()) -> dict:
    """Refuse to keep a finished stage that another recipe made, or that follows one still to be trained.

    Returns:
        The configs, a kept stage's with the number of steps it did, unless the user asks for one.
    """
    import yaml

    from .train.run.checkpoint import changed_fields

    to_train: list[str] = []
    found = dict(configs)
    for stage, config in configs.items():
        folder = output / stage
        if not is_finished(folder):
            to_train.append(stage)
            continue
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        if not any(item.startswith("num_steps=") for item in overrides):
            config = found[stage] = dataclasses.replace(config, num_steps=recipe["num_steps"])
        changed = changed_fields(recipe, config.to_dict())
        if changed or to_train:
            reason = f"its {', '.join(changed)} differ" if changed else f"it was trained before {to_train[0]} will be"
            raise ValueError(f"{folder} does not belong to this demo: {reason}. Train all stages again with --fresh.")
    return found


def is_finished(folder: Path) -> bool:
    """Whether a stage's run folder holds its model."""
    return (folder / "model").is_dir()


def fit_steps(output: Path, configs: dict, minutes: float) -> dict:
    """Cut the steps of the stages still to be trained, all by the same share, where they would take too long here.

    Args:
        output: Folder of the runs; what finished ones took counts.
        configs: Stage -> config.
        minutes: For the whole demo.
    """
    from .train.parallel import make_accelerator
    from .train.run.benchmark_step import seconds_per_step

    missing = [stage for stage in configs if not is_finished(output / stage)]
    if not missing:
        return configs
    spent = sum(stage_facts(output / stage)["training_seconds"] for stage in configs if stage not in missing)
    seconds = {}
    for stage in missing:
        _say(f"{stage}: measuring a step on this machine")
        # The model it will start from is not there yet; a new one has the same shapes.
        config = dataclasses.replace(configs[stage], model=configs[STAGES[0]].model)
        seconds[stage] = configs[stage].num_steps * seconds_per_step(config, make_accelerator())
    share = step_share(sum(seconds.values()), TRAINING_SHARE * 60 * minutes - spent)
    fitted = dict(configs)
    for stage in missing:
        num_steps = max(1, int(share * configs[stage].num_steps))
        fitted[stage] = dataclasses.replace(configs[stage], num_steps=num_steps)
        _say(f"{stage}: {num_steps} steps in about {seconds[stage] * share / 60:.1f} minutes")
    if share < 1:
        _say(
            f"That is {share:.0%} of the recipes' steps, so that the demo takes about {minutes:g} minutes in all; "
            "more steps answer better (--minutes)."
        )
    return fitted


def step_share(wanted_seconds: float, seconds: float) -> float:
    """Share of the steps that fits into some seconds, at most 1; ValueError where less than a tenth does."""
    share = 1.0 if wanted_seconds <= seconds else seconds / wanted_seconds
    if share < 0.1:
        raise ValueError(
            f"The missing stages would train for {wanted_seconds / 60:.0f} minutes here and may take "
            f"{max(0.0, seconds) / 60:.0f}: too little would be learnt. Allow more with --minutes."
        )
    return share


def train_stage(stage: str, folder: Path, config) -> None:
    """Run one stage, or keep it if it is finished."""
    from .train import run_stage

    if is_finished(folder):
        _say(f"{stage}: already trained, see {folder} (--fresh trains again)")
        return
    _delete_run(folder)
    run_stage(config)


def stage_facts(folder: Path) -> dict:
    """What a finished run's log says: duration, samples and tokens, environment, cosine to the teacher."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    start, steps = entries[0], [entry for entry in entries if "loss" in entry]
    facts = {
        "seconds": round(entries[-1]["time"] - start["time"], 1),
        "training_seconds": round(sum(entry["elapsed_seconds"] for entry in steps), 1),
        "steps": steps[-1]["step"],
        "tokens": round(sum(entry["tokens_per_second"] * entry["elapsed_seconds"] for entry in steps)),
        "environment": {key: start.get(key) for key in ENVIRONMENT},
    }
    held_out = [entry for entry in entries if entry.get("event") == "validation" and "image_cosine" in entry]
    if held_out:
        before, after = held_out[0]["image_cosine"], held_out[-1]["image_cosine"]
        facts["teacher_cosine"] = {"before": round(before, 4), "after": round(after, 4)}
    return facts


def summary(report: dict) -> str:
    """The figures in a few lines."""
    stages = report["stages"]
    total = sum(facts["training_seconds"] for facts in stages.values())
    shares = ", ".join(f"{stage} {facts['training_seconds'] / total:.0%}" for stage, facts in stages.items())
    cosine = stages[STAGES[0]]["teacher_cosine"]
    lines = [
        f"Training steps: {total / 60:.1f} minutes ({shares}).",
        f"Cosine to the teacher's features on unseen pictures: {cosine['before']:.3f} before distillation, "
        f"{cosine['after']:.3f} after.",
    ]
    for stage in STAGES[1:]:
        scores = stages[stage]
        lines.append(
            f"After {stage.replace('_', ' ')}: {scores['accuracy']:.1%} exact match on questions whose wording tells "
            f"little (blank pictures {scores['blank_pictures']:.1%}, shuffled pictures "
            f"{scores['shuffled_pictures']:.1%}), {scores['accuracy_unbalanced']:.1%} on questions as they come "
            f"(blank pictures {scores['blank_pictures_unbalanced']:.1%})."
        )
    return "\n".join(lines)


def draw_report(pyplot, path: Path, shown: list[tuple[Question, str]], report: dict) -> None:
    """Draw pictures, questions and answers, right ones green and wrong ones red."""
    from .model.pictures import load_picture

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
    final = report["stages"][STAGES[-1]]
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
