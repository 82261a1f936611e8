"""Fingerprints of data files, by which a resumed run notices that its data is not the same any more.

They are made of names below a folder, sizes and contents, not of modification times: those change with every copy to
another disk or node, which must not stop a run. What is too large to be read whole is read at the beginning, in the
middle and at the end of each file.
"""

import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

MOST_FILES = 20_000
"""Files that are looked into; of more, so many at even distances."""

MOST_BYTES = 256 * 2**20
"""Bytes that are read of all files together, if that leaves `FEWEST_BYTES` for each block."""

FEWEST_BYTES = 4096
"""Smallest block that is read of a file."""

Item = TypeVar("Item")


def at_even_distances(items: Sequence[Item], most: int = MOST_FILES) -> list[Item]:
    """All items, or `most` of them from the first one on."""
    count = min(len(items), most)
    return [items[place * len(items) // count] for place in range(count)]


def fingerprint_files(paths: Sequence[str | Path], root: str | Path) -> str:
    """Short hash of names, sizes and contents.

    Args:
        paths: Files in a fixed order; absent ones count as absent.
        root: Folder that names are relative to.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.path.relpath(path, root).encode() + b"\0")
    chosen = at_even_distances(paths)
    sizes = [_size(path) for path in chosen]
    digest.update(repr(sizes).encode())
    known = [(path, size) for path, size in zip(chosen, sizes, strict=True) if size is not None]
    block = None
    if sum(size for _, size in known) > MOST_BYTES:
        block = max(FEWEST_BYTES, MOST_BYTES // (3 * len(known)))
    for path, size in known:
        digest.update(_contents(path, size, block))
    return digest.hexdigest()[:16]


def _size(path: str | Path) -> int | None:
    """Bytes of a regular file, None of what is none: a folder cannot be read, a pipe might never end."""
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return None
    return facts.st_size if stat.S_ISREG(facts.st_mode) else None


def _contents(path: str | Path, size: int, block: int | None) -> bytes:
    """Hash of a file, or of three blocks of it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if block is None or size <= 3 * block:
            return hashlib.file_digest(file, "sha256").digest()
        for start in (0, (size - block) // 2, size - block):
            file.seek(start)
            digest.update(file.read(block))
    return digest.digest()
