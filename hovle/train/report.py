"""What a run tells people: its log, what it ran on, and what a dry run shows."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from ..machine import environment
from ..modeling_hovle import IGNORE_INDEX
from ..processing_hovle import HoVLEProcessor
from . import checkpoint as checkpoints
from .config import StageConfig
from .data import Mixture
from .setup import dtype_name


def make_log(output: Path, accelerator) -> Callable[[dict], None]:
    """Write entries to `log.jsonl` on the main process, stamped with the time, and their numbers to the trackers."""

    def log(entry: dict) -> None:
        if accelerator.is_main_process:
            checkpoints.append_log(output / "log.jsonl", {"time": round(time.time(), 1), **entry})
        numbers = tracked_numbers(entry)
        if numbers:
            accelerator.log(numbers, step=entry["step"])

    return log


def tracked_numbers(entry: dict) -> dict[str, float]:
    """Figures of a log entry under the names trackers show: `train/loss`, `validation/reply_nats`."""
    group = entry.get("event", "train")
    return {
        f"{group}/{name}": value
        for name, value in flatten(entry).items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker that accelerate does not know or whose package is missing."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"tracking names {name!r}; accelerate knows {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}.")
        if name in LoggerType and LoggerType(name) not in get_available_trackers():
            raise ValueError(f"tracking names {name}, which is not installed: pip install {name}, or take it out.")


@contextlib.contextmanager
def tracking(config: StageConfig, accelerator) -> Iterator[None]:
    """Send the log to the recipe's trackers, too, while inside; those that write files use the run folder."""
    if config.tracking:
        accelerator.log_with = list(config.tracking)
        accelerator.project_configuration.set_directories(config.output)
        name = Path(config.output).name
        options = {"wandb": {"name": name, "dir": config.output}, "trackio": {"name": name}}
        accelerator.init_trackers("hovle", config=flatten(config.to_dict()), init_kwargs=options)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def flatten(values: dict, prefix: str = "") -> dict[str, str | int | float | bool | None]:
    """Nested fields as `model.image_size`; lists as text."""
    flat: dict = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value) if isinstance(value, list) else value
    return flat


def run_environment(dtype: torch.dtype, is_compiled: bool, accelerator) -> dict:
    """What a reader needs to judge a run's figures."""
    return {
        "device": str(accelerator.device),
        "num_processes": accelerator.num_processes,
        "num_threads": torch.get_num_threads(),
        "dtype": dtype_name(dtype),
        "compiled": is_compiled,
        **environment(),
    }


def describe(
    objective: nn.Module, batch: dict, processor: HoVLEProcessor, mixture: Mixture, config: StageConfig
) -> str:
    """What a stage would train on what, in a few lines, with one decoded sample."""
    trained = sum(item.numel() for item in objective.parameters() if item.requires_grad)
    total = sum(item.numel() for item in objective.parameters())
    samples = len(batch["names"])
    ends = (batch["position_ids"][0, 1:] == 0).nonzero().flatten() + 1
    end = int(ends[0]) if len(ends) else config.row_length
    supervised = int((batch["targets"] != IGNORE_INDEX).sum())
    lines = [
        f"objective       {config.objective.name}",
        f"trains          {', '.join(config.trainable) or 'adapters'}: {trained:,} of {total:,} parameters",
        *(f"source          {line}" for line in mixture.describe()),
        f"one batch       {samples} samples in {config.rows_per_batch} rows of {config.row_length} tokens, "
        f"{len(batch['pixel_values'])} tiles, {float(batch['is_sample'].float().mean()):.1%} filled, "
        f"{supervised} supervised tokens",
        f"whole run       {config.num_steps:,} steps of {config.gradient_accumulation_steps} batches",
        "first sample    " + processor.tokenizer.decode(batch["input_ids"][0, :end]),
    ]
    return "\n".join(lines)
