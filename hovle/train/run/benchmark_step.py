"""Real steps of a stage on its first batches, over and over, to see how long they take; nothing is written."""

import dataclasses
import itertools
import time
from typing import Any

import torch

from ...machine.memory import keep_freed_memory
from ...machine.speed import choose_dtype
from ..config import StageConfig
from ..data.mixture import open_mixture
from ..objectives.choice import make_objective
from ..step.assembly import TrainableStep, prepare_model
from .stage_data import StageData
from .start import load_start

COMPILED_SHARE = {"distillation": 0.95, "next_token": 0.7}
"""What a compiled step takes of what few uncompiled rows promise, by objective, on the demo (dev/LOG.md)."""


class BenchmarkStep:
    """A stage whose steps are timed as training runs them. What it learns is lost.

    Args:
        config: The stage; its learning rate counts, its output does not.
        accelerator: Knows the device.
        dtype: Number format of matrix products.
        num_steps: Steps of one pass.
    """

    def __init__(self, config: StageConfig, accelerator: Any, dtype: torch.dtype, num_steps: int):
        mixture = open_mixture(config.data, config.seed)
        model, processor, _ = load_start(config)
        trainable = prepare_model(model, config, dtype, accelerator.device)
        objective = make_objective(config, model, processor.image_processor, trainable.text_table, dtype)
        keep_freed_memory(accelerator.device)
        self.step = TrainableStep(trainable, objective, config, accelerator, dtype).distribute()
        stream = iter(StageData(config, mixture, processor, accelerator).batches())
        self.steps = [
            [batch.to(accelerator.device) for batch in itertools.islice(stream, config.gradient_accumulation_steps)]
            for _ in range(num_steps)
        ]

    def step_all(self) -> float:
        """Do the steps; seconds of one. The first pass compiles, so its figure is of no use."""
        started_at = time.perf_counter()
        for number, micro_batches in enumerate(self.steps):
            self.step.step(number, micro_batches)
        return (time.perf_counter() - started_at) / len(self.steps)


def estimate_seconds(config: StageConfig, accelerator: Any) -> float:
    """Estimate the seconds of a stage's step within seconds: from uncompiled ones on few of its rows.

    Compiling takes a minute a stage, several where a machine is slow, so it is left to training. What a step takes
    with one row and with some tells what every row adds.
    """
    few = min(config.rows_per_batch, 4)
    dtype = choose_dtype(config.dtype, accelerator.device)
    seconds = {}
    for num_rows in {1, few}:
        part = dataclasses.replace(config, learning_rate=0.0, compile="off", rows_per_batch=num_rows)
        benchmark = BenchmarkStep(part, accelerator, dtype, num_steps=1)
        benchmark.step_all()
        seconds[num_rows] = benchmark.step_all()
    per_row = (seconds[few] - seconds[1]) / (few - 1) if few > 1 else 0.0
    uncompiled = seconds[few] + max(0.0, per_row) * (config.rows_per_batch - few)
    return uncompiled * (1.0 if config.compile == "off" else COMPILED_SHARE[config.objective.name])
