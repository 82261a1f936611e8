"""What attention of a model is read and summed up: by layer, by kind of token, and where each answer token looks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .model_under_test import ModelUnderTest, PromptInputs
from .probe import MASS, LayerReading, RowStatistics, Section, probing

ROWS = {"text_to_image": "text", "image_to_image": "image"}
"""Name of a direction -> field of `LayerReading`."""


@dataclass
class AttentionReading:
    """What one model's attention came to on one prompt."""

    tested: ModelUnderTest
    prompt: PromptInputs
    answer: torch.Tensor
    """Ids of the answer, shape `(A,)`."""
    layers: list[tuple[Section, list[LayerReading]]]
    """Sections from the bottom up, with a reading of each of their layers."""

    @property
    def tokens(self) -> list[str]:
        """The answer's tokens."""
        return [self.tested.token_text(token) for token in self.answer.tolist()]

    def mean_map(self, section: Section, layers: list[LayerReading]) -> list[tuple[Any, Any]]:
        """For each answer token, mean attention over a section's layers: over the picture, over the thumbnail."""
        grid = self.tested.grid_of(section, self.prompt.grid)
        maps = torch.stack([layer.answer_maps for layer in layers]).mean(dim=0)
        return [grid.split(row) for row in maps]


def read_attention(tested: ModelUnderTest, prompt: PromptInputs, answer: torch.Tensor) -> AttentionReading:
    """Run a model over a prompt with one picture and its answer, and reduce each layer's attention.

    Args:
        tested: The model.
        prompt: The prompt.
        answer: Ids of the answer, shape `(A,)`.
    """
    return AttentionReading(tested, prompt, answer, read_layers(tested, prompt.inputs, answer))


@torch.inference_mode()
def read_layers(
    tested: ModelUnderTest, inputs: Mapping[str, torch.Tensor], answer: torch.Tensor
) -> list[tuple[Section, list[LayerReading]]]:
    """Run a model over a prompt with any number of pictures and its answer, and reduce each layer's attention.

    Args:
        tested: The model.
        inputs: `input_ids` of shape `(1, T)` and `pixel_values` of the prompt.
        answer: Ids of the answer, shape `(A,)`.

    Returns:
        Sections from the bottom up, with a reading of each of their layers.
    """
    input_ids = torch.cat([inputs["input_ids"][0], answer[:-1]])
    sections = tested.sections(input_ids, len(answer))
    with probing(sections) as probe:
        tested.model(
            input_ids=input_ids[None],
            pixel_values=inputs["pixel_values"],
            use_cache=False,
            logits_to_keep=1,
        )
    return [(section, probe.readings(section)) for section in sections]


def summarize(found: AttentionReading) -> dict:
    """All numbers of one model, for the JSON file."""
    grid = found.prompt.grid
    return {
        "model": found.tested.path,
        "kind": found.tested.kind,
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
