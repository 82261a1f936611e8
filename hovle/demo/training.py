"""Train a small model on this machine and let it answer questions about pictures it has never seen.

A stock language model (SmolLM2-135M-Instruct) learns to see in three stages on easy-VQA: distillation from an
EfficientNet, alignment with the language model frozen, instruction tuning of everything. Finished stages are kept, and
an interrupted one goes on from its last checkpoint: a second call does what is missing.
"""

import argparse
import dataclasses
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..assets import easy_vqa
from ..assets.vqa_questions import draw_questions
from ..charts import load_pyplot
from ..eval.vqa import exact_match, score_model
from ..files.documents import load_yaml, parse_json
from .answers import Answer, draw_answers

STAGES = ("distillation", "alignment", "instruction_tuning")
"""Recipes `demo/<stage>` in their order."""

MINUTES = 30.0
"""How long it all may take after set-up."""

TRAINING_SHARE = 0.7
"""Part of that for training steps; compiling, validating and scoring take the rest."""

EXPECTED = ((0.0, 0.34), (0.29, 0.73), (0.44, 0.80), (0.94, 0.98), (1.0, 0.98))
"""Share of the recipes' steps and of right answers to balanced questions, as measured (dev/LOG.md); the first one is a
guess's."""

ENVIRONMENT = ("device", "processor", "num_threads", "dtype", "compiled", "torch", "commit")
"""What the report says of the machine, from a run's log."""

NUM_QUESTIONS = 1000
"""Test questions, drawn once with a fixed seed."""

NUM_SHOWN = 24
"""Questions on the picture."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle demo train`."""
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
    from ..train.config import load_stage

    # All that can be wrong is found before the first of thirty minutes.
    configs = {stage: load_stage(f"demo/{stage}", stage_settings(stage, args)) for stage in STAGES}
    split = easy_vqa() / "test"
    draw_questions(split, args.questions, balanced=True)
    pyplot = load_pyplot()
    if args.fresh:
        delete_runs(args.output)
    configs = check_kept_stages(args.output, configs, args.overrides)
    if not any(item.startswith("num_steps=") for item in args.overrides):
        pace = Pace(args.output, configs)
        minutes = choose_minutes(pace, args.minutes)
        for stage in STAGES:
            configs = pace.fit_steps(configs, minutes)
            train_stage(stage, args.output / stage, configs[stage])
    else:
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
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    shown = [
        Answer(question.picture, question.text, text, question.answer, bool(exact_match([text], [question])))
        for question, text in answers[:NUM_SHOWN]
    ]
    for answer in shown:
        _say(f"{Path(answer.picture).name:>10}  {answer.question:<45} -> {answer.said:<12} {answer.mark}")
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
    """Refuse to keep a stage, finished or begun, of another recipe, or that follows one still to be trained.

    Returns:
        The configs, a kept stage's with its own number of steps, unless the user asks for one.
    """
    from ..train.run.checkpoint import changed_fields

    to_train: list[str] = []
    found = dict(configs)
    for stage, config in configs.items():
        folder = output / stage
        recipe = read_recipe(folder)
        if recipe is None:
            to_train.append(stage)
            continue
        if not any(item.startswith("num_steps=") for item in overrides):
            config = found[stage] = dataclasses.replace(config, num_steps=recipe["num_steps"])
        changed = changed_fields(recipe, config.to_dict())
        if changed or to_train:
            reason = f"its {', '.join(changed)} differ" if changed else f"it was trained before {to_train[0]} will be"
            raise ValueError(f"{folder} does not belong to this demo: {reason}. Train all stages again with --fresh.")
        if not is_finished(folder):
            to_train.append(stage)
    return found


def read_recipe(folder: Path) -> dict | None:
    """The recipe of a run that is finished or can go on; None where the stage is still to begin."""
    return load_yaml(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else None


def is_finished(folder: Path) -> bool:
    """Whether a stage's run folder holds its model."""
    return (folder / "model").is_dir()


class Pace:
    """How long the stages take on this machine: estimated before they begin, corrected by those that are finished.

    Args:
        output: Folder of the runs; what was trained there already counts.
        configs: Stage -> config.
    """

    def __init__(self, output: Path, configs: dict):
        from ..train.parallel import make_accelerator
        from ..train.run.benchmark_step import estimate_seconds

        self.output = output
        self.wanted = {stage: config.num_steps for stage, config in configs.items()}
        self.seconds: dict[str, float] = {}
        """Estimate of a step of each stage that had not begun."""
        for stage in self._to_begin():
            _say(f"{stage}: measuring steps on this machine")
            # The model it will start from is not there yet; a new one has the same shapes.
            config = dataclasses.replace(configs[stage], model=configs[STAGES[0]].model)
            self.seconds[stage] = estimate_seconds(config, make_accelerator())

    def _to_begin(self) -> list[str]:
        return [stage for stage in STAGES if read_recipe(self.output / stage) is None]

    def remaining_seconds(self) -> float:
        """What all steps of the stages that have not begun would take."""
        correction = self._correction()
        return sum(correction * self.seconds[stage] * self.wanted[stage] for stage in self._to_begin())

    def _correction(self) -> float:
        """What the stages trained meanwhile took of their estimate."""
        took, estimated = 0.0, 0.0
        for stage in set(self.seconds) - set(self._to_begin()):
            facts = stage_facts(self.output / stage)
            took += facts["training_seconds"]
            estimated += facts["steps"] * self.seconds[stage]
        return took / estimated if estimated else 1.0

    def spent_seconds(self) -> float:
        """What the stages that have begun took so far."""
        begun = [self.output / stage for stage in STAGES if stage not in self._to_begin()]
        return sum(stage_facts(folder)["training_seconds"] for folder in begun if has_steps(folder))

    def share(self, minutes: float) -> float:
        """Share of their steps that the stages that have not begun can do."""
        return step_share(self.remaining_seconds(), TRAINING_SHARE * 60 * minutes - self.spent_seconds())

    def fit_steps(self, configs: dict, minutes: float) -> dict:
        """Cut the steps of the stages that have not begun, all by the same share, where they would take too long.

        Args:
            configs: Stage -> config.
            minutes: For the whole demo.
        """
        fitted = dict(configs)
        to_begin = self._to_begin()
        share = self.share(minutes) if to_begin else 1.0
        for stage in to_begin:
            num_steps = max(1, int(share * self.wanted[stage]))
            fitted[stage] = dataclasses.replace(configs[stage], num_steps=num_steps)
            about = self._correction() * self.seconds[stage] * num_steps / 60
            _say(f"{stage}: {num_steps} of {self.wanted[stage]} steps in about {about:.1f} minutes")
        return fitted


def choose_minutes(pace: Pace, minutes: float) -> float:
    """Say beforehand what too little time gives, and let a person at a terminal choose; the minutes it may take."""
    share = pace.share(minutes)
    if share == 1:
        return minutes
    enough = math.ceil((pace.spent_seconds() + pace.remaining_seconds()) / (TRAINING_SHARE * 60))
    _say(
        f"{minutes:g} minutes suffice for {share:.0%} of the recipes' steps on this machine: expect about "
        f"{expected_accuracy(share):.0%} right answers (guessing gives {EXPECTED[0][1]:.0%}). All steps take about "
        f"{enough} minutes and give {EXPECTED[-1][1]:.0%} (--minutes {enough})."
    )
    if not sys.stdin.isatty():
        return minutes
    answer = input(f"Train for {minutes:g} minutes [Enter], or for how many? ").strip()
    try:
        return float(answer) if answer else minutes
    except ValueError:
        raise ValueError(f"Minutes are a number, not {answer!r}.") from None


def expected_accuracy(share: float) -> float:
    """Share of right answers to expect after a share of the steps, between the measured ones."""
    (low, before), (high, after) = next(pair for pair in itertools.pairwise(EXPECTED) if share <= pair[1][0])
    return before + (after - before) * (share - low) / (high - low)


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
    """Run one stage, go on with it where it was interrupted, or keep it if it is finished."""
    from ..train import run_stage

    if is_finished(folder):
        _say(f"{stage}: already trained, see {folder} (--fresh trains again)")
        return
    run_stage(config, resume=True)


def has_steps(folder: Path) -> bool:
    """Whether a run has logged a step."""
    log = folder / "log.jsonl"
    return log.is_file() and '"loss"' in log.read_text(encoding="utf-8")


def stage_facts(folder: Path) -> dict:
    """What a finished run's log says: duration, samples and tokens, environment, cosine to the teacher."""
    log = folder / "log.jsonl"
    entries = [parse_json(line, f"a line of {log}") for line in log.read_text(encoding="utf-8").splitlines()]
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


def draw_report(pyplot, path: Path, answers: Sequence[Answer], report: dict) -> None:
    """Draw questions about test pictures and their answers, below the scores of all."""
    final = report["stages"][STAGES[-1]]
    title = (
        f"HoVLE in miniature: {final['accuracy']:.1%} of the answers are right "
        f"({final['blank_pictures']:.1%} with blank, {final['shuffled_pictures']:.1%} with shuffled pictures)"
    )
    draw_answers(pyplot, path, answers, title)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - this is the command's output
