"""Ask one question about many pictures; answers come as JSON lines.

examples:
  hovle caption photos --model DIR --prompt "Describe the picture." --out captions.jsonl
  hovle caption a.jpg b.png list.txt --model DIR --prompt "What is it?" --out what.jsonl
  hovle caption data.parquet --model DIR --prompt "What is it?" --out what.jsonl --column photo
  hovle caption photos --model DIR --prompt "Describe the picture." --out captions.jsonl --resume

Sources are folders with their subfolders, pictures, lists of files (.txt, a path per line, relative to the list), and
data sets: parquet, WebDataset, folders of `save_to_disk`, Hub ids (with hovle[data]). A line of the results is

  {"name": "photos/a.jpg", "caption": "A cat.", "num_tokens": 4, "is_cut": false}
  {"name": "photos/b.jpg", "error": "cannot be decoded as a picture (...)"}

with the picture's path, or `SOURCE[row]` for a row of a data set, whose pictures are shown together. Whatever happens,
a result that was made is in the file; --resume makes those that are missing and tries errors again. When all are there
the file is put into the order of the input. Answers are the likeliest, token by token; in float32 they do not depend
on the batch size. The exit code is 1 where a picture has an error instead of an answer.
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..errors import printable
from ..loading import check_statistics_agree, load_model, load_processor
from ..model.processing_hovle import HoVLEProcessor
from ..options import positive
from ..version import __version__
from .captioner import Captioner, caption
from .results import Results
from .sources import find_items

SETTINGS = ("model", "prompt", "max_new_tokens", "dtype", "max_tiles", "uint8", "split", "column")
"""Arguments that results depend on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle caption`."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="folder, picture, list of files or data set")
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what is asked about each picture")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="where results go, as JSON lines")
    parser.add_argument("--resume", action="store_true", help="go on with the results that are in --out")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="pictures at once (default: 8)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="longest answer, in tokens")
    parser.add_argument("--max-tiles", type=positive, metavar="N", help="most tiles of a picture (default: model's)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto, as the checkpoint (default)")
    parser.add_argument("--device", help="such as cuda:1 (default: the first GPU, or the CPU)")
    parser.add_argument(
        "--uint8",
        action="store_true",
        help="cut and resize pictures as bytes, as training does: less work than the released models' exact pixels",
    )
    parser.add_argument("--workers", type=positive, default=min(8, os.cpu_count() or 1), help="threads that decode")
    parser.add_argument("--split", help="part of a data set")
    parser.add_argument("--column", metavar="NAME", help="of a data set, where its pictures are (default: image)")


def run(args: argparse.Namespace) -> int:
    """Caption what has no result yet; exit code 1 where a picture has an error."""
    items, left_aside = find_items(args.sources, args.split, args.column)
    for line in left_aside:
        _say(line)
    by_name = {item.name: item for item in items}
    settings = {"hovle": __version__, **{name: getattr(args, name) for name in SETTINGS}}
    with Results(args.out, [item.name for item in items], settings, args.resume) as results:
        missing = [by_name[name] for name in results.missing]
        if missing:
            _caption(missing, len(by_name), results, args)
        lines = results.finish()
    failed = [line for line in lines if "error" in line]
    for entry in failed[:3]:
        _say(f"{entry['name']}: {entry['error']}")
    _say(f"{len(lines) - len(failed):,} of {len(lines):,} pictures have an answer, {args.out} has them all.")
    return 1 if failed else 0


def _caption(missing: list, num_all: int, results: Results, args: argparse.Namespace) -> None:
    captioner = load_captioner(args)
    pool = ThreadPoolExecutor(args.workers, thread_name_prefix="hovle-pictures")
    try:
        with tqdm(total=num_all, initial=num_all - len(missing), unit="picture") as bar:
            for lines in caption(missing, captioner, pool, args.batch_size):
                results.add(lines)
                bar.update(len(lines))
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"--batch-size {args.batch_size} takes more memory than there is ({error!s:.200}). What was answered is "
            f"in {args.out}: go on with --resume and a smaller --batch-size, or fewer --max-tiles."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def load_captioner(args: argparse.Namespace) -> Captioner:
    """The model with its processor, as the options say."""
    processor = load_tiling_processor(args.model, args.max_tiles)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(args.model, dtype=args.dtype).to(device).eval()
    if args.uint8:
        processor.image_processor.do_rescale = processor.image_processor.do_normalize = False
        check_statistics_agree(processor.image_processor, model.config)
    return Captioner(model, processor, args.prompt, args.max_new_tokens)


def load_tiling_processor(model: str, max_tiles: int | None) -> HoVLEProcessor:
    """A model's processor, which cuts pictures into so many tiles at most; None for as many as its settings say."""
    processor = load_processor(model)
    if max_tiles is not None:
        processor.image_processor.min_tiles = min(max_tiles, processor.image_processor.min_tiles)
        processor.image_processor.max_tiles = max_tiles
    return processor


def _say(text: str) -> None:
    sys.stderr.write(printable(text) + "\n")
