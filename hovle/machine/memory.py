"""What a process holds of this machine's memory, and how freed memory is kept or given back."""

import contextlib
import ctypes
import platform
import sys
from pathlib import Path

import torch


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


def return_freed_memory() -> None:
    """Give memory that is free again back to the system; glibc keeps it, in pieces between what is still used."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such call
            ctypes.CDLL(None).malloc_trim(0)


def peak_resident_bytes() -> int:
    """Most memory this process has held at once.

    `getrusage` is the second choice: on Linux its figure survives `exec`, so that a child of a large process starts
    with its parent's.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
