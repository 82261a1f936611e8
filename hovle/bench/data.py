"""Measure how fast picture files become tiles, the work a training process does for every sample.

JPEG pictures in memory's file cache, one thread, pictures per second. Four routes take turns, so that what else the
machine does hurts all alike; the best round counts, the median shows how quiet the machine was.

  training    what `hovle train` does: fast decoding where a JPEG is plain, torch resizes bytes
  pillow      Pillow decodes and resizes, tiles of bytes
  processor   `HoVLEImageProcessor`, tiles of normalised floats (what inference does by default)
  bytes       the same with do_rescale=False, do_normalize=False: the model normalises

Tiles of the first two are compared: largest and mean difference in grey levels of 255. The result is printed and, with
--out, kept as JSON with the machine it was measured on.

  hovle bench data                                          generated photographs, 500 x 375 to one tile of 448
  hovle bench data --out eval/results/speed/data.json
  hovle bench data --pictures photos --max-tiles 12         your own JPEG files, up to 12 tiles and a thumbnail
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..machine.facts import environment
from ..model.image_processing_hovle import HoVLEImageProcessor
from ..model.pictures import PictureFile, load_picture
from ..train.data.tiles import read_tiles

PICTURE_SIZE = (500, 375)
"""Width and height of generated photographs: a usual size of web pictures."""

JPEG_QUALITY = 82


def generate_photograph(seed: int) -> Image.Image:
    """Draw soft areas with camera noise; as a JPEG it is about as large and as slow to decode as a photograph."""
    generator = np.random.default_rng(seed)
    areas = Image.fromarray(generator.integers(20, 235, (30, 40, 3), dtype=np.uint8))
    soft = np.asarray(areas.resize(PICTURE_SIZE, Image.Resampling.BICUBIC)).astype(int)
    noise = generator.integers(-6, 7, soft.shape[:2])[..., None]
    return Image.fromarray((soft + noise).clip(0, 255).astype(np.uint8))


def pillow_tiles(path: Path, image_processor: HoVLEImageProcessor) -> torch.Tensor:
    """Cut a picture with Pillow alone: tiles of bytes, shape `(N, 3, s, s)`, the thumbnail last."""
    picture = load_picture(path)

    def resize(height: int, width: int) -> np.ndarray:
        return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1)

    tiles = image_processor.choose_grid(picture.height, picture.width).cut(resize, image_processor.size["height"])
    return torch.from_numpy(np.stack(tiles))


def measure_data(paths: list[Path], image_processor: HoVLEImageProcessor, num_rounds: int) -> dict:
    """Time the four routes over the pictures and compare their tiles.

    Returns:
        Pictures per second of each route (best round and median), the ratio of training to pillow, differences in
        grey levels, and the share of pictures decoded fast.
    """
    routes: dict[str, Callable[[Path], object]] = {
        "training": lambda path: read_tiles(path, image_processor),
        "pillow": lambda path: pillow_tiles(path, image_processor),
        "processor": lambda path: image_processor([load_picture(path)], return_tensors="pt"),
        "bytes": lambda path: image_processor(
            [load_picture(path)], return_tensors="pt", do_rescale=False, do_normalize=False
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for number in range(num_rounds + 1):
        for name, route in routes.items():
            started_at = time.perf_counter()
            for path in paths:
                route(path)
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - started_at) / len(paths))
    differences = [
        (read_tiles(path, image_processor).int() - pillow_tiles(path, image_processor).int()).abs() for path in paths
    ]
    return {
        "pictures_per_second": {name: round(1 / min(values), 1) for name, values in seconds.items()},
        "median_pictures_per_second": {
            name: round(1 / statistics.median(values), 1) for name, values in seconds.items()
        },
        "training_over_pillow": round(min(seconds["pillow"]) / min(seconds["training"]), 2),
        "max_difference_grey_levels": max(int(item.max()) for item in differences),
        "mean_difference_grey_levels": round(float(np.mean([float(item.float().mean()) for item in differences])), 5),
        "decoded_fast_ratio": round(sum(_is_decoded_fast(path) for path in paths) / len(paths), 4),
    }


def _is_decoded_fast(path: Path) -> bool:
    """Whether training reads the file without Pillow's own image: a plain JPEG, decoded by simplejpeg, an extra."""
    return importlib.util.find_spec("simplejpeg") is not None and PictureFile(path.read_bytes()).is_plain


def bench_data(args: argparse.Namespace) -> dict:
    """Measure with one thread, on the given or on generated pictures; return figures with their circumstances."""
    if args.rounds < 1 or args.num_pictures < 1:
        raise ValueError("--rounds and --num-pictures must be at least 1.")
    image_processor = HoVLEImageProcessor(tile_size=args.tile_size, max_tiles=args.max_tiles)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            paths = pictures_for(args.pictures, args.num_pictures, Path(folder))
            num_bytes = sum(path.stat().st_size for path in paths)
            figures = measure_data(paths, image_processor, args.rounds)
    finally:
        torch.set_num_threads(num_threads)
    return {
        "bench": "data",
        "pictures": args.pictures or f"{len(paths)} generated, {PICTURE_SIZE[0]} x {PICTURE_SIZE[1]}",
        "mean_file_bytes": num_bytes // len(paths),
        "tile_size": args.tile_size,
        "max_tiles": args.max_tiles,
        "rounds": args.rounds,
        **figures,
        "environment": {**environment("pillow", "simplejpeg"), "threads": 1, "date": time.strftime("%Y-%m-%d")},
    }


def pictures_for(given: str | None, most: int, folder: Path) -> list[Path]:
    """JPEG files to measure with: the first of a folder that is given, or photographs generated into another.

    Args:
        given: Folder with JPEG files, or None.
        most: How many are wanted.
        folder: Where photographs are written.
    """
    if given is None:
        paths = [folder / f"{seed}.jpg" for seed in range(most)]
        for seed, path in enumerate(paths):
            generate_photograph(seed).save(path, quality=JPEG_QUALITY)
        return paths
    found = (path for path in sorted(Path(given).rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg"))
    paths = list(itertools.islice(found, most))
    if not paths:
        raise ValueError(f"{given} holds no JPEG files.")
    return paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle bench data`."""
    parser.add_argument("--out", metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--pictures", metavar="FOLDER", help="JPEG files to read (default: generated photographs)")
    parser.add_argument("--num-pictures", type=int, default=64, metavar="N", help="pictures per round (default: 64)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds per route (default: 7)")
    parser.add_argument("--tile-size", type=int, default=448, metavar="PX", help="side of a tile (default: 448)")
    parser.add_argument("--max-tiles", type=int, default=1, metavar="N", help="most tiles (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write the result."""
    text = json.dumps(bench_data(args), indent=1)
    print(text)  # noqa: T201 - this is the command's output
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    return 0
