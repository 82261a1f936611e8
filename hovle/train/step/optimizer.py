"""The optimizer and its schedule."""

import math

import torch
from torch import nn

from ..config import StageConfig


def learning_rate_factor(step: int, num_steps: int, warmup_ratio: float, final_ratio: float) -> float:
    """Linear warm-up, then a cosine from 1 to `final_ratio` at the last step; `step` counts from 0."""
    num_warmup = math.ceil(num_steps * warmup_ratio)
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - 1 - num_warmup)
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, config: StageConfig, step: int) -> None:
    """Give an optimizer the learning rate of a step, counted from 0."""
    factor = learning_rate_factor(step, config.num_steps, config.warmup_ratio, config.final_learning_rate_ratio)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * factor


def make_optimizer(objective: nn.Module, config: StageConfig) -> torch.optim.AdamW:
    """AdamW over what is trainable; only matrices decay."""
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    groups = [
        {"params": [item for item in parameters if item.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [item for item in parameters if item.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # torch 2.6 cannot resume an empty one
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.adam_betas[0], config.adam_betas[1]), fused=True
    )
