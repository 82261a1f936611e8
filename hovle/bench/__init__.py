"""Measure how fast a part of hovle is on this machine, beside the usual way of doing it.

  hovle bench data     from picture files to tiles, beside Pillow
  hovle bench caption  many pictures and one question, beside a loop over transformers' pipeline
  hovle bench engines  answers in torch, llama.cpp, OpenVINO and ONNX Runtime, beside one another
  hovle bench serve    requests with a picture, from one client and from many at a time
  hovle bench generate TTFT and tokens a second beside InternVL and SmolVLM, what they cost, and the tokens
  hovle bench train    training steps, beside transformers' Trainer and this machine's peak

Close other programs first. Results are JSON with the machine they were measured on; those in eval/results/speed are
the ones documents quote. `hovle bench PART --help` explains more.
"""

import argparse

ACTIONS = {
    "data": "hovle.bench.data",
    "caption": "hovle.bench.caption",
    "generate": "hovle.bench.generate",
    "engines": "hovle.bench.engines",
    "serve": "hovle.bench.serve",
    "train": "hovle.bench.train",
}
"""What can be measured -> the module that does."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the first argument of `hovle bench`; each action has options of its own."""
    parser.add_argument("action", choices=ACTIONS, help="what to measure")


def run(args: argparse.Namespace) -> int:
    """Never reached: actions are run by their own modules."""
    raise ValueError(f"name the part first: hovle bench {args.action}")
