"""What a reader must know of this machine to judge a figure, and what torch.compile lacks on it."""

import logging
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from ..requirements import installed_version


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
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
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
