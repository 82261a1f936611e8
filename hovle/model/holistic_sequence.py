"""What the holistic layers see of one forward pass: the language model's sequence, or HoVLE-HD's longer one.

A sequence is made for one pass, expanded before the holistic layers and shrunk after them. It holds no weights. The
axis legend is that of `modeling_hovle.py`.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache

from .cache import HolisticCacheState, holistic_part, make_room
from .checks import check_mask_of_hd, check_rows_of_hd, check_windows_of_hd, may_read_values
from .configuration_hovle import HoVLEConfig
from .image_tokens import merge_image_tokens, take_image_tokens
from .masks import Masks, causal_masks, positions_from_mask


@dataclass
class LanguageInputs:
    """One forward pass as the language model's sequence sees it."""

    embeds: torch.Tensor
    """Text embeddings with throwaway rows at placeholders, shape `(B, T, D)`."""
    image_features: torch.Tensor | None
    """Output of the stem, shape `(N, S, D)` or longer for HD."""
    image_mask: torch.Tensor | None
    """True at placeholders, shape `(B, T)`; None for embeddings without ids."""
    attention_mask: torch.Tensor | Masks | None
    """The caller's mask."""
    position_ids: torch.Tensor
    """Shape `(B, T)` or `(1, T)`."""
    causal_masks: Masks | None = None
    """What the language model's layers take, once somebody has asked for it."""

    def masks(self, config: HoVLEConfig, cache: Cache | None) -> Masks:
        """What the language model's layers take; to be asked for before layers extend the cache."""
        if self.causal_masks is None:
            self.causal_masks = causal_masks(config, self.embeds, self.attention_mask, self.position_ids, cache)
        return self.causal_masks

    def merged(self) -> torch.Tensor:
        """Embeddings of text and images, shape `(B, T, D)`; not for HD, whose images are longer."""
        if self.image_features is None or self.image_mask is None:
            return self.embeds
        return merge_image_tokens(self.embeds, self.image_features, self.image_mask)

    def images_of(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The image part of `(B, T, D)` as `(N, S, D)`; None without images, and not for HD."""
        if self.image_features is None or self.image_mask is None:
            return None
        return take_image_tokens(hidden_states, self.image_mask, *self.image_features.shape[:2])


@dataclass
class SectionInputs:
    """What enters the first layer of a section, holistic layers or language model."""

    embeds: torch.Tensor
    """Shape `(B, L, D)`."""
    causal_masks: Masks
    """What its layers take."""
    position_ids: torch.Tensor
    """Shape `(B, L)` or `(1, L)`."""


class HolisticSequence:
    """The language model's own sequence.

    Args:
        config: Of the model.
        projector: Makes one token of several patches.
    """

    def __init__(self, config: HoVLEConfig, projector: nn.Module | None):
        self.config = config
        self.projector = projector

    def expand(self, inputs: LanguageInputs, cache: Cache | None) -> SectionInputs:
        """Put the images in their places."""
        masks = inputs.masks(self.config, cache)
        if inputs.image_features is not None and self.config.image_attention == "bidirectional":
            masks = causal_masks(
                self.config, inputs.embeds, inputs.attention_mask, inputs.position_ids, cache, inputs.image_mask
            )
        return SectionInputs(inputs.merged(), masks, inputs.position_ids)

    def shrink(
        self, hidden_states: torch.Tensor, inputs: LanguageInputs, cache: Cache | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Turn what the holistic layers give into what the language model sees.

        Args:
            hidden_states: Output of the holistic layers, shape `(B, L, D)`.
            inputs: What was expanded.
            cache: Of earlier tokens and these.

        Returns:
            Its image part, shape `(N, S, D)`, None without images; the whole of it, shape `(B, T, D)`.
        """
        return inputs.images_of(hidden_states), self.normalize(hidden_states)

    def normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Divide what the language model sees by its norm, where the config wants it."""
        if not self.config.normalize_encoder_output:
            return hidden_states
        norm = hidden_states.norm(dim=-1, keepdim=True)
        return hidden_states / norm.masked_fill(norm == 0, 1)  # padding is often a row of zeros


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
        if len(image_mask) == 1 or not may_read_values():
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


class LongHolisticSequence(HolisticSequence):
    """The long sequence of HoVLE-HD, whose images are patches before the holistic layers and tokens after them."""

    layout: HolisticLayout | None = None
    """Where the patches are; None without images."""
    attention_mask: torch.Tensor | None = None
    """Padding of all that was seen, shape `(B, past + L)`."""

    def expand(self, inputs: LanguageInputs, cache: Cache | None) -> SectionInputs:
        """Put the patches in their places, and lengthen what describes the sequence."""
        embeds = inputs.embeds
        if inputs.image_features is not None and inputs.image_mask is not None:
            num_tiles, num_patches = inputs.image_features.shape[:2]
            num_slots = self.config.slots_per_placeholder
            self.layout = HolisticLayout.from_image_mask(
                inputs.image_mask, num_slots, num_tiles * num_patches // num_slots
            )
            embeds = merge_image_tokens(self.layout.spread(embeds), inputs.image_features, self.layout.image_mask)
            check_windows_of_hd(self.layout.is_token, cache, self.config)
        num_short, num_long = inputs.embeds.shape[1], embeds.shape[1]
        past = holistic_part(cache, self.config)
        make_room(past, num_long, num_long - num_short, getattr(self.config.text_config, "sliding_window", None))
        self.state = HolisticCacheState.of(cache, past)
        self.attention_mask = self._long_mask(embeds, inputs.attention_mask, past)
        position_ids = self._long_positions(num_long, inputs, past)
        images = None
        if self.layout is not None and self.config.image_attention == "bidirectional":
            images = self.layout.image_mask
        masks = causal_masks(self.config, embeds, self.attention_mask, position_ids, past, images)
        return SectionInputs(embeds, masks, position_ids)

    def shrink(
        self, hidden_states: torch.Tensor, inputs: LanguageInputs, cache: Cache | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Shuffle and project the patches, and put the tokens in the places the language model knows."""
        num_short, num_long = inputs.embeds.shape[1], hidden_states.shape[1]
        self.state.keep_beside(cache, self.config, self.attention_mask, num_short, num_long, inputs.image_mask)
        if self.layout is None or inputs.image_features is None or inputs.image_mask is None:
            return None, self.normalize(hidden_states)
        patches = take_image_tokens(hidden_states, self.layout.image_mask, *inputs.image_features.shape[:2])
        assert self.projector is not None
        images = self.projector(patches)
        merged = merge_image_tokens(self.layout.collect(hidden_states), images, inputs.image_mask)
        return images, self.normalize(merged)

    def _long_mask(
        self, embeds: torch.Tensor, attention_mask: torch.Tensor | Masks | None, past: Cache | None
    ) -> torch.Tensor | None:
        """Padding mask of the long sequence including what is cached, `(B, past + L)`; None when nothing is padded.

        A later step sees new tokens only, so the mask of the earlier ones is kept with the cache it describes.
        """
        check_mask_of_hd(attention_mask)
        batch_size, length = embeds.shape[:2]
        past_length = 0 if past is None else past.get_seq_length()
        past_mask = self.state.attention_mask
        if attention_mask is None and past_mask is None and (self.layout is None or batch_size == 1):
            return None
        if isinstance(attention_mask, torch.Tensor):
            num_new = length if self.layout is None else self.layout.last_slot.shape[1]
            new_mask = attention_mask[:, -num_new:].bool()
            new_mask = new_mask if self.layout is None else self.layout.spread(new_mask)
        else:
            new_mask = embeds.new_ones((batch_size, length), dtype=torch.bool)
        if self.layout is not None:
            new_mask = new_mask & self.layout.is_token
        if past_mask is None and past_length:
            past_mask = embeds.new_ones((batch_size, past_length), dtype=torch.bool)
        if past_mask is not None:
            new_mask = torch.cat([past_mask, new_mask], dim=1)
        # A mask made up later, from a static cache's length, would break a graph.
        if not may_read_values() or (past is not None and past.is_compileable):
            return new_mask
        return None if bool(new_mask.all()) else new_mask

    def _long_positions(self, length: int, inputs: LanguageInputs, past: Cache | None) -> torch.Tensor:
        """Position ids of the long sequence, `(B, L)`: counted per row, restarting where the short ones restart."""
        if self.attention_mask is not None:
            # A later step may have lost its mask, which `generate` drops where the prompts were not padded.
            if length > 1 and inputs.attention_mask is None:
                check_rows_of_hd(inputs.position_ids)
            return positions_from_mask(self.attention_mask)[:, -length:]
        past_length = 0 if past is None else past.get_seq_length()
        positions = (torch.arange(length, device=inputs.embeds.device) + past_length)[None]
        if length == 1 or past_length:
            return positions
        # Documents packed into one row start again at 0: subtract each document's first long slot.
        starts = inputs.position_ids == 0
        if self.layout is None:
            return positions - torch.where(starts, positions, 0).cummax(dim=1).values
        last_slot = self.layout.last_slot
        first_slot = torch.cat([torch.zeros_like(last_slot[:, :1]), last_slot[:, :-1] + 1], dim=1)
        return positions - self.layout.spread(torch.where(starts, first_slot, 0).cummax(dim=1).values)
