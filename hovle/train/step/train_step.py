"""One optimizer step, whatever the number of micro-batches and processes."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import StopRunError
from ..data.batch import PackedBatch
from ..objectives.base import Objective
from ..parallel import gather, gradient_exchange
from .gradients import clip_gradients


@dataclass
class StepResult:
    """What one optimizer step measured, over all processes."""

    loss: float
    """Weighted sum of the mean terms."""
    terms: dict[str, float]
    """Mean of each term."""
    gradient_norm: float
    """Norm before clipping."""
    part_norms: dict[str, float]
    """The same of each part of the model that learns."""
    is_empty: bool = False
    """Whether the step held nothing to learn from: then the weights stay, and so do the optimizer's averages."""


class NonFiniteLossError(StopRunError):
    """The loss or its gradient became NaN or infinite; the message names the batch."""


class RuinedWeightsError(NonFiniteLossError):
    """An update left NaN or infinity in the weights; the message names them."""


UNTOUCHED = "Weights are as before this step; lower the learning rate or look at these samples."


def train_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[PackedBatch],
    max_gradient_norm: float,
    autocast: contextlib.AbstractContextManager,
    reduce_sum: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    num_processes: int = 1,
) -> StepResult:
    """Do one optimizer step over several micro-batches and processes as if they were one batch.

    Every term is divided by its count over the whole step, so cutting a batch differently changes nothing.

    Args:
        objective: Maps a batch to summed terms, possibly wrapped for data parallelism.
        optimizer: Over the trainable parameters.
        micro_batches: This process's share.
        max_gradient_norm: Gradients are clipped to this norm.
        autocast: Reusable context of the number format.
        reduce_sum: Sums a tensor over processes.
        num_processes: How many there are; data parallelism averages gradients, the loss here is a sum.

    Raises:
        NonFiniteLossError: When loss or gradient is not a number, on every process; weights are left as they were.
    """
    inner = unwrap(objective)
    weights = inner.weights
    counts = [inner.counts(batch) for batch in micro_batches]
    found = {name: reduce_sum(torch.stack([count[name] for count in counts]).sum()) for name in weights}
    totals = {name: count.clamp(min=1) for name, count in found.items()}
    losses, sums = [], torch.zeros(len(weights), device=totals[next(iter(weights))].device)
    for number, batch in enumerate(micro_batches, 1):
        with gradient_exchange(objective, is_last=number == len(micro_batches)):
            with autocast:
                terms = objective(batch).terms
            loss = torch.stack([weights[name] * terms[name] / totals[name] for name in weights]).sum()
            (loss * num_processes).backward()
        losses.append(loss.detach())
        sums += torch.stack([terms[name].detach() for name in weights])
    gradient_norm, part_norms = clip_gradients(inner, max_gradient_norm)
    means = {name: float(total / totals[name]) for name, total in zip(weights, reduce_sum(sums), strict=True)}
    total = sum(weights[name] * means[name] for name in weights)
    norms = {part: float(norm) for part, norm in part_norms.items()}
    is_empty = not any(weights[name] and float(count) for name, count in found.items())
    result = StepResult(total, means, float(gradient_norm), norms, is_empty)
    # Every process knows these numbers, so all of them stop, or keep their weights, or none does.
    if not (math.isfinite(result.loss) and math.isfinite(result.gradient_norm)):
        raise _non_finite(result, micro_batches, losses)
    if not is_empty:  # without gradients AdamW would still decay weights and move along old averages
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return result


def _non_finite(
    result: StepResult, micro_batches: list[PackedBatch], losses: list[torch.Tensor]
) -> NonFiniteLossError:
    """Name the batches whose loss is no number, on whichever process; all of them where only the gradient is none."""
    bad = [batch for batch, loss in zip(micro_batches, losses, strict=True) if not torch.isfinite(loss)]
    names = gather([name for batch in bad for name in batch.names])
    what = f"Loss is {result.loss}"
    if not names:
        names = gather([name for batch in micro_batches for name in batch.names])
        what = f"The gradient norm is {result.gradient_norm}"
    terms = ", ".join(f"{name} {value:.4g}" for name, value in result.terms.items())
    shown = f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''} ({len(names)} samples)"
    return NonFiniteLossError(f"{what} on the batch of {shown}; terms: {terms}. {UNTOUCHED}")


def unwrap(objective: nn.Module) -> Objective:
    """The objective inside a data-parallel wrapper."""
    return objective.module if hasattr(objective, "module") else objective  # type: ignore[return-value]
