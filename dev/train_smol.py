"""Build the mix and train hovle-smol's stages on this machine in the minutes there are; nothing is fetched.

    python dev/train_smol.py OUT --cache CACHE --replay replay.jsonl --minutes 12

CACHE is what `hovle fetch demo smol unseen` filled elsewhere (HOVLE_CACHE). The mix is drawn on all cores, as many
pictures of each skill as --size says; each stage first takes a few steps to see how long one takes, then as many as
its share of the minutes left allows. Checkpoints are written as the recipes say: the same command goes on after an
interruption, with the steps that were planned. At the end the last model lies in OUT/pieces, in pieces of 16 MiB that
`dev/pieces.py join` puts together; after an interruption, `dev/pieces.py cut` does the same with any stage's model.

Arguments `key=value` change all recipes, `STAGE:key=value` one: rows_per_batch=32 on a GPU, and, where pictures are
seen once or twice only, distillation:teacher.0.cache=null for each teacher. Filling a cache takes of the minutes.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from pieces import cut

STAGES = {"letters": 0.1, "lines": 0.1, "distillation": 0.3, "alignment": 0.35, "instruction_tuning": 0.15}
"""Stage -> its share of the minutes for training, as far as those before it keep to theirs."""

PROBE = (
    *("num_steps=8", "log_every=1", "validate_every=0", "checkpoint_every=0", "num_validation_batches=1"),
    *("image_ablation=false", "stop_when_images_ignored=false", "stop_when_forgetting=null"),
)
"""Overrides of the steps that are timed; the first half of them also compiles."""

PIECES = "pieces"


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of data, runs and pieces")
    parser.add_argument("overrides", nargs="*", metavar="[STAGE:]key=value", help="fields of all recipes or of one")
    parser.add_argument("--cache", type=Path, required=True, help="filled by `hovle fetch` beforehand")
    parser.add_argument("--replay", type=Path, required=True, help="what `hovle data replay` wrote")
    parser.add_argument("--minutes", type=float, required=True, help="for all stages; the mix comes on top")
    parser.add_argument("--size", default="small", help="of the mix: small, full or pictures of each skill (small)")
    parser.add_argument("--skills", nargs="+", help="only these of the mix")
    parser.add_argument("--assets", type=Path, help="folder of unpacked assets to draw from instead of the cache")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw (all cores)")
    args = parser.parse_intermixed_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "nothing").mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "HOVLE_CACHE": str(args.cache.absolute()),
        "HOVLE_DOWNLOADS": str((args.out / "nothing").absolute()),  # what is missing is told, not fetched
        "HF_HUB_OFFLINE": "1",
    }
    build(args, environment)
    ends_at = time.time() + 60 * args.minutes
    for stage in STAGES:
        train(stage, args, environment, ends_at)
    last = args.out / "runs" / "smol" / stage / "model"
    shutil.rmtree(args.out / PIECES, ignore_errors=True)  # of an earlier call
    say(f"{args.out / PIECES}: {cut(last, args.out / PIECES)} pieces of {last}")
    return 0


def build(args: argparse.Namespace, environment: dict[str, str]) -> None:
    """Draw the mix, or what is missing of it."""
    (args.out / "data").mkdir(exist_ok=True)
    shutil.copyfile(args.replay, args.out / "data" / "replay.jsonl")
    options = ["--replay", "data/replay.jsonl", "--workers", str(args.workers)]
    options += ["--assets", str(args.assets.absolute())] if args.assets else []
    options += ["--skills", *args.skills] if args.skills else []
    hovle(["data", "build", "smol", "--out", "data/smol", "--size", args.size, *options], args, environment)


def train(stage: str, args: argparse.Namespace, environment: dict[str, str], ends_at: float) -> None:
    """Train a stage, or go on with it; how many steps it takes is planned once and kept."""
    plan, overrides = args.out / f"{stage}.json", overrides_of(stage, args.overrides)
    if not plan.is_file():
        probe = args.out / "runs" / "probe" / stage
        shutil.rmtree(probe, ignore_errors=True)
        settings = [f"output={probe.relative_to(args.out)}", *overrides, *PROBE]
        hovle(["train", f"smol/{stage}", *settings], args, environment)
        seconds = step_seconds(probe / "log.jsonl")
        left = [share for name, share in STAGES.items() if list(STAGES).index(name) >= list(STAGES).index(stage)]
        num_steps = max(1, int((ends_at - time.time()) * STAGES[stage] / sum(left) / seconds))
        shutil.rmtree(probe)
        plan.write_text(json.dumps({"num_steps": num_steps, "step_seconds": seconds}) + "\n", encoding="utf-8")
    planned = json.loads(plan.read_text(encoding="utf-8"))
    say(f"{stage}: {planned['num_steps']} steps of {planned['step_seconds']:.2f} s")
    settings = [*overrides, f"num_steps={planned['num_steps']}", "--resume"]
    hovle(["train", f"smol/{stage}", *settings], args, environment)


def overrides_of(stage: str, overrides: list[str]) -> list[str]:
    """Those for all stages, and those for this one without its name; ValueError for another name."""
    found = []
    for override in overrides:
        name, separator, rest = override.partition(":")
        if not separator or "=" in name:
            found.append(override)
        elif name not in STAGES:
            raise ValueError(f"{override!r}: there is no stage {name!r}; there are {', '.join(STAGES)}.")
        elif name == stage:
            found.append(rest)
    return found


def step_seconds(log: Path) -> float:
    """Seconds of a step, by the second half of a run's."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    taken = [entry["elapsed_seconds"] for entry in entries if "event" not in entry]  # each since the line before
    return statistics.median(taken[len(taken) // 2 :])


def hovle(arguments: list[str], args: argparse.Namespace, environment: dict[str, str]) -> None:
    """Run a command in the output folder, where the recipes' paths lead."""
    say(f"hovle {' '.join(arguments)}")
    subprocess.run([sys.executable, "-m", "hovle", *arguments], cwd=args.out, env=environment, check=True)


def say(text: str) -> None:
    """Tell people."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"train_smol: stopped, {error}. The same command goes on.")
    except (ValueError, OSError) as error:
        sys.exit(f"train_smol: {error}")
