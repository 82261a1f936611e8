"""The folder of fetched files: each asset's folder is there whole or not at all, whoever else fetches."""

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from ..files.atomic import write_folder
from ..files.documents import load_json

logger = logging.getLogger(__name__)

MARKER = ".complete.json"
"""Written last into an unpacked folder: the identity of its source and the size of each file."""


def cache_folder() -> Path:
    """Say where fetched files are kept: `HOVLE_CACHE`, else hovle's folder in the user's cache."""
    if chosen := os.environ.get("HOVLE_CACHE"):
        return Path(chosen).expanduser().absolute()
    return platformdirs.user_cache_path("hovle", appauthor=False)


def is_complete(folder: Path, identity: dict[str, Any]) -> bool:
    """Compare a folder with its marker: same source, and every file there with its size. Hashes are not recomputed."""
    try:
        marker = load_json(folder / MARKER)
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


def make_folder(folder: Path, identity: dict[str, Any], fill: Callable[[Path], dict[str, Any]], needed: int) -> Path:
    """Create a folder of the cache so that it is seen either whole or not at all.

    Args:
        folder: Where it will be.
        identity: What its marker must say for an existing folder to be taken as it is.
        fill: Puts the files into the empty folder it is given; returns more entries for the marker.
        needed: Bytes of disk the work takes.

    Returns:
        `folder`.
    """
    if is_complete(folder, identity):
        return folder

    def fill_and_mark(staging: Path) -> None:
        _check_free_space(staging, needed)
        more = fill(staging)
        _write_marker(staging, {**identity, **more})

    with _locked(folder.name):
        if not is_complete(folder, identity):  # else the process we waited for has made it
            with _disk_errors_explained():
                write_folder(folder, fill_and_mark)  # one that is there is damaged
    return folder


def _check_free_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {megabytes(free)} free and the fetch needs {megabytes(needed)}. "
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


def megabytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e6:,.1f} MB"
