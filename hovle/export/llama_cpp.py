"""Run an exported decoder in llama.cpp: words as tokens, pictures as embeddings, `generate` as transformers has it.

llama.cpp's cache holds one sequence. A prompt that begins as the last one did (the next turn of a conversation) is
computed from where it differs.
"""

import collections
import ctypes
import itertools
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import PreTrainedModel

from ..model.configuration_hovle import HoVLEConfig
from ..model.pixels import normalize_pixels
from .gguf import QUANTIZATIONS, file_name
from .needs import need
from .stem import Stem
from .write_stem import STEM

MOST_POSITIONS = 8192
"""Positions that memory is taken for where the caller does not say; a model may know more."""

TOKENS_AT_ONCE = 512


class LlamaCppForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A decoder in llama.cpp with the stem in numpy, one prompt at a time; made by `load`."""

    config_class = HoVLEConfig
    main_input_name = "input_ids"
    input_modalities = ("text",)  # `generate` hands pixel values on as they are
    _is_stateful = True  # for transformers: no assisted generation, no beams over one cache

    def __init__(self, config: HoVLEConfig, decoder: "Decoder", stem: Stem):
        super().__init__(config)
        self.decoder, self.stem = decoder, stem

    @classmethod
    def load(
        cls, folder: str | os.PathLike, quantization: str = "f16", num_positions: int | None = None
    ) -> "LlamaCppForConditionalGeneration":
        """Load what `hovle export --to gguf` wrote.

        Args:
            folder: Its folder.
            quantization: Which of its files, one of `QUANTIZATIONS`.
            num_positions: Tokens of prompt and answer to take memory for; at most what the model knows.

        Raises:
            ValueError: Without llama-cpp-python, and for a folder that lacks the files.
        """
        need("The engine llama.cpp", "hovle[llamacpp]", "llama_cpp")
        path = Path(folder) / file_name(quantization)
        for needed in (path, Path(folder) / STEM):
            if not needed.is_file():
                raise ValueError(
                    f"{needed.name} is not in {folder}: llama.cpp runs what `hovle export MODEL DST --to gguf` "
                    f"writes ({', '.join(QUANTIZATIONS)})."
                )
        config = HoVLEConfig.from_pretrained(folder)
        text_config = config.text_config
        text_config.max_position_embeddings = min(num_positions or MOST_POSITIONS, text_config.max_position_embeddings)
        model = cls(config, Decoder(path, text_config.max_position_embeddings), Stem(Path(folder) / STEM))
        model.generation_config = GenerationConfig.from_pretrained(folder)
        model.generation_config.use_cache = False  # `forward` is given all tokens each time and keeps what it knows
        return model

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
            raise ValueError(f"llama.cpp runs one prompt at a time here, got {len(input_ids)}.")
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("A prompt for llama.cpp must not be padded; give one without padding.")
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

    def _features(self, pixel_values: torch.Tensor) -> np.ndarray:
        """What the stem makes of tiles, kept for the steps in which it is asked for again."""
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize_pixels(pixel_values, self.config.image_mean, self.config.image_std)
        pixels = pixel_values.float().numpy()
        kept = getattr(self, "_kept", None)
        if kept is None or kept[0].shape != pixels.shape or not np.array_equal(kept[0], pixels):
            embedded = self.stem.embed(pixels)
            self._kept = kept = (pixels, embedded.reshape(-1, embedded.shape[-1]))
        return kept[1]

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """All tokens so far, and the tiles of the prompt."""
        return {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": kwargs.get("attention_mask")}


class Decoder:
    """A GGUF file in llama.cpp, and what its cache holds.

    Args:
        path: The file.
        num_positions: Tokens to take memory for.
        num_threads: By default as many as torch uses.

    Raises:
        ValueError: When llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, num_positions: int, num_threads: int | None = None):
        import llama_cpp

        self.library = llama_cpp
        _keep_errors(llama_cpp)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {path}: {' '.join(_ERRORS) or 'it does not say why'}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = num_positions
        params.n_batch = params.n_ubatch = TOKENS_AT_ONCE
        params.n_threads = params.n_threads_batch = num_threads or torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.close = weakref.finalize(self, _free, llama_cpp, self.context, self.model)
        """Gives the memory back; so does the end of the object."""
        if not self.context:
            raise ValueError(f"llama.cpp has no memory for {num_positions} positions of {path}: take fewer.")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.hidden_size = llama_cpp.llama_model_n_embd(self.model)
        self.num_positions = num_positions
        self.ids = np.empty(0, dtype=np.int64)
        self.is_image = np.empty(0, dtype=bool)
        self.features = np.empty((0, self.hidden_size), dtype=np.float32)

    def logits_after(self, ids: np.ndarray, is_image: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Logits of the token after a sequence, shape `(V,)`.

        Args:
            ids: The whole sequence, shape `(T,)`.
            is_image: Where embeddings take the place of ids, shape `(T,)`.
            features: Those embeddings, shape `(number of them, D)`.
        """
        return self.all_logits(ids, is_image, features, self._num_known(ids, is_image, features))[-1]

    def all_logits(
        self, ids: np.ndarray, is_image: np.ndarray, features: np.ndarray, num_known: int = 0, every: bool = False
    ) -> np.ndarray:
        """Logits after tokens of a sequence that are computed anew, shape `(tokens, V)`.

        Args:
            ids: As in `logits_after`.
            is_image: As there.
            features: As there.
            num_known: Tokens at the beginning that the cache holds and that are not computed again.
            every: After each of them, not after the last one only.
        """
        if len(ids) > self.num_positions:
            raise ValueError(
                f"{len(ids)} tokens are more than the {self.num_positions} positions memory was taken for."
            )
        library = self.library
        memory = library.llama_get_memory(self.context)
        library.llama_memory_seq_rm(memory, 0, num_known, -1)
        self.ids, self.is_image, self.features = ids[:num_known], is_image[:num_known], features
        logits, place = [], int(is_image[:num_known].sum())
        for start, end in _runs(is_image, num_known):
            count = end - start
            embeds = features[place : place + count] if is_image[start] else None
            place += count if is_image[start] else 0
            wanted = [every or index == len(ids) - 1 for index in range(start, end)]
            logits.append(self._decode(ids[start:end], embeds, start, wanted))
        self.ids, self.is_image = ids.copy(), is_image.copy()
        return np.concatenate(logits)

    def _num_known(self, ids: np.ndarray, is_image: np.ndarray, features: np.ndarray) -> int:
        """Tokens at the beginning of a sequence that the cache holds, all but the last one at most."""
        most = min(len(ids) - 1, len(self.ids))
        is_same = (ids[:most] == self.ids[:most]) & (is_image[:most] == self.is_image[:most])
        places = np.flatnonzero(is_image[:most] & self.is_image[:most])
        count = min(len(places), len(features), len(self.features))
        if count:
            is_same[places[:count]] &= (features[:count] == self.features[:count]).all(axis=1)
        is_same[places[count:]] = False
        return most if is_same.all() else int(is_same.argmin())

    def _decode(self, ids: np.ndarray, embeds: np.ndarray | None, start: int, wanted: list[bool]) -> np.ndarray:
        """Run tokens, or embeddings in their place, through the decoder; logits of those that are wanted."""
        library, count = self.library, len(ids)
        batch = library.llama_batch_init(count, 0 if embeds is None else self.hidden_size, 1)
        try:
            batch.n_tokens = count
            target = batch.token if embeds is None else batch.embd
            values = (
                np.ascontiguousarray(ids, np.int32) if embeds is None else np.ascontiguousarray(embeds, np.float32)
            )
            ctypes.memmove(target, values.ctypes.data, values.nbytes)  # by a name, as the address keeps no array alive
            for index in range(count):
                batch.pos[index] = start + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = wanted[index]
            if code := library.llama_decode(self.context, batch):
                raise RuntimeError(
                    f"llama.cpp could not decode tokens {start} to {start + count} (code {code}): {' '.join(_ERRORS)}"
                )
        finally:
            library.llama_batch_free(batch)
        rows = [
            np.ctypeslib.as_array(library.llama_get_logits_ith(self.context, index), shape=(self.vocab_size,)).copy()
            for index in range(count)
            if wanted[index]
        ]
        return np.stack(rows) if rows else np.empty((0, self.vocab_size), dtype=np.float32)


def _free(library: Any, context: Any, model: Any) -> None:
    if context:
        library.llama_free(context)
    library.llama_model_free(model)


def _runs(is_image: np.ndarray, start: int) -> list[tuple[int, int]]:
    """Begin and end of stretches of tokens of one kind, none longer than `TOKENS_AT_ONCE`."""
    cuts = {start, len(is_image), *(np.flatnonzero(np.diff(is_image)) + 1).tolist()}
    borders = sorted(cut for cut in cuts if cut >= start)
    return [
        (begin, min(begin + TOKENS_AT_ONCE, after))
        for first, after in itertools.pairwise(borders)
        for begin in range(first, after, TOKENS_AT_ONCE)
    ]


def _keep_errors(library: Any) -> None:
    """Let llama.cpp tell nothing on standard error; what raises tells its last errors."""
    if not _KEEPERS:  # it must outlive every call of the library
        _KEEPERS.append(library.llama_log_callback(_keep))
    library.llama_log_set(_KEEPERS[0], None)


def _keep(level: int, text: bytes, _user_data: Any) -> None:
    if level == ERROR:
        _ERRORS.append(text.decode(errors="replace").strip())


ERROR = 4
"""Level of llama.cpp's log lines that tell of an error."""

_KEEPERS: list[Any] = []
_ERRORS: collections.deque[str] = collections.deque(maxlen=3)
