"""Which parameters a stage trains, and in which number format each is stored."""

import torch
from torch import nn

from ...machine.memory import return_freed_memory
from ...model.backbones import final_norm
from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ..config import StageConfig


def parameter_groups(model: HoVLEForConditionalGeneration) -> dict[str, list[nn.Parameter]]:
    """Parameters by the names recipes use; a tied table belongs to the language model, whose head it is."""
    base = model.model
    stem = list(base.patch_embedding.parameters())
    if base.projector is not None:
        stem += list(base.projector.parameters())
    table = model.get_input_embeddings().weight
    language_model = [*base.language_layers.parameters(), *final_norm(base.language_model).parameters()]
    return {
        "stem": stem,
        "holistic_layers": list(base.embedding_layers.parameters()),
        "text_embeddings": [] if model.config.tie_word_embeddings else [table],
        "language_model": [*language_model, *model.lm_head.parameters()],
    }


def select_trainable(model: HoVLEForConditionalGeneration, config: StageConfig) -> None:
    """Freeze everything, then open the groups the stage trains."""
    model.requires_grad_(False)
    groups = parameter_groups(model)
    for name in config.trainable:
        if not groups[name]:
            raise ValueError(
                f"trainable names {name}, but this model has none of its own: its text table is tied to the head and "
                "stays the language model's. Use model.untie_text_embeddings=true to train a separate one."
            )
        for parameter in groups[name]:
            parameter.requires_grad_(True)


@torch.no_grad()
def store_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep trainable weights in float32; store frozen ones in `dtype` where that rounds nothing."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        elif torch.equal(parameter.data.to(dtype).to(parameter.dtype), parameter.data):
            parameter.data = parameter.data.to(dtype)
    return_freed_memory()
