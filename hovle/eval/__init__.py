"""Evaluation: what a model scores, and what goes on inside it.

  hovle eval benchmarks    scores on the paper's benchmarks, or on questions that need no network
  hovle eval skills        what a model reads, names, counts, ... on held-out pictures drawn here
  hovle eval attention     where each layer and each answer token looks, one model or two side by side
  hovle eval embeddings    how close image and text embeddings are to the language model's words
  hovle eval retention     perplexity and five text tasks, the bare language model against each stage

`hovle eval attention --help` and so on explain more.
"""

import argparse

ACTIONS = {
    "benchmarks": "hovle.eval.benchmarks.command",
    "skills": "hovle.eval.skills.command",
    "attention": "hovle.eval.analyses.attention",
    "embeddings": "hovle.eval.analyses.embeddings",
    "retention": "hovle.eval.analyses.retention",
}
"""What can be evaluated -> the module that does."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the first argument of `hovle eval`; each action has options of its own."""
    parser.add_argument("action", choices=ACTIONS, help="what to evaluate")


def run(args: argparse.Namespace) -> int:
    """Never reached: actions are run by their own modules."""
    raise ValueError(f"name the evaluation first: hovle eval {args.action}")
