"""InternLM2's own files (config `internlm2`, fused attention matrices, SentencePiece) as a Llama and a fast tokenizer.

transformers has no InternLM2; its checkpoints bring code that has to be trusted. None of it runs here: the config is
translated, tensors are renamed and taken apart, the tokenizer is built anew and compared with sentencepiece.
"""

import os
import pickle
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..errors import foreign_errors, printable_name
from ..files.checkpoint_files import (
    CONFIG,
    INDEX,
    MODEL_FILES,
    WEIGHTS,
    Checkpoint,
    check_finite,
    check_layers,
    check_tensors,
    inside,
    local_folder,
    read_json,
)
from .released_layout import decoder_fields, decoder_rows
from .sentencepiece_tokenizer import CHAT_TEMPLATES, END_OF_TURN, fast_tokenizer

PICKLED_WEIGHTS, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TOKENIZER_MODEL, FAST_TOKENIZER, TEMPLATE = "tokenizer.model", "tokenizer.json", "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"

DOCUMENTS = tuple(pattern for pattern in MODEL_FILES if not pattern.endswith(".safetensors"))
"""What is downloaded where weights are not asked for."""

LOCATION = ("cache_dir", "local_files_only", "revision", "token")
"""Options of `from_pretrained` that say where files are."""

HEAD, TABLE = "output.weight", "model.tok_embeddings.weight"


def load_config(name_or_path: str | os.PathLike, **kwargs) -> LlamaConfig:
    """Describe an InternLM2 checkpoint as a Llama.

    Args:
        name_or_path: Folder or Hub id.
        **kwargs: `revision`, `subfolder` and the like.

    Raises:
        ValueError: When a field is missing or says what Llama cannot do, naming it; for any other option.
    """
    if unknown := sorted(kwargs.keys() - {*LOCATION, "subfolder", "trust_remote_code"}):
        raise ValueError(f"{', '.join(unknown)}: a converted InternLM2 config takes no such option.")
    return _llama_config(_folder(name_or_path, [CONFIG], kwargs))


def load_model(name_or_path: str | os.PathLike, **kwargs) -> LlamaForCausalLM:
    """Load an InternLM2 checkpoint as a Llama; its weights are safetensors, or pickled ones read as plain tensors.

    Args:
        name_or_path: Folder or Hub id.
        **kwargs: As `from_pretrained` takes them (`dtype`, `attn_implementation`, `device_map`, `revision`, ...);
            without `dtype` the weights keep their own.

    Raises:
        ValueError: When config and tensors disagree, naming them, or a weight file holds more than tensors.
    """
    folder = _folder(name_or_path, MODEL_FILES, kwargs)
    if not _has_safetensors(folder):
        folder = _folder(name_or_path, [*DOCUMENTS, "*.bin"], kwargs)
    config = _llama_config(folder)
    tensors = _read_tensors(folder, config)
    options = {key: value for key, value in kwargs.items() if key not in (*LOCATION, "subfolder", "trust_remote_code")}
    dtype = next(iter(tensors.values())).dtype
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors, **{"dtype": dtype, **options})
    if (folder / GENERATION_CONFIG).exists():
        model.generation_config = GenerationConfig.from_dict(read_json(folder, GENERATION_CONFIG))
    return model


def load_tokenizer(name_or_path: str | os.PathLike, **kwargs) -> PreTrainedTokenizerFast:
    """Build the fast tokenizer of an InternLM2 checkpoint, with a chat template where it has chat tokens.

    Args:
        name_or_path: Folder or Hub id.
        **kwargs: `revision` and the like; other options are the tokenizer's own (`chat_template`, ...).

    Raises:
        ValueError: Without the packages that read SentencePiece models, or as `fast_tokenizer` raises.
        OSError: When there is no tokenizer.
    """
    folder = _folder(name_or_path, (*DOCUMENTS, FAST_TOKENIZER), kwargs)
    options = {key: value for key, value in kwargs.items() if key not in (*LOCATION, "subfolder", "trust_remote_code")}
    if (folder / TOKENIZER_MODEL).exists():
        tokenizer = _from_sentencepiece(folder)
    elif (folder / FAST_TOKENIZER).exists():
        with foreign_errors(f"{folder / FAST_TOKENIZER} cannot be loaded"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        raise OSError(f"{folder} has neither {TOKENIZER_MODEL} nor {FAST_TOKENIZER}.")
    if (folder / TEMPLATE).exists():
        tokenizer.chat_template = inside(folder, TEMPLATE).read_text(encoding="utf-8")
    if tokenizer.chat_template is None and END_OF_TURN in tokenizer.get_vocab():
        tokenizer.chat_template = CHAT_TEMPLATES["internlm2-chat"]
    for name, value in options.items():
        if not hasattr(tokenizer, name):
            raise ValueError(f"{name}: the converted tokenizer of {name_or_path} has no such option.")
        setattr(tokenizer, name, value)
    return tokenizer


def _folder(name_or_path: str | os.PathLike, patterns: Sequence[str], kwargs: dict) -> Path:
    options = {key: kwargs[key] for key in LOCATION if kwargs.get(key) is not None}
    subfolder = kwargs.get("subfolder") or ""
    wanted = [f"{subfolder}/{pattern}" for pattern in patterns] if subfolder else patterns
    return local_folder(name_or_path, wanted, **options) / subfolder


def _llama_config(folder: Path) -> LlamaConfig:
    content = read_json(folder, CONFIG)
    try:
        return LlamaConfig(**{key: value for key, value in decoder_fields(content).items() if key != "model_type"})
    except StrictDataclassError as error:
        raise ValueError(f"{CONFIG} in {folder} describes no valid model: {error.__cause__ or error}") from error


def _has_safetensors(folder: Path) -> bool:
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def _read_tensors(folder: Path, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Tensors under Llama's names; every one of the checkpoint is claimed."""
    source = Checkpoint(folder) if _has_safetensors(folder) else PickledCheckpoint(folder)
    check_layers(source.names, "model.layers.", config.num_hidden_layers, "num_hidden_layers")
    rows = decoder_rows(config)
    expected = {row.released: row.shape for row in rows}
    stores_tied_head = config.tie_word_embeddings and HEAD in source
    source.claim(expected | ({HEAD: expected[TABLE]} if stores_tied_head else {}))
    if stores_tied_head and not torch.equal(source.tensor(HEAD), source.tensor(TABLE)):
        raise ValueError(f"tie_word_embeddings is true in {CONFIG}, but {HEAD} differs from {TABLE}.")
    tensors = {}
    for row in rows:
        pieces = row.split(source.tensor(row.released))
        for piece, (name, shape) in zip(pieces, row.parts.items(), strict=True):
            tensors[name] = piece.reshape(shape)
    return tensors


class PickledCheckpoint:
    """Tensors of a folder's pickled weight files, opened as nothing but tensors.

    Args:
        folder: Where the files lie.

    Raises:
        ValueError: When there are none, when one holds anything but tensors, and when two hold the same one or differ
            from their index.
    """

    def __init__(self, folder: Path):
        self._tensors: dict[str, torch.Tensor] = {}
        files, index = [PICKLED_WEIGHTS], None
        if (folder / PICKLED_INDEX).exists():
            index = read_json(folder, PICKLED_INDEX).get("weight_map")
            if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
                raise ValueError(f"{PICKLED_INDEX} needs a weight_map from tensor names to file names.")
            files = sorted(set(index.values()))
        elif not (folder / PICKLED_WEIGHTS).exists():
            raise ValueError(
                f"{folder} holds no weights: none of {WEIGHTS}, {INDEX}, {PICKLED_WEIGHTS}, {PICKLED_INDEX}."
            )
        for file in files:
            content = _unpickle_tensors(inside(folder, file))
            if twice := sorted(content.keys() & self._tensors.keys()):
                raise ValueError(
                    f"{printable_name(twice[0])} is a duplicate: {file} holds it, and so does another file."
                )
            if index is not None and content.keys() != {name for name, holder in index.items() if holder == file}:
                raise ValueError(f"{PICKLED_INDEX} and {file} disagree about what it holds.")
            self._tensors |= content

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._tensors.keys()

    def claim(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise unless the tensors are exactly those expected, each of its shape (name -> shape)."""
        check_tensors({name: tuple(tensor.shape) for name, tensor in self._tensors.items()}, expected)

    def tensor(self, name: str) -> torch.Tensor:
        """Give one tensor; ValueError when it holds NaN or infinity."""
        check_finite(name, self._tensors[name])
        return self._tensors[name]


def _unpickle_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a weight file; what is no tensor, or would run code, is refused."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as plain tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise ValueError(f"{path} must hold tensors by name and nothing else.")
    return content


def _from_sentencepiece(folder: Path) -> PreTrainedTokenizerFast:
    try:
        with foreign_errors(f"{folder / TOKENIZER_MODEL} cannot be converted"):
            return fast_tokenizer(folder)
    except ImportError as error:
        raise ValueError(
            f"{folder}/{TOKENIZER_MODEL} needs sentencepiece and protobuf: pip install 'hovle[convert]' ({error})."
        ) from error
