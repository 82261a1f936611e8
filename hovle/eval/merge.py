"""Mix two models linearly, part by part, and measure each mixture.

examples:
  hovle merge runs/demo/instruction_tuning/model asset:smollm2-135m-instruct --weight 0.3 --out models/kept
  hovle merge A B --weight 0 0.25 0.5 0.75 1 --out models/mixed       folders models/mixed/0, models/mixed/0.25, ...
  hovle merge A B --weight 0 0.25 0.5 --holistic 0 --score            a table; no folder is left

A weight is the share of B: 0 is A, 1 is B. It holds for all parts, unless --stem, --holistic or --language gives one a
share of its own. Where B is the bare language model, only the language part is mixed. Shapes and configs must agree.
Tokenizer and processor are A's. --score measures perplexity over the bare language model's (B, or --language-model, or
what A's folder records) and easy-VQA's balanced test questions.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tabulate import tabulate

from ..assets import easy_vqa, resolve_asset
from ..assets.vqa_questions import draw_questions
from ..convert.merge import PARTS, Merger, Weights
from ..language.text_perplexity import RetentionConfig, TextRetention, read_record
from ..loading import load_bare_model, load_model, load_processor
from ..machine.speed import fastest_dtype
from ..options import positive
from .vqa import answer_questions, exact_match


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hovle merge`."""
    parser.add_argument("first", metavar="A", help="HoVLE folder or Hub id")
    parser.add_argument("second", metavar="B", help="another of the same shape, or the bare language model")
    parser.add_argument("--weight", type=float, nargs="+", required=True, metavar="W", help="share of B")
    for part in PARTS:
        parser.add_argument(f"--{part}", type=float, metavar="W", help=f"share of B in the {PART_NAMES[part]}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="model folder; of several weights, around theirs")
    parser.add_argument("--score", action="store_true", help="measure every mixture and print a table")
    parser.add_argument("--language-model", metavar="MODEL", help="the bare language model, for --score")
    parser.add_argument("--text", default="python_docs", metavar="FILE", help="UTF-8 text for --score (python_docs)")
    parser.add_argument("--questions", type=positive, default=1000, metavar="N", help="of easy-VQA (1000)")


PART_NAMES = {"stem": "patch stem", "holistic": "holistic layers", "language": "language model"}


def run(args: argparse.Namespace) -> int:
    """Write the mixtures, score them, or both."""
    if args.out is None and not args.score:
        raise ValueError("Name a folder with --out, or measure with --score.")
    merger = Merger(args.first, resolve_asset(args.second))
    own = {part: getattr(args, part) for part in PARTS if getattr(args, part) is not None}
    if merger.is_bare and (given := sorted(own.keys() - {"language"})):
        raise ValueError(f"{args.second} is a bare language model, which has no {' or '.join(given)} part to mix.")
    score = make_score(args, merger) if args.score else None
    rows = []
    for weight in args.weight:
        with _folder(args.out, weight, len(args.weight) > 1) as folder:
            merger.write(folder, Weights(**{**dict.fromkeys(PARTS, weight), **own}))
            if args.out is not None:
                print(f"weight {weight:g}: {folder}")  # noqa: T201 - this is the command's output
            if score is not None:
                rows.append((f"{weight:g}", *score(folder)))
    if rows:
        print(tabulate(rows, ("weight", "perplexity ratio", "easy-VQA balanced"), tablefmt="github"))  # noqa: T201
    return 0


@contextlib.contextmanager
def _folder(out: Path | None, weight: float, is_one_of_many: bool) -> Iterator[Path]:
    """Where a mixture goes; without a place of its own it is deleted again."""
    if out is not None:
        yield out / f"{weight:g}" if is_one_of_many else out
        return
    with tempfile.TemporaryDirectory() as parent:
        yield Path(parent) / "model"


def make_score(args: argparse.Namespace, merger: Merger):
    """What measures a model folder; ValueError where nothing tells the bare language model's perplexity."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = fastest_dtype(device)
    processor = load_processor(merger.folder)
    retention = TextRetention(RetentionConfig(source=args.text), processor)
    questions = draw_questions(easy_vqa() / "test", args.questions, balanced=True)
    bare = _bare_perplexity(args, merger, retention, device)

    def score(folder: Path) -> tuple[str, str]:
        model = load_model(folder, dtype=dtype).to(device).eval()
        perplexity = retention.perplexity(model, contextlib.nullcontext())
        answers = answer_questions(model, processor, questions)
        return f"{perplexity / bare:.4f}", f"{exact_match(answers, questions):.1%}"

    return score


def _bare_perplexity(
    args: argparse.Namespace, merger: Merger, retention: TextRetention, device: torch.device
) -> float:
    name = args.language_model or (args.second if merger.is_bare else None)
    if name is not None:
        bare = load_bare_model(resolve_asset(name), fastest_dtype(device)).to(device).eval()
        return retention.perplexity(bare, contextlib.nullcontext())
    record = read_record(merger.folder)
    if record is None or record.fingerprint != retention.fingerprint:
        raise ValueError(
            f"{merger.folder} does not record the bare language model's perplexity on {args.text}: name the model as "
            "--language-model."
        )
    return record.bare_perplexity
