"""Build training and test pictures with questions, answers and regions, drawn from fetched fonts, drawings and words.

examples:
  hovle data build smol --out data/smol                          every skill at full size
  hovle data build smol --out data/trial --size small            less of all, to look at
  hovle data build smol --out data/reading --skills reading --workers 16
  hovle data build smol --list                                   the skills there are

Each skill becomes a folder of parquet shards that a recipe reads as `source: huggingface`. A build that was stopped or
killed goes on where it is run again, and gives the same files; one that is complete is only looked through. Beside the
shards lie card.json with exact counts, README.md with sources and licenses, a contact sheet for each skill, and
no-picture.jsonl: questions without a picture, with replies that say so, for a `chat` source.
"""

import argparse
import os
from pathlib import Path

from tabulate import tabulate

from .building import Build, Pace, open_once, run_build
from .card import write_card
from .no_picture import write_no_picture
from .registry import SKILLS, skill_class
from .skill import SIZES

MIXES = {"smol": tuple(SKILLS)}
"""Name -> skills; that of messages takes part where there are messages."""

HOURS_FOR = 100_000
"""Pictures the hours are told for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle data build`."""
    parser.add_argument("mix", choices=MIXES, help="what to build")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the build")
    parser.add_argument("--skills", nargs="+", metavar="NAME", help="only these skills of the mix")
    parser.add_argument(
        "--size", default="full", help="small, full, or so many pictures of each skill to train on (full)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another one gives other pictures (0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (all cores)")
    parser.add_argument("--shard-size", type=int, default=500, metavar="N", help="pictures of a file (500)")
    parser.add_argument("--assets", type=Path, metavar="DIR", help="folder of unpacked assets instead of the cache")
    parser.add_argument(
        "--replay", type=Path, metavar="FILE", help="draw messages of this file of `hovle data replay`, too"
    )
    parser.add_argument("--list", action="store_true", help="only show the skills")


def run(args: argparse.Namespace) -> int:
    """Run `hovle data build`; return the exit code."""
    drawable = (name for name in MIXES[args.mix] if name != "replay" or args.replay or args.list)
    names = tuple(dict.fromkeys(args.skills or drawable))
    classes = [skill_class(name) for name in names]
    if args.list:
        rows = [(found.name, *(found.sizes[size]["train"] for size in SIZES), found.description) for found in classes]
        print(tabulate(rows, ("SKILL", *map(str.upper, SIZES), "WHAT"), tablefmt="plain"))  # noqa: T201
        return 0
    if args.out is None:
        raise ValueError("Name the folder of the build: --out DIR.")
    for option in ("workers", "shard_size"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} is {getattr(args, option)}; expected 1 or more.")
    build = Build(args.out, names, _size(args.size), args.seed, args.shard_size, args.assets, args.replay)
    paces = run_build(build, args.workers)
    skills = [open_once(name, build) for name in names]
    write_card(skills, build)
    write_no_picture(build, skills)
    for line in describe_paces(paces):
        print(line)  # noqa: T201 - this is the command's output
    print(f"Built {', '.join(names)} in {args.out}; see {args.out / 'README.md'}")  # noqa: T201
    return 0


def _size(text: str) -> str | int:
    if text in SIZES:
        return text
    if not text.isdecimal() or not int(text):
        raise ValueError(f"--size is {text!r}; expected {', '.join(SIZES)} or a number of pictures.")
    return int(text)


def describe_paces(paces: list[Pace]) -> list[str]:
    """How fast each skill was drawn, and how long many pictures of it would take."""
    lines = []
    for name in dict.fromkeys(pace.skill for pace in paces):
        count = sum(pace.count for pace in paces if pace.skill == name)
        seconds = sum(pace.seconds for pace in paces if pace.skill == name)
        hours = HOURS_FOR * seconds / count / 3600
        lines.append(f"{name}: {count / seconds:.1f} pictures/s per process, {hours:.1f} h for {HOURS_FOR:,}")
    return lines
