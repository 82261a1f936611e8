"""Norms of gradients by the part of the model they belong to, and their limit."""

import torch
from torch import nn

from ..model.parameters import parameter_groups
from ..objectives.base import Objective
from ..parallel import full_tensor


def trained_parts(objective: Objective) -> dict[str, list[nn.Parameter]]:
    """What learns, by the parts recipes name; adapters are `lora`, all else goes by its module (`projections`)."""
    groups = {
        id(parameter): name for name, members in parameter_groups(objective.model).items() for parameter in members
    }
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            part = "lora" if ".lora_" in name else groups.get(id(parameter), name.split(".")[0])
            parts.setdefault(part, []).append(parameter)
    return parts


def clip_gradients(objective: Objective, max_norm: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Scale all gradients so that their norm is at most `max_norm` (all ranks).

    Returns:
        Norms from before: of all gradients, and of those of each part that learns.
    """
    parts = trained_parts(objective)
    norms = {part: full_tensor(_gradient_norm(parameters)) for part, parameters in parts.items()}
    total = torch.stack(list(norms.values())).norm()
    parameters = [parameter for members in parts.values() for parameter in members]
    nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return total, norms


def _gradient_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    gradients = [item.grad for item in parameters if item.grad is not None]
    return nn.utils.get_total_norm(gradients).to(parameters[0].device)
