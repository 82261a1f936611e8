"""Results as JSON lines that survive a kill at any moment: appended as they come, in the input's order at the end.

Beside the file of results lies one with the settings they were made with, so that a run which goes on cannot mix
answers to different questions.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..files.atomic import take_lock


class Results:
    """A file of results, open for more of them.

    Args:
        path: The file.
        names: Of all items in their order; a name may occur several times and is worked at once.
        settings: What results depend on.
        resume: Go on with a file that is there.

    Attributes:
        lines: Results by name; those that are errors are not among them until they are added anew.

    Raises:
        ValueError: Where there is a file and `resume` was not said, where it was made with other settings or holds
            results of other items, where it is damaged, and where another process works at it.
    """

    def __init__(self, path: Path, names: Sequence[str], settings: dict[str, Any], resume: bool):
        self.path, self.names = path, names
        self.lines: dict[str, dict] = {}
        settings_file = path.with_name(f"{path.name}.settings.json")
        is_there = path.exists()
        if is_there and not resume:
            raise ValueError(f"{path} is there already: go on with it (--resume), or choose another --out.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            self._file = opened.enter_context(path.open("a", encoding="utf-8"))
            opened.enter_context(_locked(path))
            if is_there:
                _check_settings(settings_file, path, settings)
                self._read()
            _replace(settings_file, json.dumps(settings, indent=1) + "\n")
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    @property
    def missing(self) -> list[str]:
        """Names without a result, each once, in their order."""
        return [name for name in dict.fromkeys(self.names) if name not in self.lines]

    def add(self, lines: Iterable[dict]) -> None:
        """Append results; on the disk when this returns."""
        lines = list(lines)
        self._file.write("".join(map(_as_line, lines)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines |= {line["name"]: line for line in lines}

    def finish(self) -> list[dict]:
        """Put all results into the order of the input, one for each item, and return them; no more may be added."""
        self._file.close()
        lines = [self.lines[name] for name in self.names]
        _replace(self.path, "".join(map(_as_line, lines)))
        return lines

    def _read(self) -> None:
        """Read what is there; a last line that was cut short is taken off the file."""
        data = self.path.read_bytes()
        whole, newline, rest = data.rpartition(b"\n")
        if rest:
            with self.path.open("rb+") as file:
                file.truncate(len(whole) + len(newline))
        known = {*self.names}
        for number, line in enumerate((whole + newline).splitlines(), start=1):
            entry = _parsed(line, f"{self.path}:{number}")
            if entry["name"] not in known:
                raise ValueError(
                    f"{self.path}:{number} is the result of {entry['name']!r:.200}, which is not among the pictures "
                    "now: name all that were named then, or choose another --out."
                )
            if "error" in entry:  # what could not be read is tried again
                self.lines.pop(entry["name"], None)
            else:
                self.lines[entry["name"]] = entry


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep others from a file, where its disk knows locks: each would answer all and overwrite the other's."""
    try:
        lock = take_lock(path)
    except BlockingIOError as error:
        raise ValueError(
            f"{path} is being written by another process: wait until it is done, or choose another --out."
        ) from error
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _parsed(line: bytes, where: str) -> dict:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}): mend it, or choose another --out.") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ValueError(f"{where} is no result, which has a name: mend it, or choose another --out.")
    return entry


def _check_settings(file: Path, path: Path, settings: dict[str, Any]) -> None:
    if not file.is_file():
        raise ValueError(f"{path} cannot be gone on with: {file.name}, which says how it was made, is not beside it.")
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}): choose another --out.") from error
    found = found if isinstance(found, dict) else {}
    differing = [name for name in settings if found.get(name) != settings[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{path} was made with {name} {found.get(name)!r:.200}, now it is {settings[name]!r:.200}: say the same, "
            "or choose another --out."
        )


def _as_line(entry: dict) -> str:
    return json.dumps(entry) + "\n"


def _replace(path: Path, text: str) -> None:
    """Write a file that is there whole or, as it was before, not at all."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
