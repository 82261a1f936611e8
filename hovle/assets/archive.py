"""What the registries' clients share: an archive's entries, tars, and how a client is run."""

import gzip
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from .manifest import Archive


@dataclass(frozen=True)
class Entry:
    """One thing an archive holds."""

    name: str
    is_folder: bool
    is_special: bool
    """A link, a device, a pipe: nothing that is unpacked."""
    size: int
    """Unpacked bytes."""
    open: Callable[[], AbstractContextManager[IO[bytes]]]


def read_tar(stream: IO[bytes] | gzip.GzipFile) -> Iterator[Entry]:
    """Walk through a tar once, from front to back."""
    with tarfile.open(fileobj=stream, mode="r|") as packed:
        for info in packed:
            is_special = not (info.isfile() or info.isdir()) or info.issparse()
            yield Entry(info.name, info.isdir(), is_special, info.size, partial(_open_member, packed, info))


def _open_member(packed: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = packed.extractfile(info)
    assert file is not None, "only files are opened"
    return file


def find_program(name: str, archive: Archive, advice: str) -> str:
    """Path of a program; ValueError with how to get it where it is missing."""
    found = shutil.which(name)
    if found is None:
        raise ValueError(f"{archive.package} needs {name}, which is not on the PATH: {advice}")
    return found


def run_client(
    command: Sequence[str], name: str, archive: Archive, errors_begin: str | tuple[str, ...], cwd: Path | None = None
) -> None:
    """Let a client download; its progress is shown where a person looks on.

    Args:
        command: Program and arguments.
        name: Of the client, for the error.
        archive: What it is to bring, for the error.
        errors_begin: How the client's own lines about errors begin.
        cwd: Folder to run in.

    Raises:
        ValueError: With what the client said, when it fails.
    """
    stdout = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else subprocess.DEVNULL
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": subprocess.PIPE, "cwd": cwd}
    process = subprocess.run(command, text=True, errors="replace", **options)
    if process.returncode != 0:
        lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(errors_begin)] or lines[-3:]
        raise ValueError(
            f"{name} could not download {archive.package} {archive.version} (exit code {process.returncode}):\n  "
            + "\n  ".join(errors)
        )
