"""Folders of pictures: what metadata or a text beside a picture says of it.

A file `metadata.csv`, `.jsonl` or `.parquet` names the pictures of its folder in the column `file_name` (or
`file_names`, a list), or in the one that the recipe calls `image`. Where there is none, `1.txt` is the caption of
`1.png`.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ...files.documents import UnreadableError, parse_json
from ..config import HuggingFaceData
from .conversation_files import read_entries, read_text
from .local_files import METADATA, LocalFiles, describe_left
from .records import PICTURE_SUFFIXES
from .rows import FAULT

FILE_NAMES = ("file_name", "file_names")
OTHER_NAMES = ("image", "images")
"""Columns of metadata in which pictures' names may stand, and those in which they do where there are no such."""


class FolderRows(Sequence[dict]):
    """Rows of a folder of pictures; texts are read when a row is.

    Args:
        local: Files of the folder.
        config: Says what columns are called.
    """

    def __init__(self, local: LocalFiles, config: HuggingFaceData):
        files = [file for own in local.splits.values() for file in own]
        pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
        texts = [file for file in files if file.suffix.lower() == ".txt"]
        metadata = [file for file in files if file.name in METADATA]
        self.root = local.root
        self.left_aside: list[str] = []
        self._rows = [row for file in metadata for row in self._described(file, config)]
        self._pictures: list[tuple[Path, Path | None]] = []  # with a text each, where no metadata is there
        if metadata:
            named = {path for row in self._rows for path in _paths(row)}
            unnamed = [file for file in pictures if self._below(file) not in named]
            self.left_aside += describe_left(unnamed, "of pictures that no metadata names")
            self.left_aside += describe_left(texts, "of text, as there is metadata")
            return
        captions = {text.with_suffix(""): text for text in texts}
        self._pictures = [(file, captions.get(file.with_suffix(""))) for file in pictures]
        used = {text for _, text in self._pictures}
        self.left_aside += describe_left([text for text in texts if text not in used], "of text without a picture")

    def _below(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def _described(self, file: Path, config: HuggingFaceData) -> list[dict]:
        """Rows of a file of metadata; pictures are named relative to the root."""
        rows = _READERS[file.suffix](file)
        columns = list(dict.fromkeys(key for row in rows for key in row if key != FAULT))
        own = config.columns.get("image")
        named = [own] if own else [name for name in columns if name in FILE_NAMES or name.endswith("_file_name")]
        named = named or [name for name in columns if name in OTHER_NAMES]
        if not rows or not set(named) & set(columns):
            raise ValueError(
                f"{config.label}: {file} has the columns {', '.join(columns) or 'none'}; expected "
                f"{own or 'file_name'} with names of pictures. Say which it is: data.columns: {{image: NAME}}."
            )
        folder = file.parent.relative_to(self.root)
        return [self._with_pictures(row, named, folder, own) for row in rows]

    @staticmethod
    def _with_pictures(row: dict, named: Sequence[str], folder: Path, own: str | None) -> dict:
        given = [row.get(name) for name in named]
        names = [item for value in given for item in (value if isinstance(value, list) else [value]) if item]
        rest = {key: value for key, value in row.items() if key not in named}
        if not all(isinstance(name, str) for name in names):
            return {**rest, FAULT: f"names of pictures are no text: {names!r:.80}"}
        pictures = [{"path": str(folder / name.replace("\\", "/")), "bytes": None} for name in names]
        return {**rest, own or "images": pictures}

    def __len__(self) -> int:
        return len(self._rows) + len(self._pictures)

    def __getitem__(self, place: Any) -> Any:
        if place < len(self._rows):
            return self._rows[place]
        picture, text = self._pictures[place - len(self._rows)]
        row: dict = {"image": {"path": self._below(picture), "bytes": None}}
        if text is not None:
            try:
                row["txt"] = read_text(text).strip()
            except ValueError as error:
                row[FAULT] = str(error)
        return row


def _paths(row: dict) -> list[str]:
    """Names of a row's pictures without detours, relative to the root."""
    lists = [value for value in row.values() if isinstance(value, list)]
    paths = [item["path"] for value in lists for item in value if isinstance(item, dict) and "path" in item]
    return [str(PurePosixPath(path)) for path in paths]


def _read_csv(file: Path) -> list[dict]:
    reader = csv.DictReader(io.StringIO(read_text(file), newline=""), restkey=FAULT, strict=True)
    rows: list[dict] = []
    try:
        for row in reader:
            if row.get(FAULT):
                row[FAULT] = f"line {reader.line_num} of {file.name} has more values than there are columns"
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"{file} cannot be read as CSV: line {reader.line_num}: {error}.") from error
    return rows


def _read_lines(file: Path) -> list[dict]:
    entries = read_entries(file, is_list=False)
    rows: list[dict] = []
    for line, number in zip(entries.items, entries.numbers, strict=True):
        try:
            row = parse_json(line, f"{file.name}:{number}")
            rows.append(row if isinstance(row, dict) else {FAULT: f"{file.name}:{number} is no object"})
        except UnreadableError as error:
            rows.append({FAULT: str(error)})
    return rows


def _read_parquet(file: Path) -> list[dict]:
    from pyarrow import ArrowException, parquet  # comes with `datasets`

    try:
        return parquet.read_table(file).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as parquet: {error}.") from error


_READERS = {".csv": _read_csv, ".jsonl": _read_lines, ".parquet": _read_parquet}
