"""Archives of package registries: brought by a client the user has, compared with their hash and never installed."""

import contextlib
import hashlib
import logging
import lzma
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from tqdm import tqdm

from . import debian, npm, wheel
from .archive import Entry
from .cache import cache_folder, make_folder, megabytes
from .manifest import Archive, Asset, Member

logger = logging.getLogger(__name__)

MAX_EXPANSION = 200
"""An archive that claims to unpack to more than so many times its size is refused; ours stay below 15."""


class Client(Protocol):
    """What each registry's module does."""

    HOLDS_LINKS: bool
    """Whether an archive may hold links and special files, which are never made."""

    def command(self, archive: Archive) -> list[str]:
        """What downloads the archive into the current folder on any machine that has the client."""

    def download(self, archive: Archive, folder: Path) -> None:
        """Let the client bring the archive into a folder; ValueError with what it said where it could not."""

    def read_entries(self, file: BinaryIO, filename: str) -> Iterator[Entry]:
        """Walk through what the archive holds; an entry is read before the next one is asked for."""


CLIENTS: dict[str, Client] = {"pypi": wheel, "npm": npm, "debian": debian}


def place(asset: Asset) -> tuple[Path, dict[str, Any]]:
    """Say where the unpacked archive belongs and what its marker says."""
    archive = asset.archive
    members = [f"{member.pattern} -> {member.to}" for member in archive.members]
    identity = {"name": asset.name, "version": archive.version, "sha256": archive.sha256, "members": members}
    return cache_folder() / f"{asset.name}-{archive.version.replace(':', '_')}", identity


def fetch(asset: Asset, downloads: Path | None = None) -> Path:
    """Unpack what the manifest names of an asset's archive.

    Args:
        asset: Entry of the manifest.
        downloads: Folder to take the archive from instead of the network; by default that of `HOVLE_DOWNLOADS`, if
            set.
    """
    archive = asset.archive
    downloads = downloads or _downloads_from_environment()

    def fill(folder: Path) -> dict[str, Any]:
        path = _find(asset, downloads) if downloads else _download(asset)
        with _open_verified(path, archive, is_ours=downloads is None) as file:
            _unpack(file, archive, folder)
        if downloads is None:
            path.unlink()  # unpacked, and the client can bring it again
        return {"licence": asset.licence, "url": archive.url}

    return make_folder(*place(asset), fill, archive.size + archive.unpacked_size)


def command_line(archive: Archive) -> str:
    """What downloads the archive on any machine with the registry's client."""
    return " ".join(CLIENTS[archive.registry].command(archive))


def _downloads_from_environment() -> Path | None:
    chosen = os.environ.get("HOVLE_DOWNLOADS")
    return Path(chosen).expanduser() if chosen else None


def _find(asset: Asset, downloads: Path) -> Path:
    path = downloads / asset.archive.filename
    if not path.is_file():
        raise ValueError(f"{downloads} does not hold {asset.archive.filename}. {_offline_advice(asset)}")
    return path


def _download(asset: Asset) -> Path:
    """Let the client bring the archive into the cache; one an interrupted run left there whole is taken as it is."""
    archive = asset.archive
    downloads = cache_folder() / "downloads"
    path = downloads / archive.filename
    if path.is_file() and path.stat().st_size == archive.size:
        return path
    downloads.mkdir(exist_ok=True)
    for leftover in downloads.glob(f"{asset.name}.incoming-*"):  # an interrupted run's, whose client may still write
        shutil.rmtree(leftover, ignore_errors=True)
    incoming = Path(tempfile.mkdtemp(prefix=f"{asset.name}.incoming-", dir=downloads))
    try:
        logger.info("Downloading %s (%s)", archive.filename, megabytes(archive.size))
        CLIENTS[archive.registry].download(archive, incoming)
        if not (incoming / archive.filename).is_file():
            found = ", ".join(sorted(path.name for path in incoming.iterdir())) or "nothing"
            raise ValueError(f"`{command_line(archive)}` was to bring {archive.filename} and brought {found}.")
        os.replace(incoming / archive.filename, path)
    except ValueError as error:
        raise ValueError(f"{error}\n{_offline_advice(asset)}") from error
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return path


def _offline_advice(asset: Asset) -> str:
    archive = asset.archive
    return (
        f"Without a network: run `{command_line(archive)}` on a connected machine (or take the file from "
        f"{archive.url}), copy {archive.filename} into a folder here and run `hovle fetch {asset.name} --from FOLDER`,"
        " or set HOVLE_DOWNLOADS to that folder."
    )


@contextlib.contextmanager
def _open_verified(path: Path, archive: Archive, is_ours: bool) -> Iterator[BinaryIO]:
    """Open an archive whose hash is right; what was hashed is what is read, even if the path changes meanwhile."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if found == archive.sha256:
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
        f"  expected sha256 {archive.sha256} ({archive.size:,} bytes)\n"
        f"  found    sha256 {found} ({size:,} bytes)\n"
        f"{advice} If it happens again, compare with the hash at {archive.url}."
    )


def _unpack(file: BinaryIO, archive: Archive, folder: Path) -> None:
    """Copy the manifest's members out of an archive into a folder that is thrown away when this raises."""
    progress = tqdm(
        total=archive.unpacked_size, unit="B", unit_scale=True, desc=f"unpacking {archive.package}", disable=None
    )
    found = {member: _Found() for member in archive.members}
    try:
        with progress:
            for entry in _safe_entries(file, archive):
                for member in archive.members:
                    if matches(entry.name, member.pattern) and found[member].add(entry, member, archive.filename):
                        _copy(entry, member, archive.filename, folder, progress)
    except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ValueError(f"{archive.filename} cannot be unpacked: {error}") from error
    for member, files in found.items():
        if (len(files.names), files.size) != (member.count, member.size):
            raise ValueError(
                f"{archive.filename} holds {len(files.names)} files ({files.size:,} bytes) of {member.pattern}; "
                f"the manifest says {member.count} ({member.size:,} bytes)."
            )


class _Found:
    """What an archive was found to hold of a member so far."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.size = 0

    def add(self, entry: Entry, member: Member, filename: str) -> bool:
        """Count a file; whether it is still within what the manifest says."""
        if entry.name in self.names:
            raise ValueError(f"{filename} holds two files of the same name {entry.name!r}; nothing was unpacked.")
        self.names.add(entry.name)
        self.size += entry.size
        return len(self.names) <= member.count and self.size <= member.size


def _safe_entries(file: BinaryIO, archive: Archive) -> Iterator[Entry]:
    """The files an archive holds; ValueError at the first entry that no honest archive has."""
    client, filename = CLIENTS[archive.registry], archive.filename
    total = 0
    for entry in client.read_entries(file, filename):
        _refuse_unsafe_name(entry.name, filename)
        if entry.is_special and not client.HOLDS_LINKS:
            raise ValueError(f"{filename} holds {entry.name!r}, a link or special file; nothing was unpacked.")
        if entry.is_special or entry.is_folder:
            continue
        total += entry.size
        if total > max(MAX_EXPANSION * archive.size, 1 << 20):
            raise ValueError(
                f"{filename} ({archive.size:,} bytes) unpacks to more than {MAX_EXPANSION} times its size; nothing "
                "was unpacked."
            )
        yield entry


def _refuse_unsafe_name(name: str, filename: str) -> None:
    parts = name.removesuffix("/").split("/")
    if any(part in ("", ".", "..") for part in parts) or any(character in name for character in "\\:\0"):
        raise ValueError(f"{filename} holds the unsafe name {name!r}; nothing was unpacked.")


def _copy(entry: Entry, member: Member, filename: str, folder: Path, progress: tqdm) -> None:
    target = (
        folder / member.to / kept_path(entry.name, member.pattern) if member.to.endswith("/") else folder / member.to
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with entry.open() as packed, target.open("xb") as unpacked:
        while block := packed.read(1 << 20):
            digest.update(block)
            unpacked.write(block)
            progress.update(len(block))
    if member.sha256 is not None and digest.hexdigest() != member.sha256:
        raise ValueError(
            f"{entry.name} of {filename} has sha256 {digest.hexdigest()}; the manifest says {member.sha256}."
        )


def kept_path(name: str, pattern: str) -> str:
    """Path of a matched file from the level of the pattern's first wildcard on; its last part where there is none."""
    levels = pattern.split("/")
    first = next((level for level, part in enumerate(levels) if any(mark in part for mark in "*?[")), len(levels) - 1)
    return "/".join(name.split("/")[first:])


def matches(name: str, pattern: str) -> bool:
    """Like a shell: `*` does not reach into folders, `**` stands for any number of them."""
    return _levels_match(name.split("/"), pattern.split("/"))


def _levels_match(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_levels_match(parts[skipped:], patterns[1:]) for skipped in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _levels_match(parts[1:], patterns[1:])
