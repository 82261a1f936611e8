"""The training loop all stages share: draw, step, log, validate, save."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from tqdm.auto import tqdm

from ..config import StageConfig
from ..data.packing import StreamPosition
from ..monitor.meter import Meter
from ..parallel import together
from ..step.optimizer import learning_rate_factor
from ..step.train_step import StepResult, to_device, train_step


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
