"""What holding the language costs: a step of each stage of a recipe with its language block and without, in turn.

    python dev/language_price.py demo --out eval/results/demo/language_price.json

Both see as many rows of pictures. Steps are compiled as training runs them and do all but move the weights; of each
stage the fastest pass of either kind counts. Stages start from a new model: what they cost does not depend on weights.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from hovle.machine.speed import choose_dtype
from hovle.train.config import StageConfig, load_stage
from hovle.train.parallel import make_accelerator
from hovle.train.run.benchmark_step import BenchmarkStep

STAGES = ("distillation", "alignment", "instruction_tuning")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="folder of the three stages, such as demo")
    parser.add_argument("--passes", type=int, default=5, help="of each kind (5)")
    parser.add_argument("--steps", type=int, default=2, help="of a pass (2)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    accelerator = make_accelerator()
    first = load_stage(f"{args.recipe}/{STAGES[0]}").model
    report = {}
    for stage in STAGES:
        held = dataclasses.replace(load_stage(f"{args.recipe}/{stage}"), model=first, learning_rate=0.0)
        dtype = choose_dtype(held.dtype, accelerator.device)
        kinds = {
            name: BenchmarkStep(config, accelerator, dtype, args.steps)
            for name, config in (("held", held), ("free", without_language(held)))
        }
        passes = [{name: kind.step_all() for name, kind in kinds.items()} for _ in range(args.passes + 1)]
        report[stage] = {name: min(one[name] for one in passes[1:]) for name in kinds}  # the first pass compiles
        report[stage]["ratio"] = report[stage]["held"] / report[stage]["free"]
        print(stage, {name: round(value, 3) for name, value in report[stage].items()}, flush=True)  # noqa: T201
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def without_language(config: StageConfig) -> StageConfig:
    """The same stage on its rows of pictures alone; ValueError where text shares a row with them, or there is none."""
    if config.language is None:
        raise ValueError(f"The recipe of {config.output} has no language block whose price could be measured.")
    num_text, length = config.language.layout(config.rows_per_batch, config.row_length)
    if length != config.row_length:
        raise ValueError(
            f"A share of {config.language.share} puts {length} tokens of text into a row of {config.row_length} in "
            f"{config.output}, so both kinds would not see the same pictures: give it whole rows."
        )
    return dataclasses.replace(
        config, language=None, stop_when_forgetting=None, rows_per_batch=config.rows_per_batch - num_text
    )


if __name__ == "__main__":
    main()
