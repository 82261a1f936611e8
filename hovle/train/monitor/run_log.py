"""A run's log: entries in a file, numbers to trackers, and what the run ran on."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ...files.atomic import append_log
from ...machine.facts import environment
from ...machine.speed import dtype_name
from ..config import StageConfig


def make_log(output: Path, accelerator) -> Callable[[dict], None]:
    """Write entries to `log.jsonl` on the main process, stamped with the time, and their numbers to the trackers."""

    def log(entry: dict) -> None:
        if accelerator.is_main_process:
            append_log(output / "log.jsonl", {"time": round(time.time(), 1), **entry})
        numbers = tracked_numbers(entry)
        if numbers:
            accelerator.log(numbers, step=entry["step"])

    return log


def tracked_numbers(entry: dict) -> dict[str, float]:
    """Figures of a log entry under the names trackers show: `train/loss`, `validation/cross_entropy`."""
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
