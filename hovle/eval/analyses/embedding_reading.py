"""What is read of a model's embeddings: nearest words, lengths, drift from layer to layer."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .model_under_test import ModelUnderTest, PromptInputs
from .probe import Section

KINDS = ("text", "image")


@dataclass
class Drift:
    """How the tokens of one section change on their way through its layers."""

    section: Section
    to_input: dict[str, list[float]]
    """For text and image tokens, mean cosine of each layer's output with that layer's input."""
    to_first: dict[str, list[float]]
    """The same with what enters the section's first layer."""


@dataclass
class EmbeddingReading:
    """Embeddings of one prompt beside a table of words."""

    tested: ModelUnderTest
    prompt: PromptInputs
    token_ids: torch.Tensor
    """Ids of the prompt's text tokens, shape `(T',)`."""
    text_cosine: torch.Tensor
    """With the token's own row; nan where the table has no row for it, shape `(T',)`."""
    text_norm: torch.Tensor
    """Over the mean row's, shape `(T',)`."""
    image_cosine: torch.Tensor
    """With the nearest row, shape `(S,)`."""
    image_norm: torch.Tensor
    """Over the mean row's, shape `(S,)`."""
    nearest: torch.Tensor
    """Id of the nearest row, shape `(S,)`."""
    table_norm: torch.Tensor
    """Of every row over the mean row's, shape `(V,)`."""
    mean_norm: float
    """Mean length of the table's rows."""
    drifts: list[Drift]


@torch.inference_mode()
def read_embeddings(tested: ModelUnderTest, prompt: PromptInputs, table: torch.Tensor) -> EmbeddingReading:
    """Compare a prompt's embeddings with a table and follow them through the layers.

    Args:
        tested: A HoVLE.
        prompt: The prompt.
        table: Shape `(V, D)`, float32.
    """
    input_ids, pixels = prompt.inputs["input_ids"], prompt.inputs["pixel_values"]
    embeds = tested.model.get_holistic_embeddings(input_ids, pixels).language_inputs_embeds[0].float()
    is_image = input_ids[0] == tested.model.config.image_token_id
    text, image, ids = embeds[~is_image], embeds[is_image], input_ids[0, ~is_image]
    norms = table.norm(dim=-1)
    mean_norm = float(norms.mean())
    text_cosine = torch.full((len(ids),), torch.nan, device=ids.device)
    has_row = ids < len(table)
    text_cosine[has_row] = nn.functional.cosine_similarity(text[has_row], table[ids[has_row]], dim=-1)
    image_cosine, nearest = _nearest(image, table, tested.processor.image_token_ids)
    with following(tested.sections(input_ids[0], 1)) as drifts:
        tested.model(input_ids=input_ids, pixel_values=pixels, use_cache=False, logits_to_keep=1)
    return EmbeddingReading(
        tested,
        prompt,
        ids.cpu(),
        text_cosine.cpu(),
        (text.norm(dim=-1) / mean_norm).cpu(),
        image_cosine.cpu(),
        (image.norm(dim=-1) / mean_norm).cpu(),
        nearest.cpu(),
        (norms / mean_norm).cpu(),
        mean_norm,
        drifts,
    )


def _nearest(vectors: torch.Tensor, table: torch.Tensor, no_words: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine with the nearest row and its id for each vector, `(S, D)` to `(S,)` twice; some rows are no words."""
    rows = nn.functional.normalize(table, dim=-1)
    best = []
    for block in nn.functional.normalize(vectors, dim=-1).split(256):  # a block's cosines with a large vocabulary fit
        cosines = block @ rows.T
        cosines[:, [token for token in no_words if token < len(table)]] = -torch.inf
        best.append(cosines.max(dim=-1))
    return torch.cat([one.values for one in best]), torch.cat([one.indices for one in best])


@contextlib.contextmanager
def following(sections: list[Section]) -> Iterator[list[Drift]]:
    """Compare every layer's output with its input and its section's first one, in one forward pass inside.

    Only two vectors per token are held at a time. The list fills as layers run.
    """
    drifts = [Drift(section, {kind: [] for kind in KINDS}, {kind: [] for kind in KINDS}) for section in sections]
    handles = []
    for drift in drifts:
        first: list[torch.Tensor] = []
        for layer in drift.section.layers:
            handles.append(layer.register_forward_hook(_follow(drift, first)))
    try:
        yield drifts
    finally:
        for handle in handles:
            handle.remove()


def _follow(drift: Drift, first: list[torch.Tensor]) -> Any:
    def hook(layer: nn.Module, args: tuple, output: Any) -> None:
        before, after = args[0][0].float(), (output[0] if isinstance(output, tuple) else output)[0].float()
        if not first:
            first.append(before)
        for target, reference in ((drift.to_input, before), (drift.to_first, first[0])):
            cosine = nn.functional.cosine_similarity(after, reference, dim=-1)
            for kind, mask in zip(KINDS, (~drift.section.image_mask, drift.section.image_mask), strict=True):
                target[kind].append(float(cosine[mask].mean()))

    return hook


def summarize(found: EmbeddingReading) -> dict:
    """All numbers, for the JSON file."""
    tested, grid = found.tested, found.prompt.grid
    body, thumbnail = grid.split(found.nearest)
    return {
        "grid": {"columns": grid.columns, "rows": grid.rows, "side": grid.side, "thumbnail": grid.has_thumbnail},
        "table_mean_norm": found.mean_norm,
        "text": {
            "tokens": [tested.token_text(token) for token in found.token_ids.tolist()],
            "cosine": _spread(found.text_cosine),
            "norm": _spread(found.text_norm),
        },
        "image": {
            "cosine": _spread(found.image_cosine),
            "norm": _spread(found.image_norm),
            "num_distinct_words": len(found.nearest.unique()),
            "nearest_words": [[tested.token_text(token) for token in row] for row in body.tolist()],
            "thumbnail_words": None
            if thumbnail is None
            else [[tested.token_text(token) for token in row] for row in thumbnail.tolist()],
        },
        "table_norm": _spread(found.table_norm),
        "drift": [
            {"section": drift.section.name, "to_layer_input": drift.to_input, "to_section_input": drift.to_first}
            for drift in found.drifts
        ],
    }


def _spread(values: torch.Tensor) -> dict[str, float]:
    """Mean, extremes and deciles, of the values that are there."""
    values = values[~values.isnan()].double()
    low, middle, high = values.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
    return {
        "mean": float(values.mean()),
        "min": float(values.min()),
        "decile_1": low,
        "median": middle,
        "decile_9": high,
        "max": float(values.max()),
    }
