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


def seconds_per_step(config: StageConfig, accelerator: Any, num_steps: int = 3) -> float:
    """Measure the steps of a stage, compiled as it will be; compiled code stays in the compiler's cache.

    Args:
        config: The stage.
        accelerator: Knows the device.
        num_steps: Steps to take the mean of.
    """
    config = dataclasses.replace(config, learning_rate=0.0)
    benchmark = BenchmarkStep(config, accelerator, choose_dtype(config.dtype, accelerator.device), num_steps)
    benchmark.step_all()
    seconds = benchmark.step_all()
    torch.compiler.reset()  # lets go of the layers
    return seconds
