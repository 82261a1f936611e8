"""What this machine is good at: its fastest number format, how fast it multiplies, what torch.compile lacks."""

import contextlib
import ctypes
import logging
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .requirements import installed_version


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


def keep_freed_memory(device: torch.device) -> bool:
    """Let the C library reuse large blocks instead of returning them to the system; whether that matters and works.

    A training step frees and asks for the same few gigabytes over and over, and the system clears every page it hands
    out anew: with glibc's own settings that takes about a tenth of a step on a CPU.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # their numbers in malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(mmap_max, 0), mallopt(trim_threshold, 2**31 - 1), mallopt(top_pad, 2**26)])


def compiler_problem(device: torch.device | None = None) -> str | None:
    """Why torch.compile cannot run here, in one line, or None: a missing compiler, missing Python headers, ...

    Args:
        device: Where it is tried, as CPUs need a C++ compiler and GPUs Triton; by default on a GPU if there is one.
    """
    remarks = logging.getLogger("torch.utils.cpp_extension")  # on a CPU: that CUDA's compiler finds no GPU
    level = remarks.level
    remarks.setLevel(logging.ERROR)
    try:
        where = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.compile(_sample, dynamic=False)(torch.ones(8, device=where))
    except Exception as error:  # whatever a broken tool chain raises
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    finally:
        remarks.setLevel(level)
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


def environment(*packages: str) -> dict[str, str | None]:
    """What a reader needs to judge figures measured here: processor, versions, and the commit of a checkout."""
    versions = {name: installed_version(name) or "not installed" for name in ("torch", "transformers", *packages)}
    commit = ""
    if shutil.which("git"):
        command = ["git", "rev-parse", "--short", "HEAD"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
        commit = result.stdout.strip()
    return {
        "processor": processor_name(),
        "python": platform.python_version(),
        **versions,
        "commit": commit or None,
    }


def return_freed_memory() -> None:
    """Give memory that is free again back to the system; glibc keeps it, in pieces between what is still used."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such call
            ctypes.CDLL(None).malloc_trim(0)


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds, counted as two, that large matrix products reach on this device per second."""
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
