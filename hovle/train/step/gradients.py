"""Gradients by the part of the model they belong to."""

import torch
from torch import nn

from ..model.parameters import parameter_groups
from ..objectives.base import Objective


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


def gradient_norms(objective: Objective) -> dict[str, torch.Tensor]:
    """Norm of the gradient of each part that learns."""
    norms = {}
    for part, parameters in trained_parts(objective).items():
        gradients = [item.grad for item in parameters if item.grad is not None]
        norms[part] = nn.utils.get_total_norm(gradients).to(parameters[0].device)
    return norms
