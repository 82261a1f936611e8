"""What this machine is good at: its fastest number format, how fast it multiplies and reads."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The format matrix products run fastest in: bfloat16, or float32 where that is as fast."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    seconds = {dtype: _matmul_seconds(dtype, (1024, 512, 1024), device) for dtype in (torch.float32, torch.bfloat16)}
    return min(seconds, key=lambda dtype: seconds[dtype])


def gemm_peak(num_rows: int, linear: nn.Linear, dtype: torch.dtype, device: torch.device) -> float:
    """Measure how many floating-point operations a second matrix products of a model's own shape reach here.

    Args:
        num_rows: Vectors multiplied at once.
        linear: A linear map of the model; its sizes matter, not its weights.
        dtype: Format of both factors.
        device: Where.
    """
    sizes = (num_rows, linear.in_features, linear.out_features)
    return 2 * math.prod(sizes) / _matmul_seconds(dtype, sizes, device)


def _matmul_seconds(dtype: torch.dtype, sizes: tuple[int, int, int], device: torch.device) -> float:
    """Shortest time of one product of matrices `(rows, inner)` and `(inner, columns)`."""
    rows, inner, columns = sizes
    generator = torch.Generator().manual_seed(0)  # its own: measuring must not change what training draws
    left = torch.rand(rows, inner, generator=generator).to(device, dtype)
    right = torch.rand(inner, columns, generator=generator).to(device, dtype)
    return _best_seconds(lambda: left @ right, device)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Shortest time of doing something, over a few trials after one that warms up."""
    work()
    num_runs = 20 if device.type == "cuda" else 1  # launching one takes longer than a small product
    times = []
    for _ in range(10):
        wait_for_device(device)
        started_at = time.perf_counter()
        for _ in range(num_runs):
            work()
        wait_for_device(device)
        times.append((time.perf_counter() - started_at) / num_runs)
    return min(times)


def wait_for_device(device: torch.device) -> None:
    """Return once everything given to a device is done; a clock read before that shows too little."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Adds up the seconds spent inside `with stopwatch:`, on a CUDA device those of the device, without waiting."""

    def __init__(self):
        self._spans: list[tuple] = []
        self._began: Any = None

    def __enter__(self) -> None:
        self._began = self._mark()

    def __exit__(self, *exception) -> None:
        self._spans.append((self._began, self._mark()))

    def _mark(self):
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> float:
        """Seconds since the last reading."""
        spans, self._spans = self._spans, []
        if not torch.cuda.is_available():
            return sum(end - began for began, end in spans)
        torch.cuda.synchronize()
        return sum(began.elapsed_time(end) for began, end in spans) / 1000  # CUDA gives milliseconds


@functools.cache
def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds, counted as two, that large matrix products reach on this device per second; measured once."""
    size = 8192 if device.type == "cuda" else 1024
    return 2 * size**3 / _matmul_seconds(dtype, (size, size, size), device)


def memory_bytes_per_second(device: torch.device) -> float:
    """Bytes this device reads and writes per second when it copies a large tensor."""
    source = torch.ones(2**24, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        wait_for_device(device)
        started_at = time.perf_counter()
        target.copy_(source)
        wait_for_device(device)
        times.append(time.perf_counter() - started_at)
    return 2 * source.nbytes / min(times)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Number format of matrix products: as named, or for `auto` the one this machine multiplies faster in."""
    if name != "auto":
        return getattr(torch, name)
    return fastest_dtype(device)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
