"""Measure what a model can do.

  hovle eval benchmarks    score a model on the paper's benchmarks, or on questions that need no network

Each action explains itself: `hovle eval benchmarks --help`.
"""

import argparse

ACTIONS = {
    "benchmarks": "hovle.eval.benchmarks",
}
"""What can be measured -> the module that does."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the first argument of `hovle eval`; each action has options of its own."""
    parser.add_argument("action", choices=ACTIONS, help="what to measure")


def run(args: argparse.Namespace) -> int:
    """Never reached: actions are run by their own modules."""
    raise ValueError(f"name the action first: hovle eval {args.action}")
