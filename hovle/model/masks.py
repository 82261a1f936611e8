"""Who may look at whom: the masks of a forward pass, in the form the attention implementation takes.

The axis legend is that of `modeling_hovle.py`.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache

from .backbones import CACHE, MASK_FUNCTIONS, attention_types
from .cache import holds_tokens
from .checks import check_bidirectional_attention, check_own_mask
from .configuration_hovle import HoVLEConfig
from .image_tokens import number_pictures

Masks = dict[str, torch.Tensor | None]
"""One mask for each attention pattern among the layers; None where causal attention needs none."""


def causal_masks(
    config: HoVLEConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | Masks | None,
    position_ids: torch.Tensor,
    cache: Cache | None,
    image_mask: torch.Tensor | None = None,
) -> Masks:
    """Build the masks of a sequence; those that `generate` has prepared are kept.

    Args:
        config: Of the model.
        inputs_embeds: Shape `(B, T, D)`; of these only shape, format and device count.
        attention_mask: Padding, shape `(B, past + T)`; a caller's own, bool, shape `(B, 1, T, past + T)`; or masks.
        position_ids: Shape `(B, T)` or `(1, T)`; where they restart without mask and cache, a document begins.
        cache: Of earlier tokens.
        image_mask: True at image tokens, shape `(B, T)`; given where those of one image see each other in both
            directions.
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    patterns = sorted(set(attention_types(config.text_config)))
    images = None
    if image_mask is not None:
        check_bidirectional_attention(config)
        past_length = 0 if cache is None else cache.get_seq_length()
        images = nn.functional.pad(number_pictures(image_mask), (past_length, 0), value=-1)
    if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.dtype == torch.bool:
        if images is not None:
            queries = images[:, -inputs_embeds.shape[1] :, None]
            attention_mask = attention_mask | ((queries == images[:, None]) & (queries >= 0))[:, None]
        return dict.fromkeys(patterns, own_mask(config, attention_mask, inputs_embeds.dtype))
    # An empty dynamic cache says nothing, but its mere presence switches off the detection of packed documents.
    known = cache if holds_tokens(cache) else None
    return {
        pattern: MASK_FUNCTIONS[pattern](
            config=config.text_config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            block_sequence_ids=images,
            **{CACHE: known},
        )
        for pattern in patterns
    }


def own_mask(config: HoVLEConfig, attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Put a caller's mask, `(B, 1, T, past + T)`, True where a token may look, into the form attention takes."""
    check_own_mask(config)
    if "sdpa" in config.text_config._attn_implementation:
        return attention_mask
    blank = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    return blank.masked_fill(~attention_mask, torch.finfo(dtype).min)


def flash_arguments(
    config: HoVLEConfig, hidden_states: torch.Tensor, masks: Masks, position_ids: torch.Tensor, cache: Cache | None
) -> dict:
    """Where documents begin, for flash attention, which knows no mask between them; empty for any other.

    transformers finds them by itself in a single row only, and again in every layer.

    Args:
        config: Of the model.
        hidden_states: Shape `(B, T, D)`.
        masks: What `causal_masks` made.
        position_ids: Shape `(B, T)` or `(1, T)`.
        cache: Of earlier tokens.
    """
    batch_size, length = hidden_states.shape[:2]
    if "flash" not in config.text_config._attn_implementation or length == 1:
        return {}
    if any(mask is not None for mask in masks.values()) or holds_tokens(cache):
        return {}
    boundaries = document_boundaries(position_ids.expand(batch_size, length))
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": length,  # a bound that is the same for all batches: the true one would be waited for
        "max_length_k": length,
    }


def document_boundaries(position_ids: torch.Tensor) -> torch.Tensor:
    """Where documents begin in rows laid end to end, and where the last one ends; each row begins one.

    Args:
        position_ids: Shape `(B, T)`; wherever they do not go on by 1 a document begins.

    Returns:
        Shape `(documents + 1,)`, int32, from 0 to B * T.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    starts = begins.flatten().nonzero().flatten()
    return nn.functional.pad(starts, (0, 1), value=position_ids.numel()).int()


def positions_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Count the real tokens of each row from 0; padding gets position 0. Shapes `(B, T)`."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def count_positions(
    inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | Masks | None, cache: Cache | None
) -> torch.Tensor:
    """Position ids of new tokens, `(B, T)` or `(1, T)`: the real tokens of a row, those that the cache holds first."""
    length = inputs_embeds.shape[1]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        return positions_from_mask(attention_mask)[:, -length:]
    past_length = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(length, device=inputs_embeds.device) + past_length)[None]
