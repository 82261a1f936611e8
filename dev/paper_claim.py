"""Test the paper's claim at equal budget: HoVLE beside a compositional, a monolithic and an undistilled model.

    python dev/paper_claim.py runs/claim --minutes 100                      # where `hovle train smol/...` has its data
    python dev/paper_claim.py runs/claim-demo --minutes 20 --recipes demo   # on easy-VQA

Every arm of paper_claim.yaml trains for the same minutes on the same pictures with the same loop; a teacher's work
counts wherever one is asked, so no features are cached. Before a stage some of its steps are timed, then its steps are
planned; the last stage of an arm takes what the others left over. Then all arms answer the same held-out questions of
the abilities that the data teach (`hovle eval skills`), again with white pictures, and OUT/README.md, result.json and
claim.png say what came out. The same command goes on after an interruption. `key=value` changes all recipes, but not
what paper_claim.yaml sets.
"""

import argparse
import dataclasses
import functools
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from paper_claim_models import begin_as_long_as_words, show_features, standardized_teacher
from tabulate import tabulate
from train_smol import PROBE, say, step_seconds

from hovle.charts import load_pyplot
from hovle.errors import StopRunError
from hovle.eval.intervals import Units
from hovle.eval.results import provenance
from hovle.eval.skills.bars import BARS, Bar
from hovle.eval.skills.command import ask
from hovle.eval.skills.items import Drawer, Item
from hovle.eval.skills.scoring import grades_of
from hovle.files.documents import load_json, load_yaml
from hovle.loading import load_model, load_processor
from hovle.machine.speed import fastest_dtype
from hovle.synthesis.skill import AssetFolders
from hovle.train import StageConfig, load_stage, run_stage
from hovle.train.monitor.report import Run, read_run

ARMS = Path(__file__).with_suffix(".yaml")

REFERENCE = "hovle"
"""The arm that claims are about."""

LOOKS = 8
"""How often a stage is validated and saved."""

TOLERANCE = 0.15
"""By which part of the budget an arm's minutes may miss it."""

MACHINE = ("device", "processor", "num_threads", "num_processes", "dtype", "compiled")
"""What all runs must have in common, as their logs call it."""

RULE = (
    "Rule, written down beforehand. The difference is HoVLE's share of right answers minus the arm's, to the same "
    "questions, mean over abilities, with a 95 % interval over what pictures were made from. A claim agrees where the "
    "whole interval lies above its bound and HoVLE answers better than with white pictures (interval above 0); it "
    "disagrees where the whole interval lies below the bound; else it is undecided, and so it is where an arm's "
    f"minutes miss the budget by more than {TOLERANCE:.0%} or runs were on different machines. Each arm was trained "
    "once: what another seed would change is in no interval."
)


@dataclass(frozen=True)
class Study:
    """What is compared, and where it lies."""

    out: Path
    arms: dict[str, dict]
    """Of the YAML file."""
    every_stage: list[str]
    """Overrides of all recipes."""
    recipes: str
    """Folder of three recipes, shipped or not."""
    minutes: float
    """Of training, for each arm."""

    def load(self, stage: str, *overrides: str) -> StageConfig:
        """A recipe whose teachers, if any, work in every step."""
        config = load_stage(f"{self.recipes}/{stage}.yaml", [*self.every_stage, *overrides])
        teacher = tuple(dataclasses.replace(item, cache=None) for item in config.teacher)
        return dataclasses.replace(config, teacher=teacher)

    def config(self, arm: str, stage: str, *overrides: str) -> StageConfig:
        """A stage of an arm, which starts from the one before it."""
        stages = self.arms[arm]["stages"]
        before = list(stages)[: list(stages).index(stage)]
        start = [f"model.checkpoint={self.out / arm / before[-1] / 'model'}"] if before else []
        if not before and stage != "distillation":
            start = [f"model={json.dumps(self.load('distillation').to_dict()['model'])}"]
        return self.load(stage, *start, *stages[stage].get("set", []), f"output={self.out / arm / stage}", *overrides)

    @functools.cached_property
    def teacher(self):
        """What the compositional arm sees with."""
        return standardized_teacher(self.load("distillation"))

    def adapt(self, arm: str, model) -> None:
        """Put in what an arm's model needs and its folder does not hold."""
        if self.arms[arm].get("teacher_features"):
            show_features(model, self.teacher)

    def run(self, arm: str, config: StageConfig) -> None:
        """Run a stage, or go on with it."""

        def adapt(model) -> None:
            self.adapt(arm, model)
            if config.model.checkpoint is None:
                begin_as_long_as_words(model)

        torch.compiler.reset()  # or the layers of the eighth model would run uncompiled
        run_stage(config, resume=True, adapt=adapt)

    def model(self, arm: str) -> Path:
        """Folder of an arm's trained model."""
        return self.out / arm / list(self.arms[arm]["stages"])[-1] / "model"

    def runs(self, arm: str) -> list[Run]:
        """The finished stages of an arm."""
        folders = [self.out / arm / stage for stage in self.arms[arm]["stages"]]
        return [read_run(folder) for folder in folders if (folder / "model").is_dir()]


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of runs and results")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of all recipes")
    parser.add_argument("--minutes", type=float, required=True, help="of training, for each arm")
    parser.add_argument("--recipes", default="smol", help="smol, demo or a folder with three recipes (smol)")
    parser.add_argument("--arms", type=Path, default=ARMS, help=f"what is compared ({ARMS.name})")
    parser.add_argument("--items", type=int, default=200, metavar="N", help="questions of each ability (200)")
    parser.add_argument("--assets", type=Path, help="folder of unpacked assets to draw from instead of the cache")
    args = parser.parse_intermixed_args()
    content = load_yaml(args.arms)
    study = Study(args.out, content["arms"], [*content["every_stage"], *args.overrides], args.recipes, args.minutes)
    load_pyplot()  # what is missing is told now
    taught(study)
    keep({"minutes": args.minutes, "items": args.items}, args.out / "settings.json")
    for arm in study.arms:
        train(study, arm)
    examine(study, Drawer(AssetFolders(args.assets), seed=0), args.items)
    result = result_of(study)
    draw(result, study.out / "claim.png")
    (study.out / "README.md").write_text(page(result), encoding="utf-8")
    write_json(study.out / "result.json", result)
    say(f"\n{page(result)}\nWritten: {study.out}/README.md, result.json, claim.png")
    return 0


def keep(settings: dict, path: Path) -> None:
    """Write down what no recipe holds; ValueError where the folder was begun with something else."""
    if path.is_file() and (before := load_json(path)) != settings:
        raise ValueError(f"{path.parent} was begun with {before}, not with {settings}: take these, or another folder.")
    write_json(path, settings)


def write_json(path: Path, content) -> None:
    """Write a file that is never seen half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.writing")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def train(study: Study, arm: str) -> None:
    """Train the stages of an arm, or what is missing of them; how many steps each takes is planned once and kept."""
    shares = {stage: values["share"] for stage, values in study.arms[arm]["stages"].items()}
    for place, stage in enumerate(shares):
        plan = study.out / arm / f"{stage}.json"
        if not plan.is_file():
            left = 60 * study.minutes - sum(map(training_seconds, study.runs(arm)))
            share = shares[stage] / sum(list(shares.values())[place:])
            seconds = probe(study, arm, stage)
            write_json(plan, {"num_steps": max(1, round(left * share / seconds)), "step_seconds": seconds})
        num_steps = load_json(plan)["num_steps"]
        say(f"{arm}, {stage}: {num_steps} steps")
        every = max(1, num_steps // LOOKS)
        looks = (f"validate_every={every}", f"checkpoint_every={every}")
        study.run(arm, study.config(arm, stage, f"num_steps={num_steps}", *looks))


def probe(study: Study, arm: str, stage: str) -> float:
    """Seconds of a step, by some whose model is thrown away."""
    folder = study.out / "probe"
    shutil.rmtree(folder, ignore_errors=True)
    study.run(arm, study.config(arm, stage, *PROBE, f"output={folder}"))
    seconds = step_seconds(folder / "log.jsonl")
    shutil.rmtree(folder)
    return seconds


def training_seconds(run: Run) -> float:
    """What the steps of a run took, without validation and saving."""
    return sum(entry["elapsed_seconds"] for entry in run.steps)


def taught(study: Study) -> list[Bar]:
    """Abilities to see that the data teach; ValueError where there are none."""
    labels = {source.label for source in study.load("instruction_tuning").data}
    found = [bar for bar in BARS.values() if bar.metric not in ("false_yes", "blind") and labels >= {*bar.skills}]
    if not found:
        raise ValueError(f"The sources {', '.join(sorted(labels))} teach no ability of `hovle eval skills --list`.")
    return found


def examine(study: Study, drawer: Drawer, count: int) -> None:
    """Let every arm that has not answered yet answer the same questions."""
    missing = [arm for arm in study.arms if not (study.out / arm / "answers.json").is_file()]
    asked = {bar: drawer.items(bar, count) for bar in taught(study)} if missing else {}
    for arm in missing:
        say(f"{arm}: answering {sum(map(len, asked.values()))} questions, twice")
        write_json(study.out / arm / "answers.json", answers(study, arm, asked))


def answers(study: Study, arm: str, asked: dict[Bar, list[Item]]) -> list[dict]:
    """A row for each question: whether an arm's answer is right, to the picture and to a white one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(study.model(arm), dtype=fastest_dtype(device)).to(device).eval()
    study.adapt(arm, model)
    processor = load_processor(study.model(arm))
    processor.image_processor.do_rescale = processor.image_processor.do_normalize = False  # tiles as in training
    rows = []
    for bar, items in asked.items():
        found = ask(model, processor, bar, items, batch_size=32)
        blank = grades_of(bar, items, found.blank_answers)
        rows += [
            {"ability": bar.name, "source": item.source, "right": grade.is_right, "blank": white.is_right}
            for item, grade, white in zip(items, found.grades, blank, strict=True)
        ]
    return rows


def gain(rows: list[dict], name: str, others: list[dict] | None = None, other: str = "right") -> dict:
    """Share of right answers, mean over abilities, with 95 % interval; less that of others to the same questions.

    Columns are `right` and `blank` of `answers`; others are another arm's or the same, and None subtracts nothing.
    """
    abilities = list(dict.fromkeys(row["ability"] for row in rows))
    clusters: dict[tuple[int, str], np.ndarray] = {}
    for row, their in zip(rows, others or [{other: False}] * len(rows), strict=True):
        key = (abilities.index(row["ability"]), row["source"])
        clusters[key] = clusters.get(key, 0) + np.array([row[name], -float(their[other]), 1.0])
    totals = np.array(list(clusters.values()))
    units = Units(totals[:, :2], totals[:, [2, 2]], np.array([ability for ability, _ in clusters]), combine="sum")
    low, high = (bound / len(abilities) for bound in units.interval())
    return {"score": units.score / len(abilities), "interval": [low, high]}


def curve(runs: list[Run]) -> list[dict]:
    """Held-out figures of replies over what training had taken until then."""
    points, seconds, tokens = [], 0.0, 0.0
    for entry in (entry for run in runs for entry in run.entries):
        if "event" not in entry:
            seconds += entry["elapsed_seconds"]
            tokens += entry["elapsed_seconds"] * entry["tokens_per_second"]
        elif entry["event"] == "validation" and "cross_entropy" in entry:
            figures = {name: entry[name] for name in ("cross_entropy", "reply_accuracy")}
            points.append({"minutes": seconds / 60, "tokens": tokens, **figures})
    return points


def verdict(more_than: float, interval: list[float], sees: bool, problem: str = "") -> str:
    """`agrees`, `disagrees` or `undecided`, by `RULE`."""
    low, high = interval
    if not problem and sees and low > more_than:
        return "agrees"
    return "disagrees" if not problem and high < more_than else "undecided"


def problem_of(arms: list[dict], minutes: float) -> str:
    """Why arms had not the same budget; nothing where they had."""
    for arm in arms:
        if abs(arm["minutes"] / minutes - 1) > TOLERANCE:
            return f"{arm['title']} was trained for {arm['minutes']:.1f} of {minutes:g} minutes"
    is_same = len({json.dumps(machine) for arm in arms for machine in arm["machines"]}) == 1
    return "" if is_same else "runs were on different machines"


def judge(ours: dict, theirs: dict, values: dict, found: dict, minutes: float) -> dict:
    """A `gain` of the reference over an arm, with what it says of the arm's claim in the YAML file."""
    problem, sees = problem_of([ours, theirs], minutes), ours["looking"]["interval"][0] > 0
    said = verdict(values["more_than"], found["interval"], sees, problem)
    doubt = problem or ("" if sees else "HoVLE answers no better than with white pictures")
    score, low, high, bound = (100 * item for item in (found["score"], *found["interval"], values["more_than"]))
    sentence = (
        f"{said.capitalize()}: {values['claim']}. {ours['title']} minus {theirs['title']} is {score:+.1f} points "
        f"({low:+.1f} to {high:+.1f}; claimed: more than {bound:+.1f}){'; ' * bool(doubt)}{doubt}."
    )
    return {**found, "verdict": said, "sentence": sentence}


def facts(study: Study, arm: str, rows: list[dict]) -> dict:
    """Figures of one arm."""
    runs = study.runs(arm)
    parts: dict[str, list[dict]] = {}
    for row in rows:
        parts.setdefault(row["ability"], []).append(row)
    return {
        "title": study.arms[arm]["title"],
        "minutes": sum(map(training_seconds, runs)) / 60,
        "machines": [{key: run.events("start")[-1].get(key) for key in MACHINE} for run in runs],
        "curve": curve(runs),
        "blank_gap": runs[-1].events("image_ablation")[-1]["blank_gap"],
        "right": gain(rows, "right"),
        "white_pictures": gain(rows, "blank"),
        "looking": gain(rows, "right", rows, "blank"),
        "abilities": {ability: gain(part, "right") for ability, part in parts.items()},
    }


def result_of(study: Study) -> dict:
    """All figures, with what they say of the claims."""
    rows = {arm: load_json(study.out / arm / "answers.json") for arm in study.arms}
    arms = {arm: facts(study, arm, own) for arm, own in rows.items()}
    claims = {
        name: judge(arms[REFERENCE], arms[name], values, gain(rows[REFERENCE], "right", rows[name]), study.minutes)
        for name, values in study.arms.items()
        if "claim" in values
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = provenance([study.model(arm) for arm in arms], device)
    return {"minutes": study.minutes, "rule": RULE, "provenance": made, "arms": arms, "claims": claims}


def page(result: dict) -> str:
    """The table, a sentence for each claim and the rule, in Markdown."""
    rows = [
        {
            "arm": arm["title"],
            "minutes": f"{arm['minutes']:.1f}",
            "tokens": f"{arm['curve'][-1]['tokens']:,.0f}",
            "reply loss": f"{arm['curve'][-1]['cross_entropy']:.3f}",
            "reply accuracy": f"{arm['curve'][-1]['reply_accuracy']:.1%}",
            "blank gap": f"{arm['blank_gap']:.3f}",
            "right answers": f"{arm['right']['score']:.1%}",
            "95 % interval": " to ".join(f"{bound:.1%}" for bound in arm["right"]["interval"]),
            "white pictures": f"{arm['white_pictures']['score']:.1%}",
        }
        for arm in result["arms"].values()
    ]
    parts = (
        f"# The paper's claim, {result['minutes']:g} minutes of training for each arm",
        tabulate(rows, "keys", tablefmt="github", disable_numparse=True),
        "Loss and gap (what white pictures add to it) are nats per reply token of held-out samples; answers are free.",
        "\n".join(f"- {claim['sentence']}" for claim in result["claims"].values()),
        result["rule"],
        "![Curves and bars](claim.png)",
    )
    return "\n\n".join(parts) + "\n"


def draw(result: dict, path: Path) -> None:
    """Draw held-out loss over minutes and over tokens, and right answers by ability."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(17, 6))
    names, height = list(result["arms"][REFERENCE]["abilities"]), 0.8 / len(result["arms"])
    for place, arm in enumerate(result["arms"].values()):
        for axis, name in zip(axes, ("minutes", "tokens"), strict=False):
            loss = [point["cross_entropy"] for point in arm["curve"]]
            axis.plot([point[name] for point in arm["curve"]], loss, marker="o", label=arm["title"])
            axis.set(xlabel=f"{name} of training, distillation's too", ylabel="held-out nats per reply token")
        scores = [arm["abilities"][name]["score"] for name in names]
        axes[2].barh([row + place * height for row in range(len(names))], scores, height, align="edge")
    axes[0].legend()
    axes[2].set_yticks([row + 0.4 for row in range(len(names))], names)
    axes[2].set(xlim=(0, 1), xlabel="share of right answers")
    axes[2].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, StopRunError) as error:
        sys.exit(f"paper_claim: {error}")
