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
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..charts import load_pyplot
from ..pictures import load_picture
from .probe import MASS, LayerReading, RowStatistics, Section, probing
from .results import provenance
from .subjects import Reading, Subject

ROWS = {"text_to_image": "text", "image_to_image": "image"}
"""Name of a direction -> field of `LayerReading`."""


@dataclass
class AttentionReading:
    """What one model's attention came to on one prompt."""

    subject: Subject
    reading: Reading
    answer: torch.Tensor
    """Ids of the answer, shape `(A,)`."""
    layers: list[tuple[Section, list[LayerReading]]]
    """Sections from the bottom up, with a reading of each of their layers."""

    @property
    def tokens(self) -> list[str]:
        """The answer's tokens."""
        return [self.subject.token_text(token) for token in self.answer.tolist()]

    def mean_map(self, section: Section, layers: list[LayerReading]) -> list[tuple[Any, Any]]:
        """For each answer token, mean attention over a section's layers: over the picture, over the thumbnail."""
        grid = self.subject.grid_of(section, self.reading)
        maps = torch.stack([layer.answer_maps for layer in layers]).mean(dim=0)
        return [grid.split(row) for row in maps]


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
        subject = Subject(path)
        reading = subject.read(picture, args.question, args.max_tiles)
        answer = subject.answer(reading, args.max_new_tokens) if args.answer is None else subject.encode(args.answer)
        readings.append(read_attention(subject, reading, answer))
    args.output.mkdir(parents=True, exist_ok=True)
    result = {
        "picture": Path(args.picture).name,
        "picture_size": list(picture.size),
        "question": args.question,
        "models": [summarize(found) for found in readings],
        "provenance": provenance([found.subject.path for found in readings], readings[0].subject.model.device),
    }
    (args.output / "attention.json").write_text(json.dumps(result) + "\n")
    draw_layers(pyplot, readings, args.output / "layers.png")
    draw_maps(pyplot, readings, args.question, args.output / "maps.png", args.tokens)
    for found in readings:
        print(f"{found.subject.label}: {' '.join(found.tokens)}\n{table(found)}\n")  # noqa: T201 - the output
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


@torch.inference_mode()
def read_attention(subject: Subject, reading: Reading, answer: torch.Tensor) -> AttentionReading:
    """Run a model over a prompt and its answer and reduce each layer's attention.

    Args:
        subject: The model.
        reading: The prompt.
        answer: Ids of the answer, shape `(A,)`.
    """
    input_ids = torch.cat([reading.inputs["input_ids"][0], answer[:-1]])
    sections = subject.sections(input_ids, len(answer))
    with probing(sections) as probe:
        subject.model(
            input_ids=input_ids[None],
            pixel_values=reading.inputs["pixel_values"],
            use_cache=False,
            logits_to_keep=1,
        )
    return AttentionReading(subject, reading, answer, [(section, probe.readings(section)) for section in sections])


def summarize(found: AttentionReading) -> dict:
    """All numbers of one model, for the JSON file."""
    grid = found.reading.grid
    return {
        "model": found.subject.path,
        "kind": found.subject.kind,
        "answer_tokens": found.tokens,
        "grid": {"columns": grid.columns, "rows": grid.rows, "side": grid.side, "thumbnail": grid.has_thumbnail},
        "sections": [
            {
                "name": section.name,
                "num_tokens": len(section.image_mask),
                "num_image_tokens": int(section.image_mask.sum()),
                "layers": [
                    {name: _statistics(getattr(layer, field)) for name, field in ROWS.items()} for layer in layers
                ],
                "answer_maps": [
                    {
                        "token": token,
                        "mass": _round(float(body.sum() + (0 if thumbnail is None else thumbnail.sum()))),
                        "picture": _round(body.tolist()),
                        "thumbnail": None if thumbnail is None else _round(thumbnail.tolist()),
                    }
                    for token, (body, thumbnail) in zip(found.tokens, found.mean_map(section, layers), strict=True)
                ],
            }
            for section, layers in found.layers
        ],
    }


def _statistics(rows: RowStatistics) -> dict:
    means = {name: _round(value) for name, value in rows.means().items()}
    return {
        "num_queries": rows.num_queries,
        "mass": {name: means[name] for name in MASS},
        "entropy": means["entropy"],
        "sparsity": means["sparsity"],
        "by_head": {
            "image_mass": _round(rows.mass[:, 0].tolist()),
            "entropy": _round(rows.entropy.tolist()),
            "sparsity": _round(rows.sparsity.tolist()),
        },
    }


def _round(value):
    """Four significant digits; nan, where nothing can be counted, becomes None."""
    if isinstance(value, list):
        return [_round(item) for item in value]
    return None if value != value else float(f"{value:.4g}")


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
