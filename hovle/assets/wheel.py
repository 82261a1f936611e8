"""Wheels of the Python package index: brought by pip, compared with their hash, taken apart and never installed."""

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from tqdm import tqdm

from ..requirements import installed_version
from .cache import cache_folder, make_folder, megabytes
from .manifest import Asset, Member, WheelSource

logger = logging.getLogger(__name__)


def place(asset: Asset) -> tuple[Path, dict[str, Any]]:
    """Say where the unpacked wheel belongs and what its marker says."""
    source = asset.pypi
    members = [f"{member.pattern} -> {member.to}" for member in source.members]
    identity = {"name": asset.name, "version": source.version, "sha256": source.sha256, "members": members}
    return cache_folder() / f"{asset.name}-{source.version}", identity


def fetch(asset: Asset, wheels: Path | None = None) -> Path:
    """Unpack what the manifest names of an asset's wheel.

    Args:
        asset: Entry of the manifest.
        wheels: Folder to take the wheel from instead of the network; by default that of `HOVLE_WHEELS`, if set.
    """
    source = asset.pypi
    wheels = wheels or _wheels_from_environment()

    def fill(folder: Path) -> dict[str, Any]:
        path = _find_wheel(asset, wheels) if wheels else _download_wheel(asset)
        with _open_verified(path, source, is_ours=wheels is None) as file:
            _unpack(file, source, folder)
        if wheels is None:
            path.unlink()  # unpacked, and pip can bring it again
        return {"licence": asset.licence, "url": source.url}

    return make_folder(*place(asset), fill, source.size + source.unpacked_size)


def _wheels_from_environment() -> Path | None:
    chosen = os.environ.get("HOVLE_WHEELS")
    return Path(chosen).expanduser() if chosen else None


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
    logger.info("Downloading %s (%s)", source.filename, megabytes(source.size))
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
