"""Weight files and JSON of a checkpoint folder, read with suspicion and written with little memory.

Only safetensors and JSON are read, only inside the folder, and nothing is unpickled. Tensors are mapped, not loaded,
and written one at a time. A new folder takes its name when it is complete.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ..errors import printable, printable_name
from .documents import POINTER, parse_json, refuse_pointer
from .model_folder import refuse_missing_folder

CONFIG, WEIGHTS, INDEX, LICENCE = "config.json", "model.safetensors", "model.safetensors.index.json", "LICENSE"
HOVLE_CONFIG = "hovle_config.json"
"""Config of a HoVLE in a folder whose `config.json` is for others: engines, or whoever reads the released layout."""

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", LICENCE)
"""What is downloaded of a model."""

MAX_FILE_BYTES = 5 * 10**9
"""No weight file we write is larger, unless a single tensor is."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Checkpoint:
    """Tensors of one folder. Files are mapped, not read: a tensor costs memory only once it is changed.

    Args:
        folder: Where the files lie.
        extra_file: Also offer what this file holds, if it is there; the index does not know it.

    Raises:
        ValueError: When the folder has no safetensors, a file lies outside it, two files hold the same tensor or one
            names it twice, or the index and the files disagree.
    """

    def __init__(self, folder: Path, extra_file: str | None = None):
        files, index = _weight_files(folder)
        self.has_extra = extra_file is not None and (folder / extra_file).exists()
        self.metadata: dict[str, str] = {}
        self._handles: dict[str, Any] = {}
        holder: dict[str, str] = {}
        for file in [*files, extra_file] if extra_file and self.has_extra else files:
            handle = _open(folder, file)
            self.metadata |= handle.metadata() or {}
            for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
                if name in holder:
                    files_shown = f"{printable_name(holder[name])} and {printable_name(file)}"
                    raise ValueError(f"{printable_name(name)} is a duplicate: both {files_shown} hold it.")
                holder[name], self._handles[name] = file, handle
        if index is not None:
            expected = {name: file for name, file in holder.items() if file != extra_file}
            wrong = sorted(name for name, _ in index.items() ^ expected.items())
            if wrong:
                raise ValueError(f"{INDEX} and the files disagree about {_examples(wrong)}.")

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._handles.keys()

    def dtype(self, name: str) -> torch.dtype:
        """Type of one tensor; ValueError unless it is a plain floating-point type."""
        dtype = self._handles[name].get_slice(name).get_dtype()
        if dtype not in DTYPES:
            raise ValueError(f"{printable_name(name)} has type {dtype}; weights are one of {', '.join(DTYPES)}.")
        return DTYPES[dtype]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._handles[name].get_slice(name).get_shape())

    def common_dtype(self) -> torch.dtype:
        """The type that holds the values of all tensors."""
        return reduce(torch.promote_types, map(self.dtype, self._handles))

    def tensor(self, name: str) -> torch.Tensor:
        """Map one tensor; ValueError when it holds NaN or infinity."""
        tensor = self._handles[name].get_tensor(name)
        check_finite(name, tensor)
        return tensor

    def claim(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise unless the tensors are exactly those expected, each of its shape (name -> shape)."""
        check_tensors({name: self.shape(name) for name in self.names}, expected)


def check_tensors(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise unless a checkpoint holds exactly the tensors expected; both are name -> shape."""
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing:
        raise ValueError(f"The checkpoint is missing {_examples(sorted(missing))}.")
    if unexpected:
        raise ValueError(f"The checkpoint holds unexpected tensors: {_examples(sorted(unexpected))}.")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{printable_name(name)} has shape {found[name]}, but {CONFIG} asks for {shape}.")


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise when a tensor holds NaN or infinity."""
    if not torch.stack(tensor.aminmax()).isfinite().all():
        raise ValueError(f"{printable_name(name)} holds non-finite values (NaN or infinity).")


def check_layers(names: Collection[str], prefix: str, count: int, field: str) -> None:
    """Raise unless a checkpoint's tensors are those of so many layers; for before a model of so many is built.

    Args:
        names: Of the checkpoint's tensors.
        prefix: What the names of a layer's tensors begin with, before its number.
        count: Layers that config.json asks for.
        field: Where it asks.
    """
    pattern = re.compile(re.escape(prefix) + "([0-9]{1,9})[.]")
    found = {int(match[1]) for match in map(pattern.match, names) if match}
    missing = next((index for index in range(count) if index not in found), None)
    beyond = min((index for index in found if index >= count), default=None)
    if missing is None and beyond is None:
        return
    problem = f"holds unexpected tensors: {prefix}{beyond}" if missing is None else f"is missing {prefix}{missing}"
    raise ValueError(
        f"{field} in {CONFIG} is {count}, but the tensors are those of {len(found)} layers: the checkpoint {problem}."
    )


def refuse_damaged_weights(folder: str | os.PathLike) -> None:
    """Raise ValueError, with its name, for a safetensors file that is damaged, or missing though the index names it.

    What is no folder is left alone. Headers are read, and their lengths compared with the files', no tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    files = {path.name for path in folder.glob("*.safetensors")}
    if (folder / INDEX).is_file():
        files |= set(_read_index(folder).values())
    for file in sorted(files):
        _open(folder, file)


def _open(folder: Path, file: str) -> Any:
    """Map a weight file; ValueError when it is missing, cut off, something else or names a tensor twice."""
    path, name = inside(folder, file), f"{printable_name(file)} in {folder}"
    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        if path.is_file():
            with path.open("rb") as opened:
                refuse_pointer(opened.read(len(POINTER)), name)
        message = printable(str(error), kept="")
        raise ValueError(f"{name} is missing or no safetensors file: {message}") from error
    _check_header(path, f"the header of {name}")
    return handle


def _check_header(path: Path, name: str) -> None:
    """Raise when the header of a safetensors file names a tensor twice: readers differ in which of them counts."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        parse_json(file.read(length), name, keys_once=True)


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files, and the index (tensor -> file) where there is one."""
    if (folder / INDEX).exists():
        index = _read_index(folder)
        files = sorted(set(index.values()))
        if (folder / WEIGHTS).exists() and WEIGHTS not in files:
            raise ValueError(f"{folder} holds both {WEIGHTS} and an {INDEX} without it; remove the stale one.")
        return files, index
    if (folder / WEIGHTS).exists():
        return [WEIGHTS], None
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickled:
        raise ValueError(
            f"{folder} holds pickled weights ({_examples(pickled)}), which can run code when opened. Save the model "
            "as safetensors where you trust it (`save_pretrained` does so) and convert that folder."
        )
    raise ValueError(f"{folder} holds neither {WEIGHTS} nor {INDEX}.")


def _read_index(folder: Path) -> dict[str, str]:
    index = read_json(folder, INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise ValueError(f"{INDEX} needs a weight_map from tensor names to file names.")
    return index


def inside(folder: Path, name: str) -> Path:
    """Path of a file of the folder; ValueError when its name or a link leads elsewhere.

    A folder of the Hub's cache consists of links into the `blobs` beside it, which belong to it.
    """
    path = (folder / name).resolve()
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    if name != Path(name).name or "\\" in name or not any(path.is_relative_to(root) for root in roots):
        raise ValueError(f"{name!r} lies outside {folder}; the conversion reads files of that folder only.")
    return path


def read_json(folder: Path, name: str) -> dict:
    """Read a JSON object; ValueError when it is none or says something twice."""
    try:
        content = parse_json(inside(folder, name).read_bytes(), f"{name} in {folder}", keys_once=True)
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {name}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} in {folder} must hold a JSON object.")
    return content


def local_folder(src: str | os.PathLike, patterns: Sequence[str] = MODEL_FILES, **options) -> Path:
    """The folder itself, or the download of a Hub id.

    Args:
        src: Folder or Hub id.
        patterns: Files to download.
        **options: Of `huggingface_hub.snapshot_download` (`revision`, `token`, ...).
    """
    if Path(src).is_dir():
        return Path(src)
    refuse_missing_folder(src)
    try:
        return Path(snapshot_download(str(src), allow_patterns=list(patterns), **options))
    except (OSError, ValueError) as error:  # the Hub's errors are OSErrors
        raise ValueError(f"{src} is no folder here and could not be had from the Hub: {error}") from error


def _examples(names: Sequence[str]) -> str:
    shown = ", ".join(map(printable_name, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


@dataclass(frozen=True)
class Output:
    """One tensor of the result, made when its file is written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(folder: Path, outputs: Sequence[Output]) -> None:
    """Write a model's weights as one file, or as several with an index, the way transformers reads them."""
    groups = list(_group_by_size(outputs))
    if len(groups) == 1:
        write_tensors(folder / WEIGHTS, outputs)
        return
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        write_tensors(folder / name, group)
        weight_map |= {output.name: name for output in group}
    total_size = sum(output.num_bytes for output in outputs)
    (folder / INDEX).write_bytes(dump_json({"metadata": {"total_size": total_size}, "weight_map": weight_map}))


def _group_by_size(outputs: Iterable[Output]) -> Iterator[list[Output]]:
    """Fill files in order, each up to `MAX_FILE_BYTES`; a larger tensor gets a file of its own."""
    group: list[Output] = []
    for output in outputs:
        if group and sum(member.num_bytes for member in group) + output.num_bytes > MAX_FILE_BYTES:
            yield group
            group = []
        group.append(output)
    yield group


def write_tensors(path: Path, outputs: Sequence[Output], metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file, tensor by tensor: `safetensors.torch.save_file` wants all of them in memory at once.

    Args:
        path: File to create.
        outputs: Its tensors. Wider types come first, so that each starts at a multiple of its size.
        metadata: Texts for the header, beside `format`.
    """
    outputs = sorted(outputs, key=lambda output: -output.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    end = 0
    for output in outputs:
        start, end = end, end + output.num_bytes
        header[output.name] = {
            "dtype": DTYPE_NAMES[output.dtype],
            "shape": output.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data must start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for output in outputs:
            tensor = output.load().reshape(output.shape)
            assert tensor.dtype == output.dtype, output.name
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)


def dump_json(content: dict) -> bytes:
    """Bytes of a JSON file with this content."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def copy_json(src: Path, dst: Path, name: str) -> None:
    """Copy a JSON file as it is, unless it points to code: such pointers stay behind."""
    content = read_json(src, name)
    if "auto_map" not in content:
        shutil.copyfile(inside(src, name), dst / name)
        return
    del content["auto_map"]
    if "tokenizer_class" in content:  # the class whose code stays behind; the fast tokenizer needs none
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    (dst / name).write_bytes(dump_json(content))
