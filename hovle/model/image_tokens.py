"""Where pictures stand among words: placeholders, tiles, positions and documents of a batch of rows.

The axis legend is that of `modeling_hovle.py`.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache


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


def check_image_tokens(image_mask: torch.Tensor, num_tiles: int, tokens_per_tile: int) -> None:
    """Raise unless the prompts hold exactly the placeholders that the tiles fill.

    Args:
        image_mask: True at placeholders, shape `(B, T)`, bool.
        num_tiles: Tiles in `pixel_values`.
        tokens_per_tile: Placeholders one tile fills.
    """
    if torch.compiler.is_compiling():  # reading a count back would break the graph; the collator has checked it
        return
    num_placeholders = int(image_mask.sum())
    if num_placeholders != num_tiles * tokens_per_tile:
        raise ValueError(
            f"The prompts hold {num_placeholders} image tokens but the {num_tiles} tiles fill "
            f"{num_tiles * tokens_per_tile} ({tokens_per_tile} each). Build both with the same HoVLEProcessor."
        )


def number_pictures(image_mask: torch.Tensor) -> torch.Tensor:
    """Number the pictures of each prompt, unbroken runs of placeholders, from 0; -1 elsewhere. Shapes `(B, T)`."""
    is_first = image_mask & ~nn.functional.pad(image_mask, (1, -1))
    return torch.where(image_mask, is_first.cumsum(dim=1) - 1, -1)


def check_whole_tiles(image_mask: torch.Tensor, tokens_per_tile: int) -> None:
    """Raise unless each unbroken run of placeholders is filled by whole tiles: a tile belongs to one prompt.

    Args:
        image_mask: True at placeholders, shape `(B, T)`, bool.
        tokens_per_tile: Placeholders one tile fills.
    """
    if torch.compiler.is_compiling():
        return
    is_last = image_mask & ~nn.functional.pad(image_mask, (-1, 1))
    counts = image_mask.flatten().cumsum(0).view_as(image_mask)
    rows = (is_last & (counts % tokens_per_tile != 0)).any(dim=1).nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"Row {rows[0]} of the prompts holds image tokens that are no whole number of tiles ({tokens_per_tile} "
            "tokens each), so a tile would be torn apart. Build prompts with HoVLEProcessor."
        )


@dataclass
class HolisticLayout:
    """How the short sequence of the language model spreads into the long one of HoVLE-HD's holistic layers.

    A text token takes one slot, a placeholder `shuffle_factor ** 2`. Rows are aligned at their last token, so the
    batch gains padding on the left only.
    """

    source: torch.Tensor
    """Short position each long slot belongs to, shape `(B, L)`; 0 where `is_token` is False."""

    is_token: torch.Tensor
    """False at the padding this layout added, shape `(B, L)`."""

    last_slot: torch.Tensor
    """Last long slot of each short position, shape `(B, T)`."""

    image_mask: torch.Tensor
    """True at long slots of image patches, shape `(B, L)`."""

    @classmethod
    def from_image_mask(
        cls, image_mask: torch.Tensor, slots_per_placeholder: int, num_placeholders: int
    ) -> "HolisticLayout":
        """Build the layout of a batch from its placeholders, shape `(B, T)`, bool, and their count.

        torch.compile needs a length known in advance: there, several rows are padded as if one held all pictures.
        """
        lengths = torch.where(image_mask, slots_per_placeholder, 1)
        ends = lengths.cumsum(dim=1)  # (B, T)
        if len(image_mask) == 1 or torch.compiler.is_compiling():
            short_length = image_mask.shape[1]
            long_length = short_length + min(num_placeholders, short_length) * (slots_per_placeholder - 1)
        else:
            long_length = int(ends[:, -1].max())
        ends = ends + (long_length - ends[:, -1:])
        slots = torch.arange(long_length, device=image_mask.device).expand(len(image_mask), -1).contiguous()
        source = torch.searchsorted(ends, slots, right=True)
        is_token = slots >= (ends[:, :1] - lengths[:, :1])
        return cls(source, is_token, ends - 1, image_mask.gather(1, source) & is_token)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Copy per-token values of shape `(B, T, ...)` to every long slot, giving `(B, L, ...)`."""
        index = self.source.view(*self.source.shape, *[1] * (values.dim() - 2))
        return values.gather(1, index.expand(*self.source.shape, *values.shape[2:]))

    def collect(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Take the last long slot of each token: `(B, L, D)` to `(B, T, D)`. Rows at placeholders are throwaway."""
        return hidden_states.gather(1, self.last_slot[..., None].expand(-1, -1, hidden_states.shape[-1]))


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


def check_padding_mask(
    attention_mask: torch.Tensor | dict | None, batch_size: int, num_new: int, cache: Cache | None
) -> None:
    """Raise ValueError unless a 2-D mask covers the rows of a batch with all tokens, cached and new.

    Args:
        attention_mask: The caller's; others than 2-D ones pass.
        batch_size: B.
        num_new: T.
        cache: Of earlier tokens.
    """
    if torch.compiler.is_compiling() or not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return
    if cache is not None and cache.is_compileable and num_new == 1:
        return  # a static cache tells its length as a tensor, which each step would wait for
    num_cached = 0 if cache is None else int(cache.get_seq_length())
    if attention_mask.shape != (batch_size, num_cached + num_new):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but {batch_size} rows of {num_cached} cached "
            f"and {num_new} new tokens need {(batch_size, num_cached + num_new)}: it covers what the cache holds too."
        )


def positions_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Count the real tokens of each row from 0; padding gets position 0. Shapes `(B, T)`."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
