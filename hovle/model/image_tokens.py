"""Where images stand among words: placeholders and tiles of a batch of rows.

The axis legend is that of `modeling_hovle.py`.
"""

import torch
from torch import nn


def pixel_shuffle(patches: torch.Tensor, factor: int) -> torch.Tensor:
    """Join neighbouring patches into one token with more channels, in row-major order.

    Same order as `InternVLModel.pixel_shuffle` in transformers 5.23; a test holds us to it.

    Args:
        patches: Row-major patches of square tiles, shape `(N, H * H, D)`.
        factor: Patches joined along each side.

    Returns:
        Shape `(N, (H / factor) ** 2, D * factor ** 2)`.
    """
    num_tiles, num_patches, channels = patches.shape
    side = int(num_patches**0.5)
    small = side // factor
    blocks = patches.view(num_tiles, small, factor, small, factor, channels)
    blocks = blocks.permute(0, 1, 3, 2, 4, 5)  # (N, row, column, row in block, column in block, D)
    return blocks.reshape(num_tiles, small * small, channels * factor**2)


def merge_image_tokens(
    inputs_embeds: torch.Tensor, image_features: torch.Tensor, image_mask: torch.Tensor
) -> torch.Tensor:
    """Put each image token at the next placeholder of the prompts, in reading order.

    Args:
        inputs_embeds: Embeddings with throwaway rows at placeholders, shape `(B, T, D)`.
        image_features: All tiles of the batch in prompt order, shape `(N, S, D)`.
        image_mask: True at placeholders, shape `(B, T)`, bool.

    Returns:
        Shape `(B, T, D)`. The input is left untouched.
    """
    features = image_features.flatten(0, 1).to(inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(image_mask[..., None], features)


def take_image_tokens(
    hidden_states: torch.Tensor, image_mask: torch.Tensor, num_tiles: int, tokens_per_tile: int
) -> torch.Tensor:
    """Collect the outputs at placeholders, tile by tile in reading order.

    Args:
        hidden_states: Shape `(B, T, D)`.
        image_mask: True at placeholders, shape `(B, T)`, bool; `num_tiles * tokens_per_tile` of its entries.
        num_tiles: N.
        tokens_per_tile: S.

    Returns:
        Shape `(N, S, D)`.
    """
    flat = hidden_states.flatten(0, 1)
    # A sort instead of boolean indexing: its result has a size known in advance, which torch.compile needs.
    slots = torch.argsort(image_mask.flatten(), descending=True, stable=True)[: num_tiles * tokens_per_tile]
    return flat[slots].view(num_tiles, tokens_per_tile, flat.shape[-1])


def number_pictures(image_mask: torch.Tensor) -> torch.Tensor:
    """Number the pictures of each prompt, unbroken runs of placeholders, from 0; -1 elsewhere. Shapes `(B, T)`."""
    is_first = image_mask & ~nn.functional.pad(image_mask, (1, -1))
    return torch.where(image_mask, is_first.cumsum(dim=1) - 1, -1)
