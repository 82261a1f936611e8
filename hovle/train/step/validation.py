"""Mean terms over held-out batches."""

import contextlib
import math

import torch
from torch import nn

from ..data.batch import PackedBatch
from ..parallel import reshard
from .train_step import unwrap


@torch.no_grad()
def validate(
    objective: nn.Module, batches: list[PackedBatch], autocast: contextlib.AbstractContextManager, accelerator
) -> dict[str, float]:
    """Mean of every term over some batches, without training (all ranks).

    Args:
        objective: Maps a batch to summed terms, possibly wrapped for data parallelism.
        batches: The same ones on every process: they are dealt out, and each counts once.
        autocast: Reusable context of the number format.
        accelerator: Knows processes and devices.
    """
    inner = unwrap(objective)
    names = [*inner.weights, *inner.only_validated]
    sums = torch.zeros(2, len(names), device=accelerator.device)  # terms, counts
    inner.eval()
    num_rounds = math.ceil(len(batches) / accelerator.num_processes)
    for number in range(num_rounds):
        place = number * accelerator.num_processes + accelerator.process_index
        # A process without a batch in the last round repeats one uncounted: shards can only be run together.
        # Uncompiled: a graph without gradients would be built for a handful of batches.
        with autocast, torch.compiler.set_stance("force_eager"):
            output = inner(batches[place % len(batches)].to(accelerator.device))
        if place >= len(batches):
            continue
        for column, name in enumerate(names):
            sums[0, column] += output.terms[name]
            sums[1, column] += output.counts[name]
    inner.train()
    reshard(inner)
    terms, counts = accelerator.reduce(sums, "sum")
    return dict(zip(names, (terms / counts.clamp(min=1)).tolist(), strict=True))
