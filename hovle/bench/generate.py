"""Measure how fast models answer: a picture and 256 words in, 120 tokens out, HoVLE beside others of its size.

Weights are random, which are as fast as trained ones. Models take turns, so that what else the machine does hurts all
alike; the median of the rounds counts. Beside each speed stands whether the tokens are right: a compiled or a second
answer must be that of the uncompiled model. The result is JSON, its figures also a table on the standard error:

  prompts       TTFT and tokens a second by tile size, number of tiles and rows, eager and (--compile) compiled
  costs         FLOPs of a prompt and bytes of its keys and values, beside what the cost model says
  bandwidth     share of the read bandwidth, measured in the same run, at which weights are read for a token
  long          decoding behind 4,096 words, compiled beside eager (--compile)
  question      TTFT of a second question about the same picture, beside the first
  int8          decoding with int8 weights beside the float ones, both compiled (--compile, hovle[quant])
  pictures      seven tiles from a decoded picture as bytes, beside the way over Pillow

  hovle bench generate --layers 0.125 --threads 1        an eighth of the released models' layers, on a CPU
  hovle bench generate --family smol --out eval/results/speed/generate_smol.json
  make bench-gpu                                         whole models in bfloat16 on a GPU, compiled
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from ..inference import optimize
from ..machine.facts import environment
from ..model.image_processing_hovle import HoVLEImageProcessor
from .data import generate_photograph
from .generate_measure import (
    answer,
    bytes_per_token,
    clock,
    costs,
    measure_in_turns,
    read_bandwidth,
    second_question,
)
from .generate_models import FAMILIES, build, expected_costs, prompt

NUM_WORDS = 256
NUM_NEW = 120

NUM_LONG = 4096
"""Words of a long prompt; 64 of the smallest models."""

CASES = {
    "released": [(224, 1, 1), (336, 1, 1), (448, 1, 1), (448, 7, 1), (448, 1, 8)],
    "smol": [(112, 1, 1), (112, 7, 1), (112, 1, 8)],
    "tiny": [(56, 1, 1), (56, 3, 2)],
}
"""Side of a tile, tiles of a prompt, and prompts of a batch, by family."""


def peers_case(family: str, name: str, side: int) -> int:
    """Side of the tiles a model is shown; SmolVLM's have 512 pixels whatever HoVLE's have."""
    return 512 if (family, name) == ("smol", "smolvlm") else side


def bench_prompts(args: argparse.Namespace, models: dict[str, Any], are_compiled: bool) -> list[dict]:
    """Time all cases; see `measure_in_turns`."""
    rows = []
    for side, num_tiles, batch_size in CASES[args.family]:
        shown = {}
        for name, model in models.items():
            variant, own = FAMILIES[args.family][name], peers_case(args.family, name, side)
            shown[name] = (model, prompt(model, variant, num_tiles, own, args.words, batch_size))
        case = {"part": "prompts", "side": side, "tiles": num_tiles, "rows": batch_size, "compiled": are_compiled}
        description = f"{side} px, {num_tiles} tiles, {batch_size} rows{', compiled' if are_compiled else ''}"
        found = measure_in_turns(shown, args.new_tokens, args.rounds, description)
        rows += [{**case, "model": name, **figures} for name, figures in found.items()]
        sys.stderr.write(table(rows[-len(found) :]) + "\n")  # so much is known if the rest takes too long
    return rows


def bench_costs(args: argparse.Namespace, models: dict[str, Any]) -> list[dict]:
    """Compare what torch counts with what the cost model says."""
    rows = []
    for side, num_tiles, batch_size in CASES[args.family]:
        if batch_size > 1:
            continue
        for name, model in models.items():
            own = peers_case(args.family, name, side)
            inputs = prompt(model, FAMILIES[args.family][name], num_tiles, own, args.words)
            row: dict[str, Any] = {
                "part": "costs",
                "model": name,
                "side": side,
                "tiles": num_tiles,
                **costs(model, inputs),
            }
            if name in ("base", "hd"):
                expected = expected_costs(model, num_tiles, side, args.words)
                row |= {
                    "flops_over_formula": row["flops"] / expected["flops"],
                    "kv_bytes_over_formula": row["kv_bytes"] / expected["kv_bytes"],
                }
            rows.append(row)
    return rows


def bench_long(args: argparse.Namespace, eager: Any, fast: Any) -> dict:
    """Time decoding behind a long prompt: a cache that grows beside one whose memory was taken once."""
    num_words = 64 if args.family == "tiny" else NUM_LONG
    inputs = prompt(eager, FAMILIES[args.family]["base"], 0, 0, num_words)
    shown = {"eager": (eager, inputs), "compiled": (fast, inputs)}
    found = measure_in_turns(shown, args.new_tokens, args.rounds, f"{num_words:,} words")
    return {
        "part": "long",
        "words": num_words,
        **{f"{name}_seconds_per_token": figures["seconds_per_token"] for name, figures in found.items()},
        "speedup": found["eager"]["seconds_per_token"] / found["compiled"]["seconds_per_token"],
        "same_tokens": found["eager"]["tokens"] == found["compiled"]["tokens"],
    }


def compile_peer(model: Any) -> Any:
    """Compile the parts of transformers' InternVL in which the time goes; what it is given may have any length."""
    for part in (model.model.vision_tower, model.model.language_model):
        part.compile(dynamic=True)
    return model


def bench_int8(args: argparse.Namespace, model: Any, inputs: dict, device: torch.device) -> dict:
    """Time decoding with int8 and with float weights, both compiled, and count tokens that stay."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # an extra: only this needs it
    except ImportError as error:
        raise ValueError("int8 weights need torchao: pip install 'hovle[quant]'.") from error
    eager = build(FAMILIES[args.family]["base"], args.layers, device, model.dtype)
    quantize_(eager.model.language_model.layers, Int8WeightOnlyConfig())
    expected = answer(eager, inputs, args.new_tokens)
    shown = {"float": (model, inputs), "int8": (optimize(eager), inputs)}
    found = measure_in_turns(shown, args.new_tokens, args.rounds, "int8")
    tokens = {name: torch.tensor(figures.pop("tokens")) for name, figures in found.items()}
    return {
        "part": "int8",
        **{f"{name}_{key}": value for name, figures in found.items() for key, value in figures.items()},
        "speedup": found["float"]["seconds_per_token"] / found["int8"]["seconds_per_token"],
        "same_tokens": torch.equal(tokens["int8"], expected.cpu()),
        "tokens_of_float_ratio": float((tokens["int8"] == tokens["float"]).float().mean()),
    }


def bench_pictures(num_rounds: int, side: int) -> dict:
    """Time seven tiles from a decoded picture: as bytes, and as numbers over Pillow."""
    cutter = HoVLEImageProcessor(tile_size=side, max_tiles=6)
    picture = generate_photograph(0).resize((3 * side, 2 * side))
    decoded = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    routes = {
        "bytes": lambda: cutter([decoded], do_rescale=False, do_normalize=False, return_tensors="pt"),
        "pillow": lambda: cutter([picture], return_tensors="pt"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for number in range(num_rounds + 1):
        for name, route in routes.items():
            taken = clock(torch.device("cpu"), route)
            if number:
                seconds[name].append(taken)
    tiles = {name: route()["pixel_values"] for name, route in routes.items()}
    best = {f"{name}_seconds": min(values) for name, values in seconds.items()}
    return {
        "part": "pictures",
        "tiles": len(tiles["bytes"]),
        **best,
        "ratio": best["bytes_seconds"] / best["pillow_seconds"],
        "max_difference": float((_normalized(tiles["bytes"], cutter) - tiles["pillow"]).abs().max()),
    }


def _normalized(tiles: torch.Tensor, cutter: HoVLEImageProcessor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (cutter.image_mean, cutter.image_std))
    return (tiles.float() / 255 - mean) / std


def bench_generate(args: argparse.Namespace) -> dict:
    """Measure all parts; return figures with their circumstances."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, args.dtype)
    if args.threads:
        torch.set_num_threads(args.threads)
    variants = FAMILIES[args.family]
    models = {name: build(variant, args.layers, device, dtype) for name, variant in variants.items()}
    side, num_tiles, _ = max(CASES[args.family][:-1], key=lambda case: case[:2])
    questions = [prompt(models["base"], variants["base"], num_tiles, side, length) for length in (args.words, 32)]
    bandwidth = read_bandwidth(models["base"], args.bandwidth_bytes)
    rows = bench_costs(args, models) + bench_prompts(args, models, False)
    rows.append({"part": "question", **second_question(models["base"], *_questions(questions), args.rounds)})
    rows.append(bench_pictures(args.rounds, side))
    if args.compile:
        eager = {_case(row): row["tokens"] for row in rows if row["part"] == "prompts"}
        uncompiled = build(variants["base"], args.layers, device, dtype)
        ways = {"base": optimize, "hd": optimize, "internvl2": compile_peer}
        fast = {name: ways[name](model) for name, model in models.items() if name in ways}
        compiled = bench_prompts(args, fast, True)
        for row in compiled:
            row["same_tokens"] = row["tokens"] == eager[_case(row)]
        rows += compiled
        rows.append(bench_long(args, uncompiled, fast["base"]))
        del uncompiled
        for name in [name for name in models if name != "base"]:
            models.pop(name)
            fast.pop(name, None)
        gc.collect()
        rows.append(bench_int8(args, fast["base"], questions[0], device))
    for row in rows:
        if row["part"] == "prompts" and row["rows"] == 1 and row["model"] == "base":
            row["bandwidth_ratio"] = bytes_per_token(models["base"]) / row["seconds_per_token"] / bandwidth
    return {
        "bench": "generate",
        "family": args.family,
        "layers": args.layers,
        "words": args.words,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "read_bandwidth": bandwidth,
        "rows": rows,
        "environment": {
            **environment("torchao"),
            "device": str(device),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "date": time.strftime("%Y-%m-%d"),
        },
    }


def _case(row: dict) -> tuple:
    return row["model"], row["side"], row["tiles"], row["rows"]


def _questions(prompts: list[dict]) -> tuple[dict, dict]:
    """Two questions about one picture, the second of 32 words."""
    first, second = prompts
    return first, {**second, "pixel_values": first["pixel_values"]}


def table(rows: list[dict]) -> str:
    """The figures of parts that one compares, a line each."""
    lines = []
    for row in rows:
        shown = {key: value for key, value in row.items() if key not in ("part", "tokens")}
        text = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
        )
        lines.append([row["part"], text])
    return tabulate(lines, headers=["part", "figures"], maxcolwidths=[None, 100])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle bench generate`."""
    parser.add_argument("--out", metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--family", choices=FAMILIES, default="released", help="shapes to compare (default: released)")
    parser.add_argument("--layers", type=float, default=1.0, metavar="SHARE", help="share of the layers to keep")
    parser.add_argument("--compile", action="store_true", help="measure compiled models and int8 weights, too")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--dtype", default="float32", help="number format, for instance bfloat16 (default: float32)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch; pin them to cores, too (taskset)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds that count (default: 7)")
    parser.add_argument("--words", type=int, default=NUM_WORDS, metavar="N", help="words of a prompt (default: 256)")
    parser.add_argument("--new-tokens", type=int, default=NUM_NEW, metavar="N", help="tokens out (default: 120)")
    parser.add_argument(
        "--bandwidth-bytes", type=int, default=2**31, metavar="N", help="tensor that is summed (default: 2 GiB)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write the result."""
    if args.rounds < 1 or args.new_tokens < 2 or args.words < 1 or not 0 < args.layers <= 1:
        raise ValueError("--rounds and --words must be at least 1, --new-tokens 2, and --layers above 0, 1 at most.")
    if not isinstance(getattr(torch, args.dtype, None), torch.dtype):
        raise ValueError(f"--dtype {args.dtype} is no number format of torch; for instance float32 or bfloat16.")
    result = bench_generate(args)
    text = json.dumps(result, indent=1)
    print(text)  # noqa: T201 - this is the command's output
    sys.stderr.write(table(result["rows"]) + "\n")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    return 0
