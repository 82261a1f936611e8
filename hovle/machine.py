"""What this machine is good at: its fastest number format, and whether torch.compile works on it."""

import platform
import time
from pathlib import Path

import torch


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The format matrix products run fastest in: bfloat16, or float32 where that is as fast."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    seconds = {dtype: _matmul_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return min(seconds, key=lambda dtype: seconds[dtype])


def _matmul_seconds(dtype: torch.dtype) -> float:
    left, right = torch.ones(1024, 512, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
    left @ right
    times = []
    for _ in range(5):
        started_at = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started_at)
    return min(times)


def compiler_problem() -> str | None:
    """Why torch.compile cannot run here, in one line, or None: a missing compiler, missing Python headers, ..."""
    try:
        torch.compile(_sample, dynamic=False)(torch.ones(8))
    except Exception as error:  # whatever a broken tool chain raises
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None


def _sample(values: torch.Tensor) -> torch.Tensor:
    return values * 2 + 1


def processor_name() -> str:
    """What the processor calls itself, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
