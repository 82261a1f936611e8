"""Time `hovle caption` beside a loop over transformers' pipeline: the same model, pictures, question, greedy answers.

The model is loaded once; both ways answer a few pictures first, then take turns. Timed is all from files to answers,
for `hovle caption` to the lines on the disk. The best round counts, the median shows how quiet the machine was. How
many answers are the same in both stands beside the speed: all of them in float32 without --uint8.

  hovle bench caption --model DIR                                    500 generated photographs, 500 x 375
  hovle bench caption --model DIR --out eval/results/speed/caption.json
  hovle bench caption --model DIR --pictures photos --uint8 --batch-size 32
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline

from ..caption.captioner import Captioner, caption
from ..caption.command import load_captioner, load_tiling_processor
from ..caption.results import Results
from ..caption.sources import find_items
from ..machine.facts import environment
from .data import pictures_for

NUM_WARMING = 2
"""Pictures each way answers before it is timed."""


def caption_pictures(paths: Sequence[Path], captioner: Captioner, batch_size: int, workers: int) -> list[str]:
    """Captions as `hovle caption` makes them, to the file of results."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        items, _ = find_items([str(path) for path in paths])
        with Results(Path(folder) / "results.jsonl", [item.name for item in items], {}, resume=False) as results:
            for lines in caption(items, captioner, pool, batch_size):
                results.add(lines)
            lines = results.finish()
    for line in lines:
        if "error" in line:
            raise ValueError(f"{line['name']}: {line['error']} Time pictures that can be read: take it out.")
    return [line["caption"] for line in lines]


def loop_over_pipeline(paths: Sequence[Path], answer: Any, prompt: str, max_new_tokens: int) -> list[str]:
    """Captions as a loop over transformers' pipeline makes them."""
    captions = []
    for path in paths:
        content = [{"type": "image", "path": str(path)}, {"type": "text", "text": prompt}]
        [found] = answer(
            text=[{"role": "user", "content": content}],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_full_text=False,
        )
        captions.append(found["generated_text"].strip())
    return captions


def measure_caption(
    ways: dict[str, Callable[[Sequence[Path]], list[str]]], paths: list[Path], num_rounds: int
) -> dict:
    """Let the two ways take turns over the pictures.

    Returns:
        Pictures per second of each (best round and median), their ratio, and how many answers are the same.
    """
    for way in ways.values():
        way(paths[:NUM_WARMING])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers = {}
    for _ in range(num_rounds):
        for name, way in ways.items():
            started_at = time.perf_counter()
            answers[name] = way(paths)
            seconds[name].append((time.perf_counter() - started_at) / len(paths))
    same = sum(one == other for one, other in zip(*answers.values(), strict=True))
    return {
        "pictures_per_second": {name: round(1 / min(values), 3) for name, values in seconds.items()},
        "median_pictures_per_second": {
            name: round(1 / statistics.median(values), 3) for name, values in seconds.items()
        },
        "caption_over_pipeline": round(min(seconds["pipeline"]) / min(seconds["caption"]), 2),
        "same_answers": f"{same} of {len(paths)}",
    }


def bench_caption(args: argparse.Namespace) -> dict:
    """Measure on the given or on generated pictures; return figures with their circumstances."""
    if min(args.rounds, args.num_pictures, args.batch_size, args.max_new_tokens, args.workers) < 1:
        raise ValueError("--rounds, --num-pictures, --batch-size, --max-new-tokens and --workers must be at least 1.")
    captioner = load_captioner(args)
    model = captioner.model
    processor = load_tiling_processor(args.model, args.max_tiles)  # whatever --uint8 does to the captioner's
    answer = pipeline("image-text-to-text", model=model, processor=processor, device=model.device)
    ways = {
        "caption": lambda paths: caption_pictures(paths, captioner, args.batch_size, args.workers),
        "pipeline": lambda paths: loop_over_pipeline(paths, answer, args.prompt, args.max_new_tokens),
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = pictures_for(args.pictures, args.num_pictures, Path(folder))
        figures = measure_caption(ways, paths, args.rounds)
    names = ("model", "pictures", "max_tiles", "prompt", "max_new_tokens", "batch_size", "workers", "uint8", "rounds")
    return {
        "bench": "caption",
        **{name: getattr(args, name) for name in names},
        "num_pictures": len(paths),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        **figures,
        "environment": {
            **environment("pillow", "simplejpeg"),
            "threads": torch.get_num_threads(),
            "date": time.strftime("%Y-%m-%d"),
        },
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle bench caption`."""
    parser.add_argument("--model", required=True, help="model folder or Hub id; random weights are as fast as trained")
    parser.add_argument("--out", metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--pictures", metavar="FOLDER", help="JPEG files to read (default: generated photographs)")
    parser.add_argument("--num-pictures", type=int, default=500, metavar="N", help="pictures (default: 500)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds of each way (default: 3)")
    parser.add_argument("--prompt", default="Describe the picture.", help="what is asked")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default: 32)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="of hovle caption (default: 8)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="its threads that decode (default: 2)")
    parser.add_argument("--max-tiles", type=int, metavar="N", help="most tiles of both (default: the model's)")
    parser.add_argument("--uint8", action="store_true", help="hovle caption cuts and resizes pictures as bytes")
    parser.add_argument("--dtype", default="auto", help="of both: float32, bfloat16 or auto, as the checkpoint")
    parser.add_argument("--device", help="of both (default: the first GPU, or the CPU)")


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write the result."""
    text = json.dumps(bench_caption(args), indent=1)
    print(text)  # noqa: T201 - this is the command's output
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    return 0
