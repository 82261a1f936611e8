"""Where each layer and each answer token looks: text-to-image and image-to-image attention, of one model or two.

examples:
  hovle eval attention runs/demo/instruction_tuning/model picture.png "what shape is in the image?"
  hovle eval attention MODEL picture.png "what is it?" --compare OTHER      side by side, e.g. a transformers InternVL
                                                                            or a HoVLE with 0 holistic layers

Writes attention.json, layers.png (curves over the layers) and maps.png (where each answer token looks, over the
picture; a thumbnail's tokens apart). The model answers the question, unless --answer says what to look at, and is
then run once over prompt and answer. Each query's attention, one row in one head, sums to 1:

  mass      share of it on image tokens, on the prompt's first token (where models park attention they have no use
            for) and on all other tokens
  entropy   of its attention among the n image tokens it can see, rescaled to sum to 1 there, in units of log(n): 1 is
            even, 0 is all on one token
  sparsity  share of those n image tokens that get less than a tenth of an even share, 1 / n

Text-to-image is the mean over all heads and all queries that are no image tokens and stand behind one; image-to-image
that over image tokens, a token itself included. An answer token looks from where it is predicted. Rows are reduced as
they are computed: no layer's attention matrix is ever held.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

from ...charts import load_pyplot
from ...errors import printable
from ...model.pictures import load_picture
from ..results import provenance
from .attention_reading import ROWS, AttentionReading, read_attention, summarize
from .model_under_test import ModelUnderTest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hovle eval attention`."""
    parser.add_argument("model", metavar="MODEL", help="model folder or Hub id: a HoVLE or a transformers InternVL")
    parser.add_argument("picture", metavar="PICTURE", help="picture file or http(s) URL")
    parser.add_argument("question", metavar="QUESTION", help="what to ask about it")
    parser.add_argument("--compare", metavar="MODEL", help="a second model to show beside the first")
    parser.add_argument("--answer", metavar="TEXT", help="look at this answer instead of the model's own")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default: 32)")
    parser.add_argument("--max-tiles", type=int, metavar="N", help="most tiles (default: the model's own limit)")
    parser.add_argument("--tokens", type=int, default=6, metavar="N", help="answer tokens with a map (default: 6)")
    parser.add_argument("--output", type=Path, default=Path("attention"), metavar="DIR", help="default: attention")


def run(args: argparse.Namespace) -> int:
    """Read the attention and write numbers and pictures."""
    pyplot = load_pyplot()
    from .attention_charts import draw_layers, draw_maps

    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}.")
    if args.tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {args.tokens}.")
    picture = load_picture(args.picture)
    readings = []
    for path in [args.model, *([] if args.compare is None else [args.compare])]:
        tested = ModelUnderTest(path)
        prompt = tested.prepare(picture, args.question, args.max_tiles)
        answer = tested.answer(prompt, args.max_new_tokens) if args.answer is None else tested.encode(args.answer)
        readings.append(read_attention(tested, prompt, answer))
    args.output.mkdir(parents=True, exist_ok=True)
    result = {
        "picture": Path(args.picture).name,
        "picture_size": list(picture.size),
        "question": args.question,
        "models": [summarize(found) for found in readings],
        "provenance": provenance([found.tested.path for found in readings], readings[0].tested.model.device),
    }
    (args.output / "attention.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    draw_layers(pyplot, readings, args.output / "layers.png")
    draw_maps(pyplot, readings, args.question, args.output / "maps.png", args.tokens)
    for found in readings:
        text = f"{found.tested.label}: {' '.join(found.tokens)}\n{table(found)}\n"
        print(printable(text))  # noqa: T201 - the output
    longest = max(len(found.answer) for found in readings)
    if longest > args.tokens:
        print(  # noqa: T201
            f"maps.png shows the first {args.tokens} of {longest} answer tokens (--tokens {longest} shows all); "
            "attention.json has them all."
        )
    print(f"Written: {', '.join(str(args.output / name) for name in FILES)}")  # noqa: T201
    return 0


FILES = ("attention.json", "layers.png", "maps.png")
"""What the command writes."""


def table(found: AttentionReading) -> str:
    """Means over the layers of each section, in words."""
    lines = []
    for section, layers in found.layers:
        for name, field in ROWS.items():
            means = [getattr(layer, field).means() for layer in layers]
            mass, entropy, sparsity = (fmean(row[key] for row in means) for key in ("image", "entropy", "sparsity"))
            lines.append(
                f"  {section.name:<16} {name.replace('_', '-'):<15} mass {mass:6.1%}   entropy {entropy:.2f}   "
                f"sparsity {sparsity:.2f}"
            )
    return "\n".join(lines)
