"""Run one training stage from a YAML recipe, or report on runs.

examples:
  hovle train demo/distillation                         a recipe that ships with the package
  hovle train my_stage.yaml                             your own file
  hovle train demo/alignment num_steps=20 model.checkpoint=runs/demo/distillation/model
  hovle train my_stage.yaml --dry-run                   show what would be trained on what
  hovle train my_stage.yaml --resume                    continue the newest checkpoint, exactly; start where none is
  hovle train report runs/demo/alignment                curves and a page of figures, also of a run that goes on
  torchrun --nproc-per-node 2 -m hovle.train my_stage.yaml sharding=full
"""

import argparse
import sys

from ..cli import main
from .config import OVERRIDE, load_stage
from .run.stage import run_stage

ACTIONS = {"report": "hovle.train.monitor.report"}
"""What `hovle train` does beside training; a recipe of such a name is given as ./NAME."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle train`."""
    parser.add_argument("recipe", help="YAML file, or the name of a shipped recipe such as demo/alignment")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace fields; dots reach nested ones")
    parser.add_argument("--resume", action="store_true", help="continue the output folder's run, or start it")
    parser.add_argument("--dry-run", action="store_true", help="set up, show model and data, take no step")


def run(args: argparse.Namespace) -> int:
    """Train one stage; return the exit code."""
    folder = run_stage(load_stage(args.recipe, args.overrides), resume=args.resume, dry_run=args.dry_run)
    if not args.dry_run:
        from accelerate import PartialState  # an extra, which the stage has used

        PartialState().print(f"Model saved in {folder}")  # on the main process
    return 0


def run_recipe(argv: list[str], default: str | None = None) -> int:
    """Do what `hovle train` does with a command line, with a recipe to take where it names none."""
    names_recipe = any(not argument.startswith("-") and not OVERRIDE.match(argument) for argument in argv)
    return main(["train", *([default] if default and not names_recipe else []), *argv])


if __name__ == "__main__":
    sys.exit(run_recipe(sys.argv[1:]))
