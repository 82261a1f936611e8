"""Export a model for engines that know nothing of hovle: a stock decoder, and the stem that reads pictures beside it.

  hovle export MODEL DST --to llama       a folder of transformers (LlamaForCausalLM, or the decoder's own class)
  hovle export MODEL DST --to gguf        llama.cpp's files in f16, 8 and 4 bits (pip install 'hovle[llamacpp]')
  hovle export MODEL DST --to openvino    what OpenVINO GenAI's VLMPipeline reads (pip install 'hovle[openvino]')
  hovle export MODEL DST --to onnx        what transformers.js and ONNX Runtime read (pip install 'hovle[onnx]')

Where holistic layers and language model share their rope and nothing happens between them, a HoVLE is one stock
decoder of N + M layers on embeddings of words and images. Others are refused, with the reason and what remains
possible. DST appears when it is complete; but for onnx, stem/stem.py in it turns a picture into embeddings with
numpy and Pillow.
"""

import argparse
import os
import shutil
from pathlib import Path

from ..errors import printable
from ..files.atomic import appear_when_complete
from . import gguf, llama, onnx, openvino
from .flat import load_flat
from .needs import need

FORMATS = {"llama": llama, "gguf": gguf, "openvino": openvino, "onnx": onnx}
"""Name -> the module whose `write` fills an empty folder with a model and returns what the user should know. `NEEDS`
are the packages it cannot do without."""


def export(src: str | os.PathLike, dst: str | os.PathLike, to: str) -> list[str]:
    """Export a model.

    Args:
        src: Model folder or Hub id.
        dst: Folder to create; it may exist if it is empty. It appears when it is complete.
        to: One of `FORMATS`.

    Returns:
        What the user should know, one sentence each.

    Raises:
        ValueError: When the model is none, or not flat, when `dst` exists, or a format cannot hold the model.
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}, got {to!r}.")
    dst = Path(dst).resolve()
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst} exists already; nothing is overwritten. Choose another DST or remove it first.")
    need(f"--to {to}", *FORMATS[to].NEEDS)
    flat = load_flat(src)
    with appear_when_complete(dst) as folder:
        remarks = flat.remarks + FORMATS[to].write(flat, folder)
        if flat.licence is not None:
            shutil.copyfile(flat.licence, folder / flat.licence.name)
    return remarks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hovle export`."""
    parser.add_argument("src", metavar="MODEL", help="model folder or Hub id")
    parser.add_argument("dst", metavar="DST", help="folder to create")
    parser.add_argument("--to", choices=list(FORMATS), required=True, help="what to write")


def run(args: argparse.Namespace) -> int:
    """Export and tell what the user should know; exit code 0."""
    for line in [*export(args.src, args.dst, args.to), f"Wrote {args.dst} for {args.to}."]:
        print(printable(line))  # noqa: T201 - this is the command's output
    return 0
