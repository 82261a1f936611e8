"""Folders that are on the disk whole or not at all, also after a kill, a full disk or a power cut."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def rename_durably(source: Path, target: Path) -> None:
    """Give a finished file or folder a free name, once everything in it has reached the disk.

    A rename may reach the disk before what it names; after a power cut the name would then stand for empty files.

    Raises:
        OSError: When the disk fails, or `target` is a folder that is not empty.
    """
    for path in [*source.rglob("*"), source]:
        _flush(path)
    os.rename(source, target)
    _flush(target.parent)


def replace_folder(source: Path, target: Path) -> None:
    """Give a finished folder a name another one may have, which keeps it until then and is deleted after."""
    older = _hidden(target, "old")
    shutil.rmtree(older, ignore_errors=True)
    if target.exists():
        os.rename(target, older)
    try:
        rename_durably(source, target)
    except BaseException:
        if older.exists() and not target.exists():
            os.rename(older, target)
        raise
    shutil.rmtree(older, ignore_errors=True)


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary folder, then put it in place; an older one stays until then."""
    temporary = _hidden(folder, "writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Delete a folder so that nobody finds half of it under its name."""
    doomed = _hidden(folder, "old")
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Delete what a killed process left of the writing and removing above."""
    for pattern in (".*.writing", ".*.old"):
        for folder in parent.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def _hidden(folder: Path, state: str) -> Path:
    return folder.with_name(f".{folder.name}.{state}")


def _flush(path: Path) -> None:
    if path.is_symlink() or (path.is_dir() and os.name == "nt"):  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_log(path: Path, entry: dict) -> None:
    """Append one JSON line."""
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
