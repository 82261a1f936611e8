"""The training loop all stages share: draw, step, log, validate, save."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import StopRunError
from .config import StageConfig
from .data import StreamPosition
from .meter import Meter, gradient_norms
from .objectives import Objective, learning_rate_factor
from .parallel import gather, gradient_exchange, reshard, together, whole


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


UNTOUCHED = "Weights are as before this step; lower the learning rate or look at these samples."


def train_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[dict],
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
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    part_norms = {part: whole(norm) for part, norm in gradient_norms(inner).items()}
    gradient_norm = torch.stack(list(part_norms.values())).norm()
    nn.utils.clip_grads_with_norm_(parameters, max_gradient_norm, gradient_norm)
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


def _non_finite(result: StepResult, micro_batches: list[dict], losses: list[torch.Tensor]) -> NonFiniteLossError:
    """Name the batches whose loss is no number, on whichever process; all of them where only the gradient is none."""
    bad = [batch for batch, loss in zip(micro_batches, losses, strict=True) if not torch.isfinite(loss)]
    names = gather([name for batch in bad for name in batch["names"]])
    what = f"Loss is {result.loss}"
    if not names:
        names = gather([name for batch in micro_batches for name in batch["names"]])
        what = f"The gradient norm is {result.gradient_norm}"
    terms = ", ".join(f"{name} {value:.4g}" for name, value in result.terms.items())
    shown = f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''} ({len(names)} samples)"
    return NonFiniteLossError(f"{what} on the batch of {shown}; terms: {terms}. {UNTOUCHED}")


def unwrap(objective: nn.Module) -> Objective:
    """The objective inside a data-parallel wrapper."""
    return objective.module if hasattr(objective, "module") else objective  # type: ignore[return-value]


@torch.no_grad()
def validate(
    objective: nn.Module, batches: list[dict], autocast: contextlib.AbstractContextManager, accelerator
) -> dict[str, float]:
    """Mean of every term over some batches, without training (together).

    Args:
        objective: Maps a batch to summed terms, possibly wrapped for data parallelism.
        batches: The same ones on every process: they are dealt out, and each counts once.
        autocast: Reusable context of the number format.
        accelerator: Knows processes and devices.
    """
    inner = unwrap(objective)
    sums = torch.zeros(2, len(inner.weights), device=accelerator.device)  # terms, counts
    inner.eval()
    num_rounds = math.ceil(len(batches) / accelerator.num_processes)
    for number in range(num_rounds):
        place = number * accelerator.num_processes + accelerator.process_index
        # A process without a batch in the last round repeats one uncounted: shards can only be run together.
        # Uncompiled: a graph without gradients would be built for a handful of batches.
        with autocast, torch.compiler.set_stance("force_eager"):
            output = inner(to_device(batches[place % len(batches)], accelerator.device))
        if place >= len(batches):
            continue
        for column, name in enumerate(inner.weights):
            sums[0, column] += output.terms[name]
            sums[1, column] += output.counts[name]
    inner.train()
    reshard(inner)
    terms, counts = accelerator.reduce(sums, "sum")
    return dict(zip(inner.weights, (terms / counts.clamp(min=1)).tolist(), strict=True))


def train(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[dict],
    config: StageConfig,
    *,
    first_step: int,
    autocast: contextlib.AbstractContextManager,
    accelerator,
    meter: Meter,
    log: Callable[[dict], None],
    validate: Callable[[int], None],
    save: Callable[[int, StreamPosition], None],
    name: str,
) -> None:
    """Run the steps of a stage.

    Args:
        objective: Maps a batch to summed terms.
        optimizer: Over the trainable parameters.
        batches: Endless packed batches of this process.
        config: Schedule of the stage.
        first_step: 0, or the step a checkpoint was saved at.
        autocast: Context of the number format.
        accelerator: Knows processes and devices.
        meter: Measures speed.
        log: Takes one entry with units in its keys.
        validate: Takes the number of finished steps.
        save: Takes the number of finished steps and where the data continues.
        name: Shown on the progress bar.
    """
    progress = tqdm(
        total=config.num_steps, initial=first_step, desc=name, unit="step", disable=not accelerator.is_main_process
    )
    meter.start()
    num_empty = 0
    for step in range(first_step, config.num_steps):
        with together(), meter.waiting_for_data():  # the others' data is waited for outside the meter
            micro_batches = [next(batches) for _ in range(config.gradient_accumulation_steps)]
        factor = learning_rate_factor(step, config.num_steps, config.warmup_ratio, config.final_learning_rate_ratio)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        result = train_step(
            objective,
            optimizer,
            [to_device(batch, accelerator.device) for batch in micro_batches],
            config.max_gradient_norm,
            autocast,
            reduce_sum=lambda tensor: accelerator.reduce(tensor, "sum"),
            num_processes=accelerator.num_processes,
        )
        meter.add(micro_batches)
        num_empty += result.is_empty
        progress.update()
        finished = step + 1
        is_last = finished == config.num_steps
        if finished % config.log_every == 0 or is_last:
            entry = log_entry(finished, result, optimizer.param_groups[0]["lr"], num_empty, meter)
            num_empty = 0
            log(entry)
            progress.set_postfix_str(f"loss {result.loss:.3f}, {entry['tokens_per_second']:.0f} tokens/s")
        with meter.paused():
            if config.validate_every and finished % config.validate_every == 0 and not is_last:
                validate(finished)
            if config.checkpoint_every and finished % config.checkpoint_every == 0 and not is_last:
                save(finished, micro_batches[-1]["position"])
    progress.close()


def log_entry(step: int, result: StepResult, learning_rate: float, num_empty: int, meter: Meter) -> dict[str, float]:
    """What is logged of a step, and of speed and steps without anything to learn from since the last logged one."""
    return {
        "step": step,
        "loss": round(result.loss, 5),
        **{term: round(value, 5) for term, value in result.terms.items()},
        "gradient_norm": round(result.gradient_norm, 4),
        **{f"gradient_norm_{part}": round(norm, 4) for part, norm in result.part_norms.items()},
        "learning_rate": learning_rate,
        "steps_without_loss": num_empty,
        **meter.read(),
    }


def to_device(batch: dict, device: torch.device) -> dict:
    """Move a batch's tensors."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
