"""Training data: what a recipe's sources hold, pictures drawn and text written for training.

  hovle data doctor RECIPE                        look through the data of a recipe before a run
  hovle data build smol --out DIR                 draw pictures with questions, answers and regions
  hovle data replay MODEL --tokens N --out FILE   let a language model write the text on which it is held

`hovle data ACTION --help` explains more.
"""

import argparse

ACTIONS = {
    "doctor": "hovle.train.data.doctor",
    "build": "hovle.synthesis.command",
    "replay": "hovle.language.replay",
}
"""What can be done -> the module that does."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the first argument of `hovle data`; each action has options of its own."""
    parser.add_argument("action", choices=ACTIONS, help="what to do")


def run(args: argparse.Namespace) -> int:
    """Never reached: actions are run by their own modules."""
    raise ValueError(f"name the action first: hovle data {args.action}")
