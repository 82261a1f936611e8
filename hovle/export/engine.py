"""What other engines share: `generate` as transformers has it, over a decoder that keeps what it has read.

An engine's cache holds one sequence. A prompt that begins as the last one did (the next turn of a conversation) is
computed from where it differs.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import PreTrainedModel

from ..model.configuration_hovle import HoVLEConfig
from ..model.pixels import normalize_pixels


class EngineDecoder(Protocol):
    """A decoder that reads words as ids and pictures as embeddings."""

    def logits_after(self, ids: np.ndarray, is_image: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Logits of the token after a sequence, shape `(V,)`.

        Args:
            ids: The whole sequence, shape `(T,)`.
            is_image: Where embeddings take the place of ids, shape `(T,)`.
            features: Those embeddings, shape `(number of them, D)`.
        """

    def forget(self) -> None:
        """Start with an empty cache."""


def check_exported(folder: Path, needed: Iterable[str | Path], engine: str, target: str) -> None:
    """ValueError for a folder that lacks a file of what `hovle export MODEL DST --to TARGET` writes."""
    for name in needed:
        if not (folder / name).is_file():
            raise ValueError(
                f"{name} is not in {folder}: {engine} runs what `hovle export MODEL DST --to {target}` writes."
            )


class EngineForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A decoder in another engine, one prompt at a time; made by `load` of the engine's own class.

    Args:
        config: Of the HoVLE.
        decoder: Runs the sequence.
        embed_tiles: Makes image tokens of tiles, `(N, C, s, s)` to `(N, S, D)`.
    """

    config_class = HoVLEConfig
    main_input_name = "input_ids"
    input_modalities = ("text",)  # `generate` hands pixel values on as they are
    engine = "another engine"
    """What it is called in messages."""
    _is_stateful = True  # for transformers: no assisted generation, no beams over one cache

    def __init__(self, config: HoVLEConfig, decoder: EngineDecoder, embed_tiles: Callable[[np.ndarray], np.ndarray]):
        super().__init__(config)
        self.decoder, self.embed_tiles = decoder, embed_tiles

    def with_settings_of(self, folder: Path) -> Self:
        """The model, which generates as an exported folder says."""
        self.generation_config = GenerationConfig.from_pretrained(folder)
        self.generation_config.use_cache = False  # `forward` is given all tokens each time and keeps what it knows
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.float32

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Predict the token after a prompt.

        Args:
            input_ids: One whole prompt, shape `(1, T)`.
            pixel_values: Its tiles in order, normalised or bytes (uint8), shape `(N, C, s, s)`.
            attention_mask: Of ones, shape `(1, T)`: a single prompt has no padding.
            **kwargs: Ignored.

        Returns:
            `logits` of shape `(1, 1, V)`.
        """
        if len(input_ids) != 1:
            raise ValueError(f"{self.engine} runs one prompt at a time here, got {len(input_ids)}.")
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(f"A prompt for {self.engine} must not be padded; give one without padding.")
        ids = input_ids[0].numpy()
        is_image = ids == self.config.image_token_id
        features = np.empty((0, self.config.text_config.hidden_size), dtype=np.float32)
        if pixel_values is not None and len(pixel_values):
            features = self._features(pixel_values)
        if is_image.sum() != len(features):
            raise ValueError(
                f"The prompt holds {is_image.sum()} image tokens but its tiles make {len(features)}. Build both with "
                "the same HoVLEProcessor."
            )
        logits = self.decoder.logits_after(ids, is_image, features)
        return CausalLMOutput(logits=torch.from_numpy(logits)[None, None])

    def forget(self) -> None:
        """Read the next prompt from its beginning, whatever it shares with the last one."""
        self.decoder.forget()

    def _features(self, pixel_values: torch.Tensor) -> np.ndarray:
        """What the stem makes of tiles, kept for the steps in which it is asked for again."""
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize_pixels(pixel_values, self.config.image_mean, self.config.image_std)
        pixels = pixel_values.float().numpy()
        kept = getattr(self, "_kept", None)
        if kept is None or kept[0].shape != pixels.shape or not np.array_equal(kept[0], pixels):
            embedded = self.embed_tiles(pixels)
            self._kept = kept = (pixels, embedded.reshape(-1, embedded.shape[-1]))
        return kept[1]

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """All tokens so far, and the tiles of the prompt."""
        return {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": kwargs.get("attention_mask")}


class Known:
    """The sequence that an engine's cache holds.

    Args:
        hidden_size: Of embeddings.
    """

    def __init__(self, hidden_size: int):
        self.ids = np.empty(0, dtype=np.int64)
        self.is_image = np.empty(0, dtype=bool)
        self.features = np.empty((0, hidden_size), dtype=np.float32)

    def keep(self, ids: np.ndarray, is_image: np.ndarray, features: np.ndarray) -> None:
        """Take note that the cache holds a sequence now; arguments as in `EngineDecoder.logits_after`."""
        self.ids, self.is_image, self.features = ids.copy(), is_image.copy(), features

    def count(self, ids: np.ndarray, is_image: np.ndarray, features: np.ndarray) -> int:
        """Tokens at the beginning of a sequence that the cache holds, all but the last one at most."""
        most = min(len(ids) - 1, len(self.ids))
        is_same = (ids[:most] == self.ids[:most]) & (is_image[:most] == self.is_image[:most])
        places = np.flatnonzero(is_image[:most] & self.is_image[:most])
        count = min(len(places), len(features), len(self.features))
        if count:
            is_same[places[:count]] &= (features[:count] == self.features[:count]).all(axis=1)
        is_same[places[count:]] = False
        return most if is_same.all() else int(is_same.argmin())
