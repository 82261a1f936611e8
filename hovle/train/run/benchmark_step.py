"""Real steps of a stage on its first batches, over and over, to see how long they take; nothing is written."""

import dataclasses
import itertools
import time

import torch

from ...machine.memory import keep_freed_memory
from ...machine.speed import choose_dtype
from ..config import StageConfig
from ..model.layers import checkpoint_activations, compile_layers
from ..step.optimizer import make_optimizer
from ..step.train_step import to_device, train_step
from .stage import set_up


class Trial:
    """A stage that is set up to be timed as training runs it. What it learns is lost.

    Args:
        config: The stage; its learning rate counts, its output does not.
        accelerator: Knows the device.
        dtype: Number format of matrix products.
        num_steps: Steps of one pass.
    """

    def __init__(self, config: StageConfig, accelerator, dtype: torch.dtype, num_steps: int):
        stage = set_up(config, accelerator, resume=False)
        keep_freed_memory(accelerator.device)
        self.objective = stage.objective.to(accelerator.device).train()
        if config.activation_checkpointing:
            checkpoint_activations(stage.model)
        compile_layers(stage.model, config.compile)
        self.optimizer = make_optimizer(self.objective, config)
        self.autocast = torch.autocast(accelerator.device.type, dtype, enabled=dtype != torch.float32)
        self.max_gradient_norm = config.max_gradient_norm
        stream = (to_device(batch, accelerator.device) for batch in stage.batches(stage.mixture))
        per_step = config.gradient_accumulation_steps
        self.steps = [list(itertools.islice(stream, per_step)) for _ in range(num_steps)]

    def step_all(self) -> float:
        """Do the steps; seconds of one. The first pass compiles, so its figure is of no use."""
        started_at = time.perf_counter()
        for micro_batches in self.steps:
            train_step(self.objective, self.optimizer, micro_batches, self.max_gradient_norm, self.autocast)
        return (time.perf_counter() - started_at) / len(self.steps)


def seconds_per_step(config: StageConfig, accelerator, num_steps: int = 3) -> float:
    """Measure the steps of a stage, compiled as it will be; compiled code stays in the compiler's cache.

    Args:
        config: The stage.
        accelerator: Knows the device.
        num_steps: Steps to take the mean of.
    """
    config = dataclasses.replace(config, learning_rate=0.0)
    trial = Trial(config, accelerator, choose_dtype(config.dtype, accelerator.device), num_steps)
    trial.step_all()
    seconds = trial.step_all()
    torch.compiler.reset()  # lets go of the layers
    return seconds
