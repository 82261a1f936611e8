"""Folders that are on the disk whole or not at all, also after a kill, a full disk or a power cut."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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


@contextlib.contextmanager
def appear_when_complete(dst: Path) -> Iterator[Path]:
    """Give a temporary folder beside `dst` that takes its name at the end, or leaves no trace after an error.

    What a killed process left of the same is deleted; folders of processes that still write stay.
    """
    dst.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(dst)
    folder = dst.with_name(f".{dst.name}-{os.urandom(4).hex()}")
    folder.mkdir()
    lock = try_lock(folder)
    try:
        yield folder
        rename_durably(folder, dst)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _remove_unfinished(dst: Path) -> None:
    """Delete temporary folders of `dst` whose process is gone."""
    for folder in dst.parent.iterdir():
        if not re.fullmatch(rf"\.{re.escape(dst.name)}-[0-9a-f]{{8}}", folder.name) or folder.is_symlink():
            continue
        lock = try_lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def take_lock(path: Path) -> int | None:
    """Lock a file or folder until the descriptor is closed or the process ends; None on a disk that knows no locks.

    Raises:
        BlockingIOError: Where another process has it.
    """
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def try_lock(folder: Path) -> int | None:
    """As `take_lock`; None also where another process has it."""
    try:
        return take_lock(folder)
    except BlockingIOError:
        return None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, where there is a free one: others see by it that somebody works there."""
    lock = try_lock(folder)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def is_locked(folder: Path) -> bool:
    """Whether another process holds a folder's lock, or there are no locks on this disk to tell."""
    lock = try_lock(folder)
    if lock is not None:
        os.close(lock)
    return lock is None


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
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
