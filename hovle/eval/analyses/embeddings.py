"""How close image and text embeddings are to the language model's words, and how far tokens drift layer by layer.

examples:
  hovle eval embeddings runs/demo/instruction_tuning/model picture.png
  hovle eval embeddings MODEL picture.png --question "what is it?" --language-model BARE

Writes embeddings.json, words.png (the word nearest to each image token, over the picture) and embeddings.png. What
the holistic layers hand to the language model is compared with the table that turns token ids into vectors: the
model's own, or with --language-model that of a bare one (a folder, Hub id or asset:smollm2-135m-instruct).

  cosine, text    of a text token's embedding with its own row of the table; 1 while holistic layers are the identity
  cosine, image   of an image token's embedding with the nearest row, which names the word shown
  norm            length of a vector over the mean length of the table's rows
  drift           cosine of each layer's output with its input, and with the first input of its section

Placeholders and rows that only mark pictures are no words and never nearest.
"""

import argparse
import json
from pathlib import Path

import torch

from ...assets import resolve_asset
from ...charts import load_pyplot
from ...loading import load_bare_model
from ...model.backbones import scale_embeddings
from ...model.pictures import load_picture
from ..results import provenance
from .embedding_reading import KINDS, read_embeddings, summarize
from .model_under_test import ModelUnderTest

FILES = ("embeddings.json", "words.png", "embeddings.png")
"""What the command writes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hovle eval embeddings`."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a HoVLE")
    parser.add_argument("picture", metavar="PICTURE", help="picture file or http(s) URL")
    parser.add_argument("--question", default="What is in the picture?", help="text of the prompt")
    parser.add_argument("--language-model", metavar="MODEL", help="compare with this bare model's table")
    parser.add_argument("--max-tiles", type=int, metavar="N", help="most tiles (default: the model's own limit)")
    parser.add_argument("--output", type=Path, default=Path("embeddings"), metavar="DIR", help="default: embeddings")


def run(args: argparse.Namespace) -> int:
    """Compare the embeddings and write numbers and pictures."""
    pyplot = load_pyplot()
    from .embedding_charts import draw_numbers, draw_words

    picture = load_picture(args.picture)
    tested = ModelUnderTest(args.model)
    if tested.kind != "hovle":
        raise ValueError(f"{args.model} is a {tested.kind} model; only a HoVLE has a holistic embedding to look at.")
    table = word_table(tested, args.language_model)
    found = read_embeddings(tested, tested.prepare(picture, args.question, args.max_tiles), table)
    args.output.mkdir(parents=True, exist_ok=True)
    result = {
        "picture": Path(args.picture).name,
        "picture_size": list(picture.size),
        "question": args.question,
        "model": args.model,
        "table": args.language_model or "the model's own",
        **summarize(found),
        "provenance": provenance([args.model], tested.model.device),
    }
    (args.output / FILES[0]).write_text(json.dumps(result) + "\n", encoding="utf-8")
    draw_words(pyplot, found, args.output / FILES[1])
    draw_numbers(pyplot, found, args.output / FILES[2])
    for kind in KINDS:
        cosine, norm = (result[kind][name]["mean"] for name in ("cosine", "norm"))
        print(f"{kind:<6} cosine {cosine:.3f}   norm {norm:.3f} x the table's")  # noqa: T201 - the output
    print(f"Written: {', '.join(str(args.output / name) for name in FILES)}")  # noqa: T201
    return 0


@torch.no_grad()
def word_table(tested: ModelUnderTest, language_model: str | None) -> torch.Tensor:
    """The table embeddings are compared with, shape `(V, D)`, float32, as it enters a first layer.

    Args:
        tested: A HoVLE.
        language_model: Bare model whose table to take; None for the HoVLE's own.

    Raises:
        ValueError: When the bare model's vectors have another length.
    """
    if language_model is None:
        return tested.model.model.input_embedding_matrix().float()
    bare = load_bare_model(resolve_asset(language_model))
    weight = bare.get_input_embeddings().weight.detach()
    hidden_size = tested.model.config.text_config.hidden_size
    if weight.shape[1] != hidden_size:
        raise ValueError(
            f"{language_model} has vectors of {weight.shape[1]} numbers, {tested.path} of {hidden_size}: name the "
            "language model it was built around."
        )
    return scale_embeddings(weight, tested.model.config.text_config).float().to(tested.model.device)
