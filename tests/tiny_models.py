"""Sizes of the smallest models, and weights that show when a part of one is wrong."""

import torch
from torch import nn

IMAGE = 60
"""Id of the placeholder."""

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def shake(model: nn.Module) -> nn.Module:
    """Move every weight, so that a part which is skipped or swapped shows in the logits."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = 10 if parameter.dim() == 4 else 1  # a convolution sums so many pixels that it needs less
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15 / fan_in)
    return model
