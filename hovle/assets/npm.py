"""Packages of the npm registry, brought by the user's own npm, with its registry and proxy settings."""

import gzip
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from .archive import Entry, find_program, read_tar, run_client
from .manifest import Archive

HOLDS_LINKS = False  # npm packs none


def command(archive: Archive) -> list[str]:
    """What downloads the package on any machine with npm."""
    return ["npm", "pack", f"{archive.package}@{archive.version}"]


def download(archive: Archive, folder: Path) -> None:
    """Let npm bring the package into a folder; no script of it runs."""
    npm = find_program(
        "npm", archive, "it comes with Node.js (https://nodejs.org, `apt-get install npm`, `brew install node`)."
    )
    run_client([npm, *command(archive)[1:], "--ignore-scripts"], "npm", archive, ("npm error", "npm ERR!"), folder)


def read_entries(file: BinaryIO, filename: str) -> Iterator[Entry]:
    """Walk through a package."""
    with gzip.open(file) as stream:
        for entry in read_tar(stream):
            parts = [part for part in entry.name.split("/") if part != "."]  # some packages say package/./dist/...
            yield replace(entry, name="/".join(parts))
