"""Run an exported decoder in llama.cpp: words as tokens, pictures as embeddings, `generate` as transformers has it."""

import collections
import ctypes
import itertools
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..model.configuration_hovle import HoVLEConfig
from .engine import EngineForConditionalGeneration, Known, check_exported
from .gguf import file_name
from .needs import need
from .stem import Stem
from .write_stem import STEM

MOST_POSITIONS = 8192
"""Positions that memory is taken for where the caller does not say; a model may know more."""

TOKENS_AT_ONCE = 512


class LlamaCppForConditionalGeneration(EngineForConditionalGeneration):
    """A decoder in llama.cpp with the stem in numpy, one prompt at a time; made by `load`."""

    engine = "llama.cpp"

    def __init__(self, config: HoVLEConfig, decoder: "Decoder", stem: Stem):
        super().__init__(config, decoder, stem.embed)
        self.stem = stem

    @classmethod
    def load(
        cls, folder: str | os.PathLike, quantization: str = "f16", num_positions: int | None = None
    ) -> "LlamaCppForConditionalGeneration":
        """Load what `hovle export --to gguf` wrote.

        Args:
            folder: Its folder.
            quantization: Which of its files, one of `gguf.QUANTIZATIONS`.
            num_positions: Tokens of prompt and answer to take memory for; at most what the model knows.

        Raises:
            ValueError: Without llama-cpp-python, and for a folder that lacks the files.
        """
        need("The engine llama.cpp", "hovle[llamacpp]", "llama_cpp")
        folder = Path(folder)
        path = folder / file_name(quantization)
        check_exported(folder, (path.name, STEM), cls.engine, "gguf")
        config = HoVLEConfig.from_pretrained(folder)
        text_config = config.text_config
        text_config.max_position_embeddings = min(num_positions or MOST_POSITIONS, text_config.max_position_embeddings)
        model = cls(config, Decoder(path, text_config.max_position_embeddings), Stem(folder / STEM))
        return model.with_settings_of(folder)


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
        self.forget()

    def forget(self) -> None:
        """Start with an empty cache."""
        self.known = Known(self.hidden_size)  # `all_logits` takes out of llama.cpp's cache what is not known

    def logits_after(self, ids: np.ndarray, is_image: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Logits of the token after a sequence, as `EngineDecoder` has it."""
        return self.all_logits(ids, is_image, features, self.known.count(ids, is_image, features))[-1]

    def all_logits(
        self, ids: np.ndarray, is_image: np.ndarray, features: np.ndarray, num_known: int = 0, every: bool = False
    ) -> np.ndarray:
        """Logits after tokens of a sequence that are computed anew, shape `(tokens, V)`.

        Args:
            ids: As in `EngineDecoder.logits_after`.
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
        self.known.keep(ids[:num_known], is_image[:num_known], features)
        logits, place = [], int(is_image[:num_known].sum())
        for start, end in _runs(is_image, num_known):
            count = end - start
            embeds = features[place : place + count] if is_image[start] else None
            place += count if is_image[start] else 0
            wanted = [every or index == len(ids) - 1 for index in range(start, end)]
            logits.append(self._decode(ids[start:end], embeds, start, wanted))
        self.known.keep(ids, is_image, features)
        return np.concatenate(logits)

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
