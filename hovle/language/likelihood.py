"""How likely a language model finds given tokens: the one pass behind perplexity, text tasks and kept answers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn


class Row(NamedTuple):
    """Token ids, of which the first are only read."""

    ids: list[int]
    num_given: int
    """At least 1: nothing foretells the first token."""

    @property
    def num_scored(self) -> int:
        return len(self.ids) - self.num_given


@torch.no_grad()
def log_likelihoods(model: nn.Module, rows: Sequence[Row], tokens_at_once: int = 1024) -> list[float]:
    """Sum of `log p(token | all before it)` over the scored tokens of each row, in nats.

    Args:
        model: A causal language model in evaluation mode.
        rows: What it reads.
        tokens_at_once: Size of a batch, padding included; a longer row is run alone.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda place: len(rows[place].ids))
    sums = [0.0] * len(rows)
    for places in _batches(order, rows, tokens_at_once):
        batch = [rows[place] for place in places]
        logits = model(**_padded(batch, device), use_cache=False).logits
        for place, row, row_logits in zip(places, batch, logits, strict=True):
            scored = torch.tensor(row.ids[row.num_given :], dtype=torch.long, device=device)
            before = row_logits[row.num_given - 1 : len(row.ids) - 1].float()
            nats = nn.functional.cross_entropy(before, scored, reduction="sum")
            sums[place] = -float(nats)
    return sums


def _batches(order: list[int], rows: Sequence[Row], tokens_at_once: int) -> list[list[int]]:
    """Places in order of length, as many at once as fit beside the longest."""
    batches: list[list[int]] = []
    for place in order:
        if batches and len(rows[place].ids) * (len(batches[-1]) + 1) <= tokens_at_once:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def _padded(rows: Sequence[Row], device: torch.device) -> dict[str, torch.Tensor]:
    """Ids of shape `(B, T)`, padded on the right; with a mask where anything is padded."""
    longest = max(len(row.ids) for row in rows)
    input_ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows], device=device)
    lengths = torch.tensor([len(row.ids) for row in rows], device=device)
    if int(lengths.min()) == longest:
        return {"input_ids": input_ids}
    places = torch.arange(longest, device=device)
    return {"input_ids": input_ids, "attention_mask": (places < lengths[:, None]).long()}
