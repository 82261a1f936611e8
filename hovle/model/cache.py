"""What HoVLE-HD knows of a cache beyond its keys and values."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache


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
    """Slots at the end without a picture in any row: of these a crop takes as many from either section."""

    def note(self, cache: Cache, holistic_layers: list, num_short: int, num_long: int) -> None:
        """Note what the cache holds after a pass that gave either section so many slots."""
        self.num_text = self.num_text + num_long if num_short == num_long else 0
        self.short_length += num_short
        self.long_length += num_long
        keys = holistic_layers[0].keys if holistic_layers else None
        is_still = keys is not None and keys.dim() == 4 and not cache.offloading
        self.keys = keys if is_still else None  # offloaded keys move by themselves, quantised ones are elsewhere

    def follow_crop(self, short_length: int, long_length: int) -> None:
        """Shorten what is known to the lengths found; ValueError where the crop went back into pictures."""
        removed = self.short_length - short_length
        if removed != self.long_length - long_length or not 0 <= removed <= self.num_text:
            raise ValueError(
                f"The cache was cropped from {self.short_length} to {short_length} tokens, but HoVLE-HD can take back "
                f"only the last {self.num_text}, which follow all pictures. Start with an empty cache."
            )
        self.short_length, self.long_length, self.num_text = short_length, long_length, self.num_text - removed
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[:, :long_length]

    def check_rows(self, keys: torch.Tensor) -> None:
        """Raise ValueError where the mask may describe other rows than the cache holds."""
        if self.attention_mask is None or self.keys is None:
            return
        is_same = keys.untyped_storage().data_ptr() == self.keys.untyped_storage().data_ptr()
        if not is_same or len(keys) != len(self.attention_mask):
            raise ValueError(
                "Rows of this cache were reordered, repeated or selected, but not by `generate`: HoVLE-HD cannot tell "
                "which of its padding belongs to which row. Start with an empty cache."
            )
