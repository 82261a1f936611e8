"""What HoVLE does with a cache beyond handing it to the layers.

HoVLE-HD's holistic layers see a longer sequence than the language model. Their slots come last in a cache, after the
language model's, so whoever asks a cache for its length hears the language model's.
"""

import math
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from .checks import may_read_values, unless_compiling
from .configuration_hovle import HoVLEConfig


def given_cache(cache: Cache | None, kwargs: dict) -> Cache | None:
    """The cache under either name, `past_key_values` taken out of `kwargs`; ValueError when both are given.

    The paged cache of transformers' continuous batching is for the attention function alone and goes into `kwargs`.
    """
    other = kwargs.pop("past_key_values", None)
    if cache is not None and other is not None:
        raise ValueError("Give `cache` or, by its name before transformers 5.24, `past_key_values`, not both.")
    if isinstance(cache, PagedAttentionCache):
        kwargs["cache"], cache = cache, None
    return other if cache is None else cache


def holds_tokens(cache: Cache | None) -> bool:
    """Whether a cache holds tokens, or is a static one, which cannot be asked without waiting."""
    return cache is not None and (cache.is_compileable or bool(cache.get_seq_length()))


def remember_open_image(cache: Cache | None, image_mask: torch.Tensor | None) -> None:
    """Keep which rows end within an image; ValueError where one goes on that earlier tokens should have seen whole.

    Only for bidirectional images.

    Args:
        cache: Of earlier tokens.
        image_mask: True at placeholders, shape `(B, T)`; None without images.
    """
    if cache is None:
        return
    if image_mask is not None:
        _refuse_a_cut_image(cache, getattr(cache, "ended_in_picture", None), image_mask)
    cache.ended_in_picture = None if image_mask is None else image_mask[:, -1]  # type: ignore[attr-defined]


@unless_compiling
def _refuse_a_cut_image(cache: Cache, ended_in_image: torch.Tensor | None, image_mask: torch.Tensor) -> None:
    if ended_in_image is None:
        return
    if len(ended_in_image) != len(image_mask):  # others have changed the rows
        ended_in_image = ended_in_image.any()
    if cache.get_seq_length() and bool((ended_in_image & image_mask[:, 0]).any()):
        raise ValueError(
            "A pass ended within a picture that this one goes on with; bidirectional pictures must be given "
            "whole: all tiles of a picture in one pass."
        )


# ---------------------------------------------------------------------------------------------- HoVLE-HD


def put_language_layers_first(layers: torch.nn.ModuleList, num_embedding_layers: int) -> None:
    """Give the language model cache slots 0..M-1, the holistic layers those behind."""
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = (index - num_embedding_layers) % len(layers)  # type: ignore[union-attr]


def holistic_part(cache: Cache | None, config: HoVLEConfig) -> Cache | None:
    """View of a cache that speaks for HD's holistic layers; None while there is nothing to speak of."""
    layers = [] if cache is None else cache.layers[config.num_language_layers :]
    return Cache(layers=layers) if layers else None


def make_room(holistic: Cache | None, num_new: int, num_added: int, sliding_window: int | None) -> None:
    """Lengthen HD's holistic layers of a static cache by what the images add to the longest row.

    Whoever makes a static cache counts tokens as the language model sees them. The layers take their memory at
    their first update, which comes later, so they get exactly what these prompts need.

    Args:
        holistic: View of the holistic layers.
        num_new: L, slots this forward pass fills.
        num_added: L - T.
        sliding_window: Of the layers that have one.

    Raises:
        ValueError: When the layers have their memory already and it is too short for this pass; compiled code
            cannot look.
    """
    for layer in [] if holistic is None else holistic.layers:
        if not layer.is_compileable:
            return
        if layer.is_initialized and not layer.is_sliding:
            _check_room(layer, num_new)
        elif not layer.is_initialized:
            longest = math.inf if not layer.is_sliding or sliding_window is None else sliding_window
            layer.max_cache_len = int(min(layer.max_cache_len + num_added, longest))


@unless_compiling
def _check_room(layer, num_new: int) -> None:
    needed = int(layer.get_seq_length()) + num_new
    if needed > layer.max_cache_len:
        raise ValueError(
            f"The static cache has {layer.max_cache_len} slots in HoVLE-HD's holistic layers, but the "
            f"sequence with its pictures needs {needed}: make it for {needed - layer.max_cache_len} more "
            "tokens, or anew for these prompts."
        )


def reorder(cache: Cache, rows: torch.Tensor, config: HoVLEConfig) -> None:
    """Choose rows of a cache, for beam search, and of what HD keeps beside it.

    Args:
        cache: Changed in place.
        rows: Index of the row that comes to stand in each place, shape `(B,)`.
        config: Of the model.
    """
    cache.reorder_cache(rows)
    state = getattr(cache, "holistic_state", None)
    if state is not None and state.attention_mask is not None:
        state.attention_mask = state.attention_mask.index_select(0, rows.to(state.attention_mask.device))
    if state is not None and state.keys is not None:
        state.keys = cache.layers[config.num_language_layers].keys


@dataclass
class HolisticCacheState:
    """What HoVLE-HD keeps beside a cache: its padding mask, and by what it notices that others edited the cache."""

    attention_mask: torch.Tensor | None = None
    """Padding of the long sequence, shape `(B, L)`; None where nothing is padded."""
    keys: torch.Tensor | None = None
    """Keys of the first holistic layer: whoever reorders, repeats or selects rows gives them other memory."""
    short_length: int = 0
    """Slots of the language model's layers."""
    long_length: int = 0
    """Slots of the holistic layers."""
    num_text: int = 0
    """Slots at the end without an image in any row: of these a crop takes as many from either section."""

    @classmethod
    def of(cls, cache: Cache | None, holistic: Cache | None) -> "HolisticCacheState":
        """What was kept beside a cache, empty for a new one; ValueError where an edit of the cache made it wrong.

        Args:
            cache: Of earlier tokens.
            holistic: View of its holistic layers.
        """
        state = getattr(cache, "holistic_state", None)
        if cache is None or holistic is None or state is None:
            return cls()
        if may_read_values():
            if not holistic.get_seq_length():  # it was reset, or all of it was cropped
                return cls()
            state._follow(cache, holistic)
        return state

    def _follow(self, cache: Cache, holistic: Cache) -> None:
        """Follow what others did with the cache since the last pass."""
        if not holistic.is_compileable:
            # The language model's layers are empty when the holistic layers were run alone.
            self._follow_crop(cache.get_seq_length() or self.short_length, holistic.get_seq_length())
        self._check_rows(holistic.layers[0].keys)
        self.keys = None  # their memory is free as soon as longer ones take their place

    def _follow_crop(self, short_length: int, long_length: int) -> None:
        removed = self.short_length - short_length
        if removed != self.long_length - long_length or not 0 <= removed <= self.num_text:
            raise ValueError(
                f"The cache was cropped from {self.short_length} to {short_length} tokens, but HoVLE-HD can take back "
                f"only the last {self.num_text}, which follow all pictures. Start with an empty cache."
            )
        self.short_length, self.long_length, self.num_text = short_length, long_length, self.num_text - removed
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[:, :long_length]

    def _check_rows(self, keys: torch.Tensor) -> None:
        """Raise ValueError where the mask may describe other rows than the cache holds."""
        if self.attention_mask is None or self.keys is None:
            return
        is_same = keys.untyped_storage().data_ptr() == self.keys.untyped_storage().data_ptr()
        if not is_same or len(keys) != len(self.attention_mask):
            raise ValueError(
                "Rows of this cache were reordered, repeated or selected, but not by `generate`: HoVLE-HD cannot tell "
                "which of its padding belongs to which row. Start with an empty cache."
            )

    def keep_beside(
        self,
        cache: Cache | None,
        config: HoVLEConfig,
        attention_mask: torch.Tensor | None,
        num_short: int,
        num_long: int,
        image_mask: torch.Tensor | None,
    ) -> None:
        """Keep what a cache holds after a pass that gave either section so many slots.

        Args:
            cache: Nothing is kept without one.
            config: Of the model.
            attention_mask: Padding of the long sequence, shape `(B, past + L)`.
            num_short: T.
            num_long: L.
            image_mask: True at placeholders, shape `(B, T)`; None where no ids were given.
        """
        if cache is None:
            return
        self.attention_mask = attention_mask
        cache.holistic_state = self  # type: ignore[attr-defined]
        self._note(cache, config, num_short, num_long, image_mask)

    @unless_compiling
    def _note(
        self, cache: Cache, config: HoVLEConfig, num_short: int, num_long: int, image_mask: torch.Tensor | None
    ) -> None:
        if num_short == num_long:
            self.num_text += num_long
        elif image_mask is not None and len(image_mask) == 1:
            self.num_text = int(image_mask.flip(1).cumsum(1).eq(0).sum())
        else:  # padding stands elsewhere in the long rows, so it is not known how much text they end with
            self.num_text = 0
        self.short_length += num_short
        self.long_length += num_long
        holistic_layers = cache.layers[config.num_language_layers :]
        keys = holistic_layers[0].keys if holistic_layers else None
        is_still = keys is not None and keys.dim() == 4 and not cache.offloading
        self.keys = keys if is_still else None  # offloaded keys move by themselves, quantised ones are elsewhere
