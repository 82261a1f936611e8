"""Score a model skill by skill on held-out pictures that are drawn here, by free generation.

examples:
  hovle eval skills MODEL                                  all abilities, 500 pictures or more of each
  hovle eval skills MODEL --items 20 --only reading clocks a quick look
  hovle eval skills MODEL --ocr --out eval/results/smol    as committed results are to be made
  hovle eval skills --list                                 abilities, and what is asked of each

Words in unseen fonts, drawings in unseen styles, new views of objects, charts of another tool, ... : what is drawn is
the test part of `hovle data build`, which shares nothing with its training part that would tell (`hovle fetch smol
unseen` brings what it is drawn from). Each score stands beside what one constant answer gets and what the model
answers to white pictures, with a 95 % interval over what pictures were made from.

Writes skills.json (scores), answers.jsonl (every answer), README.md (the table) and examples.png.
"""

import argparse
import dataclasses
import functools
from pathlib import Path

import torch
from tabulate import tabulate

from ...assets.vqa_questions import Question
from ...files.model_folder import refuse_missing_folder
from ...loading import load_model, load_processor
from ...machine.speed import dtype_name, fastest_dtype
from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ...model.processing_hovle import HoVLEProcessor
from ...options import positive
from ...synthesis.naming import Naming
from ...synthesis.registry import skill_class
from ...synthesis.skill import AssetFolders
from ..results import provenance
from ..vqa import answer_questions
from . import ocr
from .bars import BARS, EASY_VQA, Bar
from .grading import check_installed
from .items import Drawer, Item, without_picture
from .report import FILES, METRICS, percent, table, write
from .scoring import Answered, result_of

FORMAT = 1
"""Of `skills.json`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle eval skills`."""
    parser.add_argument("model", nargs="?", help="model folder or Hub id")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=BARS, help="only these abilities (all)")
    parser.add_argument(
        "--items", type=positive, metavar="N", help="items of each ability (500, and all questions of easy-VQA)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another one draws other pictures (0)")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="questions at once (32)")
    parser.add_argument("--out", type=Path, default=Path("skills"), metavar="DIR", help="default: skills")
    parser.add_argument(
        "--no-neighbours", action="store_true", help="leave out what nearest neighbours get, which takes minutes"
    )
    parser.add_argument("--ocr", action="store_true", help="let RapidOCR read the same pictures (hovle[ocr])")
    parser.add_argument("--assets", type=Path, metavar="DIR", help="folder of unpacked assets instead of the cache")
    parser.add_argument("--list", action="store_true", help="only show the abilities")


def run(args: argparse.Namespace) -> int:
    """Ask, grade, write; whether what is asked for is met does not change the exit code."""
    bars = [BARS[name] for name in dict.fromkeys(args.only or BARS)]
    if args.list:
        rows = [
            (bar.name, METRICS[bar.metric], "" if bar.bound is None else percent(bar.bound), bar.title) for bar in bars
        ]
        print(tabulate(rows, ("ABILITY", "MEASURED", "ASKED FOR", "WHAT"), tablefmt="plain"))  # noqa: T201
        return 0
    if args.model is None:
        raise ValueError("name a model folder or Hub id (or --list).")
    refuse_missing_folder(args.model)
    check_installed()
    rivals = {*(["ocr"] if args.ocr else []), *([] if args.no_neighbours else ["neighbours"])}
    if args.ocr:
        ocr.check_installed()
    for name in {name for bar in bars for name in bar.skills} - {EASY_VQA}:
        skill_class(name)  # what it lacks is told before anything is drawn
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = fastest_dtype(device)
    processor = load_processor(args.model)
    model = load_model(args.model, dtype=dtype).to(device).eval()
    drawer = Drawer(AssetFolders(args.assets), args.seed)
    answered = []
    for bar in bars:
        answered.append(ask(model, processor, bar, drawer.items(bar, args.items), args.batch_size))
        if bar.rival in rivals:
            answered[-1] = with_rival(answered[-1], drawer)
        result = result_of(answered[-1])
        print(f"{bar.name}: {percent(result['score'])} ({METRICS[bar.metric]})", flush=True)  # noqa: T201
    result = {
        "format": FORMAT,
        "seed": args.seed,
        "dtype": dtype_name(dtype),
        "provenance": provenance([args.model], device),
        "abilities": [result_of(found) for found in answered],
    }
    write(args.out, result, answered)
    print(f"\n{table(result)}\n\nWritten: {', '.join(str(args.out / name) for name in FILES)}")  # noqa: T201
    return 0


def ask(
    model: HoVLEForConditionalGeneration, processor: HoVLEProcessor, bar: Bar, items: list[Item], batch_size: int
) -> Answered:
    """Let a model answer the items of an ability, and again with white pictures."""
    answer = functools.partial(
        answer_questions, model, processor, batch_size=batch_size, max_new_tokens=bar.max_new_tokens
    )
    if bar.metric == "blind":
        return Answered(bar, items, answer([_asked(item, None) for item in items], description=bar.name), None)
    blank = without_picture(items)
    return Answered(
        bar,
        items,
        answer([_asked(item, item.image) for item in items], description=bar.name),
        answer([_asked(item, item.image) for item in blank], description=f"{bar.name}, white pictures"),
    )


def with_rival(found: Answered, drawer: Drawer) -> Answered:
    """The same with what another network says."""
    if found.bar.rival == "ocr":
        return dataclasses.replace(found, rival_answers=ocr.read_items(found.items))
    from .neighbours import Neighbours  # needs timm

    [name] = found.bar.skills
    skill = drawer.skill(name)
    assert isinstance(skill, Naming)  # others have no drawings
    return dataclasses.replace(found, rival_answers=Neighbours().names(skill, found.items, drawer.seed))


def _asked(item: Item, picture: bytes | None) -> Question:
    return Question(item.question.text, item.question.answer, picture)
