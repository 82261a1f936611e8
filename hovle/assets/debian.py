"""Debian packages, brought by the system's own apt-get and taken apart here; nothing is installed, no root needed."""

import gzip
import importlib.util
import io
import lzma
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, BinaryIO

from .archive import Entry, find_program, read_tar, run_client
from .manifest import Archive

HOLDS_LINKS = True  # to what other packages bring, for instance; they are never made


def command(archive: Archive) -> list[str]:
    """What downloads the package on any Debian that has this version."""
    return ["apt-get", "download", f"{archive.package}={archive.version}"]


def download(archive: Archive, folder: Path) -> None:
    """Let apt-get bring the package into a folder."""
    program = find_program(
        "apt-get", archive, "it is part of Debian and Ubuntu; on other systems take the file as said below."
    )
    try:
        run_client([program, *command(archive)[1:]], "apt-get", archive, "E:", folder)
    except ValueError as error:
        raise ValueError(f"{error}\n{_what_the_lists_hold(archive)}") from error


def _what_the_lists_hold(archive: Archive) -> str:
    """Say which versions of a package this system could download."""
    program = find_program("apt-cache", archive, "it comes with apt-get.")
    listed = subprocess.run(
        [program, "madison", archive.package], capture_output=True, text=True, errors="replace", check=False
    )
    rows = [line.split("|") for line in listed.stdout.splitlines()]
    versions = sorted({row[1].strip() for row in rows if len(row) == 3 and row[0].strip() == archive.package})
    if not versions:
        return (
            f"This system's package lists have no {archive.package}: `apt-get update`, as root, renews them; a "
            "release may also not have it."
        )
    if archive.version in versions:
        return "This system's package lists have it: `apt-get update`, as root, renews them if they are old."
    return (
        f"This system's release has {archive.package} {', '.join(versions)}, and {archive.version} is pinned: take "
        f"that file from {archive.url}, or download it on a release that has it, as said below."
    )


def read_entries(file: BinaryIO, filename: str) -> Iterator[Entry]:
    """Walk through the files of a package, by their paths without the leading `./`."""
    with _open_data(file, filename) as stream:
        for entry in read_tar(stream):
            if entry.name not in (".", "./"):
                yield replace(entry, name=entry.name.removeprefix("./"))


def _open_data(file: BinaryIO, filename: str) -> IO[bytes] | gzip.GzipFile:
    """Open the tar of a package's files; deb(5) tells the format: an `ar` archive of three members."""
    for name, start, size in _sections(file, filename):
        if not name.startswith("data.tar"):
            continue
        section = io.BufferedReader(_Section(file, start, size))
        suffix = name.removeprefix("data.tar")
        if suffix == ".xz":
            return lzma.open(section)
        if suffix == ".gz":
            return gzip.open(section)
        if suffix == ".zst":
            return _open_zstandard(section, filename)
        if suffix == "":
            return section
        raise ValueError(f"{filename} holds its files as {name}; expected data.tar, .xz, .gz or .zst.")
    raise ValueError(f"{filename} is no Debian package: it has no data.tar.")


def _sections(file: BinaryIO, filename: str) -> Iterator[tuple[str, int, int]]:
    """Name, place and size of each member of an `ar` archive."""
    if file.read(8) != b"!<arch>\n":
        raise ValueError(f"{filename} is no Debian package: it does not begin as an ar archive.")
    while header := file.read(60):
        size = header[48:58].strip()
        if len(header) != 60 or header[58:] != b"`\n" or not size.isdigit():
            raise ValueError(f"{filename} is no Debian package: the header at byte {file.tell()} is damaged.")
        start = file.tell()
        yield header[:16].decode("latin-1").rstrip().rstrip("/"), start, int(size)
        file.seek(start + int(size) + int(size) % 2)


class _Section(io.RawIOBase):
    """So many bytes of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._file, self._left = file, size
        file.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        block = self._file.read(min(len(buffer), self._left))
        buffer[: len(block)] = block
        self._left -= len(block)
        return len(block)


def _open_zstandard(section: IO[bytes], filename: str) -> IO[bytes] | gzip.GzipFile:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.open(section)
    if importlib.util.find_spec("zstandard") is None:
        raise ValueError(
            f"{filename} is compressed with zstd, which Python before 3.14 reads with the zstandard package, which is "
            "not installed: pip install 'hovle[deb]'"
        )
    import zstandard

    return zstandard.ZstdDecompressor().stream_reader(section, read_across_frames=True)
