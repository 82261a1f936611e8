"""The devices a plan knows, and what a run reaches of their peak."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ...machine.speed import matmul_flops_per_second, memory_bytes_per_second
from ..config import StageConfig

GIB = 2**30


GPU_MFU = 0.4
"""Assumed share of a GPU's peak: what published packed trainers reach, 35 to 45 %."""


@dataclass(frozen=True)
class Device:
    """What a training device does per second, holds and costs."""

    memory_gib: float
    flops_per_second: float
    """Peak of dense products in bfloat16; for the CPU as measured, in the fastest format."""
    bytes_per_second: float
    """Memory bandwidth."""
    dollars_per_hour: float
    """An assumption; `--price` replaces it."""
    mfu: float = GPU_MFU
    """Share of the peak that training is assumed to reach; `--mfu` replaces it."""
    process_gib: float = 1.0
    """Held beside tensors: driver context and libraries."""
    slack_ratio: float = 0.05
    """Share of the tensors' memory lost to fragmentation."""
    is_cpu: bool = False
    """Whether it is this machine's processor."""


GPUS = {
    "B200-180G": Device(180, 2250e12, 8000e9, 5.00),
    "H200-141G": Device(141, 989e12, 4800e9, 3.20),
    "H100-80G": Device(80, 989e12, 3350e9, 2.50),
    "A100-80G": Device(80, 312e12, 2039e9, 1.50),
    "A100-40G": Device(40, 312e12, 1555e9, 1.20),
    "MI300X-192G": Device(192, 1307e12, 5300e9, 2.50),
    "L40S-48G": Device(48, 362e12, 864e9, 1.00),
    "RTX-4090-24G": Device(24, 165e12, 1008e9, 0.40),
    "RTX-3090-24G": Device(24, 71e12, 936e9, 0.25),
    "A10G-24G": Device(24, 70e12, 600e9, 0.60),
    "L4-24G": Device(24, 121e12, 300e9, 0.60),
}
"""Makers' figures; prices are round rental prices of 2026, to be replaced by yours."""


CPU_MFU = 0.3
"""Assumed share of a CPU's measured rate; the demo's alignment stage reached about this."""


CPU_SLACK_RATIO = 0.2
"""What glibc's allocator holds beyond live tensors: 18 to 23 % at the peak of checked steps on Linux."""


CPU_ADAPTER_SLACK_RATIO = 0.45
"""The same with LoRA: 36 to 55 %. Live tensors are those predicted, within 2 %; the rest is glibc's: narrow outputs of
adapters, which stay, lie in the holes that wide temporaries leave. Where those get pages of their own
(`MALLOC_MMAP_THRESHOLD_=1048576`), 5 to 10 % remain."""


def cpu_slack_ratio(config: StageConfig) -> float:
    """Share of the tensors' memory that a CPU process loses to fragmentation in a stage."""
    return CPU_SLACK_RATIO if config.lora is None else CPU_ADAPTER_SLACK_RATIO


def this_machine(dtype: torch.dtype) -> Device:
    """Measure the CPU: seconds of work."""
    import psutil  # comes with accelerate

    cpu, process = torch.device("cpu"), psutil.Process()
    return Device(
        memory_gib=psutil.virtual_memory().total / GIB,
        flops_per_second=matmul_flops_per_second(cpu, dtype),
        bytes_per_second=memory_bytes_per_second(cpu),
        dollars_per_hour=0.0,
        mfu=CPU_MFU,
        process_gib=process.memory_info().rss / GIB,
        slack_ratio=CPU_SLACK_RATIO,
        is_cpu=True,
    )


def choose_device(name: str, dtype: torch.dtype, mfu: float | None = None, price: float | None = None) -> Device:
    """A GPU of the table or this CPU, measured; with other assumptions where they are given."""
    if name != "cpu" and name not in GPUS:
        raise ValueError(f"Unknown GPU {name!r}; known: {', '.join(GPUS)}, and cpu for this machine.")
    if mfu is not None and not 0 < mfu <= 1:
        raise ValueError(f"--mfu is a share of the peak, above 0 and at most 1, got {mfu}.")
    device = this_machine(dtype) if name == "cpu" else GPUS[name]
    changes: dict[str, Any] = {"mfu": mfu, "dollars_per_hour": price}
    return dataclasses.replace(device, **{key: value for key, value in changes.items() if value is not None})
