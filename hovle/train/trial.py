"""Real steps of a stage on its first batches, over and over, to see how long they take; nothing is written."""

import dataclasses
import itertools
import time

import torch

from .config import StageConfig
from .loop import to_device, train_step
from .setup import choose_dtype, compile_layers, make_optimizer
from .stage import set_up


class Trial:
    """A stage that is set up to be timed. What it learns is lost.

    Args:
        config: The stage; its learning rate counts, its output does not.
        accelerator: Knows the device.
        dtype: Number format of matrix products.
        num_batches: Steps of one pass.
    """

    def __init__(self, config: StageConfig, accelerator, dtype: torch.dtype, num_batches: int):
        stage = set_up(config, accelerator, resume=False)
        self.objective = stage.objective.to(accelerator.device).train()
        compile_layers(stage.model, config.compile)
        self.optimizer = make_optimizer(self.objective, config)
        self.autocast = torch.autocast(accelerator.device.type, dtype, enabled=dtype != torch.float32)
        self.max_gradient_norm = config.max_gradient_norm
        stream = itertools.islice(stage.batches(stage.mixture), num_batches)
        self.batches = [to_device(batch, accelerator.device) for batch in stream]

    def step_all(self) -> float:
        """Do one step for each batch; seconds a step. The first pass compiles, so its figure is of no use."""
        started_at = time.perf_counter()
        for batch in self.batches:
            train_step(self.objective, self.optimizer, [batch], self.max_gradient_norm, self.autocast)
        return (time.perf_counter() - started_at) / len(self.batches)


def seconds_per_step(config: StageConfig, accelerator, num_batches: int = 3) -> float:
    """Measure the steps of a stage, compiled as it will be; compiled code stays in the compiler's cache.

    Args:
        config: The stage, without accumulation.
        accelerator: Knows the device.
        num_batches: Steps to take the mean of.
    """
    config = dataclasses.replace(config, learning_rate=0.0)
    trial = Trial(config, accelerator, choose_dtype(config.dtype, accelerator.device), num_batches)
    trial.step_all()
    seconds = trial.step_all()
    torch.compiler.reset()  # lets go of the layers
    return seconds
