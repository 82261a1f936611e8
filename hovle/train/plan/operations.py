"""Count floating-point operations of matrix products, attention on the CPU included."""

import torch
from torch.utils.flop_counter import FlopCounterMode

CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}
"""Attention on the CPU, which torch's counter does not know -> the operation it knows with the same matrices."""


def operation_counter() -> FlopCounterMode:
    """torch's counter of floating-point operations, with attention on the CPU; a context manager."""
    counter = FlopCounterMode(display=False)
    known = counter.flop_registry
    counter.flop_registry = {**known, **{mine: known[torch_s] for mine, torch_s in CPU_ATTENTION.items()}}
    return counter
