"""What this machine is good at: its fastest number format, its rates, and whether torch.compile works on it."""

import sys
import time
from collections.abc import Callable
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
    return _best_seconds(lambda: left @ right, torch.device("cpu"), num_trials=5)


def compiler_problem() -> str | None:
    """Why torch.compile cannot run here, in one line, or None: a missing compiler, missing Python headers, ..."""
    try:
        torch.compile(_sample, dynamic=False)(torch.ones(8))
    except Exception as error:  # whatever a broken tool chain raises
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None


def _sample(values: torch.Tensor) -> torch.Tensor:
    return values * 2 + 1


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds, counted as two, that large matrix products reach on this device per second; takes a second."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = torch.ones(2, size, size, dtype=dtype, device=device)
    return 2 * size**3 / _best_seconds(lambda: left @ right, device)


def memory_bytes_per_second(device: torch.device) -> float:
    """Bytes this device reads and writes per second when it copies a large tensor."""
    source = torch.ones(2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(work: Callable[[], object], device: torch.device, num_trials: int = 10) -> float:
    work()
    times = []
    for _ in range(num_trials):
        _wait_for(device)
        started_at = time.perf_counter()
        work()
        _wait_for(device)
        times.append(time.perf_counter() - started_at)
    return min(times)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_resident_bytes() -> int:
    """Most memory this process has held at once.

    `getrusage` is the second choice: on Linux its figure survives `exec`, so that a child of a large process starts
    with its parent's.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
