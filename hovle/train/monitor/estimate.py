"""What a plan says of a run that is about to start, and what the run then measured: both go to its log."""

import contextlib
import logging
import statistics
from collections.abc import Iterator
from typing import Any

import torch

from ...errors import printable_name
from ...machine.memory import peak_resident_bytes
from ...machine.speed import matmul_flops_per_second
from ...model.configuration_hovle import HoVLEConfig
from ..config import StageConfig
from ..data.batch import PackedBatch
from ..plan.cost import StageCost, Workload
from ..plan.devices import CPU_MFU, GIB, GPU_MFU, cpu_slack_ratio


def is_planned(config: StageConfig) -> bool:
    """Whether the plan's costs are those of this stage: of teachers it knows timm's only."""
    return all(teacher.kind == "timm" for teacher in config.teacher)


@contextlib.contextmanager
def _without_errors_of(name: str) -> Iterator[None]:
    """Keep a logger from telling of an error that is caught and told in a line."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _line(error: Exception) -> str:
    return printable_name(next(iter(str(error).splitlines()), ""))


class Estimate:
    """Prediction and measurement of one run on the main process.

    `predicted` is None for a stage that the plan does not know, and where predicting failed; `problem` says why then.

    Args:
        config: The stage.
        model: Its model, on the device already.
        dtype: Number format of matrix products.
        batch: A packed micro-batch of its data.
        accelerator: Knows processes and device.
    """

    def __init__(self, config: StageConfig, model: HoVLEConfig, dtype: torch.dtype, batch: PackedBatch, accelerator):
        self.device: torch.device = accelerator.device
        self.rates: list[float] = []
        self.predicted: dict[str, Any] | None = None
        self.problem: str | None = None
        if is_planned(config):
            try:
                with _without_errors_of("torch._subclasses.fake_tensor"):
                    self.predicted = self._predict(config, model, dtype, batch, accelerator)
            except Exception as error:  # whatever it is, nobody's run may end for a forecast
                self.problem = f"What this run will take cannot be predicted ({type(error).__name__}: {_line(error)})."

    def _predict(
        self, config: StageConfig, model: HoVLEConfig, dtype: torch.dtype, batch: PackedBatch, accelerator
    ) -> dict[str, Any]:
        work = Workload.of_batch(batch)
        with torch.random.fork_rng(devices=[]):  # the run's own random numbers stay as they are
            cost = StageCost(config, model, dtype)
            flops, memory = sum(cost.flops(work).values()), cost.memory(work, accelerator.num_processes)
        is_cpu = self.device.type == "cpu"
        reached = matmul_flops_per_second(self.device, dtype) * (CPU_MFU if is_cpu else GPU_MFU)
        to_come = memory.peak - memory.weights - memory.teacher
        micro_batches = config.gradient_accumulation_steps * accelerator.num_processes
        return {
            "flops_per_step": flops * micro_batches,
            "tokens_per_second": round(work.num_filled * accelerator.num_processes * reached / flops, 1),
            "peak_memory_gib": round((self._held() + to_come * (1 + cpu_slack_ratio(config) * is_cpu)) / GIB, 3),
        }

    def _held(self) -> int:
        """Bytes that are there before the first step."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        import psutil  # comes with accelerate

        return psutil.Process().memory_info().rss

    def note(self, entry: dict) -> None:
        """Take a logged step into account."""
        self.rates.append(entry["tokens_per_second"])

    def measured(self) -> dict[str, float | None]:
        """What the run reached: the median of its logged speeds, and the most memory so far."""
        peak = peak_resident_bytes()
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        rate = statistics.median(self.rates) if self.rates else None
        return {"tokens_per_second": rate, "peak_memory_gib": round(peak / GIB, 3)}
