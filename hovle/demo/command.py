"""Ask a model twelve questions about twelve pictures of different kinds, and draw what it answers.

examples:
  hovle demo                                                   the model that ships with hovle
  hovle demo --model runs/demo/instruction_tuning/model        another one
  hovle demo train                                             let a small model learn to see on this machine

The pictures ship with hovle: a word, a pictogram, an icon, a traffic sign, a flag, an object in three dimensions,
things to count, a chart, a clock, clothing, shapes, and one that lacks what is asked for. All are of the parts that
`hovle data build` holds out: fonts, drawings, models, photographs or distortions that training has none of. Wrong
answers are shown as wrong.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..assets import vqa_questions
from ..charts import load_pyplot
from ..eval.skills.grading import is_right
from ..eval.vqa import answer_questions
from ..loading import load_model, load_processor
from ..machine.speed import fastest_dtype
from .answers import Answer, draw_answers
from .questions import Asked, load_questions

ACTIONS = {"train": "hovle.demo.training"}
"""What `hovle demo` does beside asking."""

MAX_NEW_TOKENS = 24
"""Of an answer; the longest expected one takes about half."""

COLUMNS = 4
"""Pictures in a row of the drawing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle demo`."""
    parser.add_argument("--model", default="smol", help="model folder, Hub id, or name of a shipped model (smol)")
    parser.add_argument("--picture", type=Path, default=Path("demo.png"), help="where to draw answers (demo.png)")


def run(args: argparse.Namespace) -> int:
    """Ask, print, draw; wrong answers do not change the exit code."""
    pyplot = load_pyplot()  # what is missing is told before a model is loaded
    if not args.picture.parent.is_dir():
        raise ValueError(f"There is no folder {args.picture.parent} to draw {args.picture.name} in.")
    asked = load_questions()
    started_at = time.perf_counter()
    answers = ask(args.model, asked)
    seconds = time.perf_counter() - started_at
    for shown, answer in zip(asked, answers, strict=True):
        _say(f"{shown.title:<22}  {answer.question:<42} -> {answer.said:<20} {answer.mark}")
    score = f"{sum(answer.is_right for answer in answers)} of {len(answers)} answers are right"
    draw_answers(pyplot, args.picture, answers, score, COLUMNS)
    _say(f"{score} ({seconds:.0f} s). Pictures, questions and answers: {args.picture}")
    _say(f"Talk with it: hovle chat --model {args.model} --image PICTURE")
    return 0


def ask(model_name: str, asked: Sequence[Asked]) -> list[Answer]:
    """Let a model answer, one question after the other.

    Args:
        model_name: Model folder or Hub id.
        asked: Pictures and questions.

    Returns:
        The answers, in the same order.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(model_name)
    model = load_model(model_name, dtype=fastest_dtype(device)).to(device).eval()
    texts = answer_questions(
        model,
        processor,
        [vqa_questions.Question(shown.question.text, shown.question.answer, shown.picture) for shown in asked],
        batch_size=1,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return [
        Answer(shown.picture, shown.question.text, text, shown.question.answer, is_right(shown.question, text))
        for shown, text in zip(asked, texts, strict=True)
    ]


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - this is the command's output
