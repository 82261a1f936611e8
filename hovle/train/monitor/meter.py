"""What training measures about itself while it runs: speed and its share of the machine's peak (MFU)."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ...machine.speed import Stopwatch, gemm_peak
from ...model.configuration_hovle import HoVLEConfig
from ..data.batch import PackedBatch
from ..objectives.base import Objective
from ..plan.operations import operation_counter


class Meter:
    """Counts what training does between two log lines, and how long it takes.

    Args:
        objective: What is trained, without a data-parallel wrapper.
        first_batch: A batch of the run, on the device.
        autocast: Reusable context of the number format.
        dtype: That number format.
        num_processes: Processes that do the same.
    """

    def __init__(
        self,
        objective: Objective,
        first_batch: PackedBatch,
        autocast: contextlib.AbstractContextManager,
        dtype: torch.dtype,
        num_processes: int,
    ):
        self.teacher_time = objective.teacher_time
        self.num_processes = num_processes
        num_rows, row_length = first_batch.input_ids.shape
        if first_batch.num_language_rows:  # then rows are not alike
            self.batch_flops = count_flops(objective, first_batch, autocast)
        else:
            row = first_row(first_batch, objective.model.config)
            self.batch_flops = num_rows * count_flops(objective, row, autocast)
        linear = largest_linear(objective.model.model.language_model.layers)
        self.gemm_peak = gemm_peak(num_rows * row_length, linear, dtype, first_batch.input_ids.device)
        self.start()

    def start(self) -> None:
        """Begin to count; what came before, such as a first validation, is forgotten."""
        self._num_batches = self._num_tokens = self._num_slots = self._num_samples = 0
        self._data_seconds = self._paused_seconds = 0.0
        self.teacher_time.read()
        self._started_at = time.perf_counter()

    def facts(self) -> dict[str, float]:
        """What the MFU is computed from, in units of 1e12 operations: the peak is measured matrix products'."""
        return {"batch_tflops": round(self.batch_flops / 1e12, 4), "gemm_peak_tflops": round(self.gemm_peak / 1e12, 3)}

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time spent in here is spent waiting for the next batch."""
        started_at = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - started_at

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here, validating or saving, is no training."""
        started_at = time.perf_counter()
        yield
        self._paused_seconds += time.perf_counter() - started_at

    def add(self, micro_batches: list[PackedBatch]) -> None:
        """Count the batches of a step."""
        self._num_batches += len(micro_batches)
        self._num_tokens += sum(batch.num_tokens for batch in micro_batches)
        self._num_slots += sum(batch.is_sample.numel() for batch in micro_batches)
        self._num_samples += sum(len(batch.names) for batch in micro_batches)

    def read(self) -> dict[str, float]:
        """Rates since the last reading; then counting starts anew."""
        seconds = time.perf_counter() - self._started_at - self._paused_seconds
        teacher_seconds = self.teacher_time.read()
        rates = {
            "tokens_per_second": round(self._num_tokens * self.num_processes / seconds, 1),
            "samples_per_second": round(self._num_samples * self.num_processes / seconds, 2),
            "mfu": round(self._num_batches * self.batch_flops / seconds / self.gemm_peak, 4),
            "teacher_ratio": round(teacher_seconds / seconds, 4),
            "data_wait_ratio": round(self._data_seconds / seconds, 4),
            "padding_ratio": round(1 - self._num_tokens / self._num_slots, 4),
            "elapsed_seconds": round(seconds, 3),
        }
        self.start()
        return rates


def first_row(batch: PackedBatch, config: HoVLEConfig) -> PackedBatch:
    """The first packed row of a batch with its pictures."""
    num_placeholders = int((batch.input_ids[0] == config.image_token_id).sum())
    num_tiles = num_placeholders // config.tokens_per_tile(batch.pixel_values.shape[-1])
    num_samples = int(((batch.position_ids[0] == 0) & batch.is_sample[0]).sum())
    return dataclasses.replace(
        batch,
        input_ids=batch.input_ids[:1],
        targets=batch.targets[:1],
        position_ids=batch.position_ids[:1],
        is_sample=batch.is_sample[:1],
        attention_mask=None if batch.attention_mask is None else batch.attention_mask[:1],
        pixel_values=batch.pixel_values[:num_tiles],
        word_ids=None if batch.word_ids is None else batch.word_ids[:num_tiles],
        is_filler=None if batch.is_filler is None else batch.is_filler[:num_tiles],
        character_ids=None if batch.character_ids is None else batch.character_ids[:num_tiles],
        picture_keys=batch.picture_keys[:num_samples],  # one a sample, where they are needed
    )


def count_flops(objective: Objective, batch: PackedBatch, autocast: contextlib.AbstractContextManager) -> int:
    """Count floating-point operations of matrix products, forward and backward, in student and language model.

    The pass is run once, uncompiled, because a compiled graph hides its operations from the counter; it leaves no
    gradient and draws no random number. A teacher's operations are left out; causal attention counts in full.
    """
    counter = operation_counter()
    stopwatch, outside = objective.teacher_time, _FlopsInside(counter)
    objective.teacher_time = outside
    devices = [batch.input_ids.device] if batch.input_ids.is_cuda else []
    try:
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), counter:
            with autocast:
                terms = objective(batch).terms
            torch.stack([weight * terms[name] for name, weight in objective.weights.items()]).sum().backward()
    finally:
        objective.teacher_time = stopwatch
        objective.zero_grad(set_to_none=True)
    return counter.get_total_flops() - outside.flops


class _FlopsInside(Stopwatch):
    """Takes a stopwatch's place and counts operations instead of seconds."""

    def __init__(self, counter: FlopCounterMode):
        super().__init__()
        self.counter = counter
        self.flops = 0

    def __enter__(self) -> None:
        self._before = self.counter.get_total_flops()

    def __exit__(self, *exception) -> None:
        self.flops += self.counter.get_total_flops() - self._before


def largest_linear(layers: nn.Module) -> nn.Linear:
    """The linear map with most weights, where most of the work is done."""
    linear = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    return max(linear, key=lambda module: module.in_features * module.out_features)
