"""The optimizer and its schedule."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..config import StageConfig
from ..objectives.base import Objective
from .gradients import trained_parts


def learning_rate_factor(
    step: int, num_steps: int, warmup_ratio: float, final_ratio: float, schedule: str = "cosine"
) -> float:
    """Linear warm-up, then a cosine or a line from 1 to `final_ratio` at the last step, or 1 to the end.

    `step` counts from 0.
    """
    num_warmup = math.ceil(num_steps * warmup_ratio)
    if step < num_warmup:
        return (step + 1) / num_warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - num_warmup) / max(1, num_steps - 1 - num_warmup))
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return final_ratio + (1 - final_ratio) * left


def set_learning_rate(
    optimizer: torch.optim.Optimizer, peaks: Sequence[float], config: StageConfig, step: int
) -> float:
    """Give an optimizer the learning rates of a step, counted from 0.

    Args:
        optimizer: Of `make_optimizer`.
        peaks: Learning rate that each of its groups was made with.
        config: The stage.
        step: Steps done before it.

    Returns:
        The stage's own learning rate, which parts without one of theirs have.
    """
    factor = learning_rate_factor(
        step, config.num_steps, config.warmup_ratio, config.final_learning_rate_ratio, config.schedule
    )
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * factor
    return config.learning_rate * factor


def make_optimizer(objective: Objective, config: StageConfig) -> torch.optim.AdamW:
    """AdamW over what is trainable, with the peak learning rate of each part; only matrices decay."""
    own: dict[str, float] = {str(part): rate for part, rate in config.learning_rates.items()}
    rates = {
        id(parameter): own.get(part, config.learning_rate)
        for part, parameters in trained_parts(objective).items()
        for parameter in parameters
    }
    members: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in objective.parameters():
        if parameter.requires_grad:
            members.setdefault((rates[id(parameter)], parameter.dim() > 1), []).append(parameter)
    order = list(dict.fromkeys(rates.values()))
    groups = [
        {"params": members[rate, decays], "lr": rate, "weight_decay": config.weight_decay * decays}
        for rate in order
        for decays in (True, False)
        if (rate, decays) in members  # torch 2.6 cannot resume an empty group
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.adam_betas[0], config.adam_betas[1]), fused=True
    )
