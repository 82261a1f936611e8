"""Wheels of the Python package index, brought by this interpreter's own pip."""

import stat
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ..requirements import installed_version
from .archive import Entry, run_client
from .manifest import Archive

HOLDS_LINKS = False

OPTIONS = ("-m", "pip", "download", "--no-deps", "--only-binary=:all:")


def command(archive: Archive) -> list[str]:
    """What downloads the wheel on any machine with pip."""
    return ["python", *OPTIONS, f"{archive.package}=={archive.version}"]


def download(archive: Archive, folder: Path) -> None:
    """Let pip bring the wheel into a folder."""
    if installed_version("pip") is None:  # looking for the module would wake setuptools
        raise ValueError(
            f"This Python ({sys.executable}) has no pip to download {archive.package} with; `python -m ensurepip` or "
            "`uv pip install pip` adds it."
        )
    options = ["--no-input", "--disable-pip-version-check", "--dest", str(folder)]
    run_client([sys.executable, *command(archive)[1:], *options], "pip", archive, "ERROR:")


def read_entries(file: BinaryIO, filename: str) -> Iterator[Entry]:
    """Walk through a wheel."""
    with zipfile.ZipFile(file) as packed:
        for info in packed.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            is_special = kind not in (0, stat.S_IFREG, stat.S_IFDIR)
            open_file = partial(packed.open, info)
            yield Entry(info.orig_filename, info.is_dir(), is_special, info.file_size, open_file)
