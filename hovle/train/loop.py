"""The training loop all stages share: draw, step, log, save."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import StopRunError
from .config import StageConfig
from .data import StreamPosition
from .objectives import Objective, learning_rate_factor


@dataclass
class StepResult:
    """What one optimizer step measured, over all processes."""

    loss: float
    """Weighted sum of the mean terms."""
    terms: dict[str, float]
    """Mean of each term."""
    gradient_norm: float
    """Norm before clipping."""


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
        NonFiniteLossError: When loss or gradient is not a number; weights are left as they were.
    """
    inner = unwrap(objective)
    weights = inner.weights
    counts = [inner.counts(batch) for batch in micro_batches]
    totals = {name: reduce_sum(torch.stack([count[name] for count in counts]).sum()).clamp(min=1) for name in weights}
    sums = {name: torch.zeros((), device=total.device) for name, total in totals.items()}
    for batch in micro_batches:
        with autocast:
            terms = objective(batch).terms
        loss = torch.stack([weights[name] * terms[name] / totals[name] for name in weights]).sum()
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"Loss is {float(loss.detach())} on {_names([batch])}; terms: "
                f"{', '.join(f'{name} {float(term.detach()):.4g}' for name, term in terms.items())}. {UNTOUCHED}"
            )
        (loss * num_processes).backward()
        for name in weights:
            sums[name] += terms[name].detach()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradient_norm = nn.utils.clip_grad_norm_(parameters, max_gradient_norm)
    if not torch.isfinite(gradient_norm):
        raise NonFiniteLossError(
            f"The gradient norm is {float(gradient_norm)} on {_names(micro_batches)}. {UNTOUCHED}"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    means = {name: float(reduce_sum(sums[name]) / totals[name]) for name in weights}
    return StepResult(sum(weights[name] * means[name] for name in weights), means, float(gradient_norm))


def unwrap(objective: nn.Module) -> Objective:
    """The objective inside a data-parallel wrapper."""
    return objective.module if hasattr(objective, "module") else objective  # type: ignore[return-value]


def _names(batches: list[dict]) -> str:
    names = [name for batch in batches for name in batch["names"]]
    return f"the batch of {', '.join(names[:8])}{', ...' if len(names) > 8 else ''} ({len(names)} samples)"


@torch.no_grad()
def validate(
    objective: nn.Module, batches: list[dict], autocast: contextlib.AbstractContextManager, accelerator
) -> dict[str, float]:
    """Mean of every term over some batches of each process, without training."""
    inner = unwrap(objective)
    sums = torch.zeros(2, len(inner.weights), device=accelerator.device)  # terms, counts
    inner.eval()
    for batch in batches:
        # Uncompiled: a graph without gradients would be built for a handful of batches.
        with autocast, torch.compiler.set_stance("force_eager"):
            output = inner(_to_device(batch, accelerator.device))
        for column, name in enumerate(inner.weights):
            sums[0, column] += output.terms[name]
            sums[1, column] += output.counts[name]
    inner.train()
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
    log: Callable[[dict], None],
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
        log: Takes one entry with units in its keys.
        save: Takes the number of finished steps and where the data continues.
        name: Shown on the progress bar.
    """
    progress = tqdm(
        total=config.num_steps, initial=first_step, desc=name, unit="step", disable=not accelerator.is_main_process
    )
    num_tokens = num_samples = 0
    started_at = time.perf_counter()
    data_seconds = 0.0
    for step in range(first_step, config.num_steps):
        waiting_since = time.perf_counter()
        micro_batches = [next(batches) for _ in range(config.gradient_accumulation_steps)]
        data_seconds += time.perf_counter() - waiting_since
        factor = learning_rate_factor(step, config.num_steps, config.warmup_ratio, config.final_learning_rate_ratio)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        result = train_step(
            objective,
            optimizer,
            [_to_device(batch, accelerator.device) for batch in micro_batches],
            config.max_gradient_norm,
            autocast,
            reduce_sum=lambda tensor: accelerator.reduce(tensor, "sum"),
            num_processes=accelerator.num_processes,
        )
        num_tokens += sum(int(batch["is_sample"].sum()) for batch in micro_batches) * accelerator.num_processes
        num_samples += sum(len(batch["names"]) for batch in micro_batches) * accelerator.num_processes
        progress.update()
        finished = step + 1
        if finished % config.log_every == 0 or finished == config.num_steps:
            elapsed_seconds = time.perf_counter() - started_at
            entry = {
                "step": finished,
                "loss": round(result.loss, 5),
                **{term: round(value, 5) for term, value in result.terms.items()},
                "gradient_norm": round(result.gradient_norm, 4),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "tokens_per_second": round(num_tokens / elapsed_seconds, 1),
                "samples_per_second": round(num_samples / elapsed_seconds, 2),
                "data_wait_ratio": round(data_seconds / elapsed_seconds, 4),
                "padding_ratio": round(1 - float(micro_batches[-1]["is_sample"].float().mean()), 4),
                "elapsed_seconds": round(elapsed_seconds, 1),
            }
            log(entry)
            progress.set_postfix_str(f"loss {result.loss:.3f}, {entry['tokens_per_second']:.0f} tokens/s")
            num_tokens = num_samples = 0
            data_seconds = 0.0
            started_at = time.perf_counter()
        if config.checkpoint_every and finished % config.checkpoint_every == 0 and finished < config.num_steps:
            save(finished, micro_batches[-1]["position"])
    progress.close()


def _to_device(batch: dict, device: torch.device) -> dict:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
