"""Sources read by Hugging Face `datasets`: parquet, tars of WebDataset, picture folders, data sets of the Hub.

A row needs no fixed columns; it may hold

- pictures: `image` or `images`, or members of a tar with a picture's suffix;
- a conversation: `messages` (role, content), `conversations` (from, value) or `texts` (user, assistant), also inside
  a member `.json`; or a caption: `text`, `caption` or a member `.txt`, the reply to `data.prompt`.

Pictures stay encoded until their batch is packed. Of a tar, pictures, JSON and text are decoded and nothing else.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files.fingerprints import fingerprint_files
from ..config import HuggingFaceData
from .records import PICTURE_MARK, PICTURE_SUFFIXES, ROLES, Record, conversation, inside, messages_from_turns
from .rows import FILM_ITEMS, is_empty, shows_a_picture, unread_keys, with_pictures_first, with_system
from .skips import FILM, SkipSampleError, sparing_the_run

TEXT_SUFFIXES = ("json", "txt")
"""Members of a tar that are decoded, beside pictures."""

CONVERSATIONS = ("messages", "conversations", "texts")
"""Columns that hold a conversation."""

TURN_KEYS = ("role", "content", "name", "from", "value", "user", "assistant", "source")
"""Keys of the turns of a conversation that are read or harmless."""

CAPTIONS = ("text", "caption", "txt")
"""Columns that hold a caption."""

PICTURES = ("image", "images")
"""Columns that hold pictures, beside members with a picture's suffix."""

FAULT = "__fault__"
"""Column of a tar's rows that says which member cannot be decoded, empty where all can."""


def open_dataset(config: HuggingFaceData) -> tuple[Any, str]:
    """Open a data set, map-style or as a stream, with its pictures left encoded.

    Returns:
        The data set, and a fingerprint of what it is made of.
    """
    from datasets import load_dataset_builder  # an extra: other sources do without it
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    path = Path(config.path)
    options: dict = {}
    if path.is_dir():
        options["data_dir"] = str(path)
    elif path.exists() or "*" in path.name:
        options["data_files"] = str(path)
    builder = load_dataset_builder(
        _layout(config) if options else str(path), config.subset, revision=config.revision, **options
    )
    commit = None if options else builder.hash
    if isinstance(builder, WebDataset):
        builder = _picture_tars(WebDataset)(data_files=builder.config.data_files)
    if not config.streaming:
        _prepare(builder, config)
    opened = builder.as_streaming_dataset if config.streaming else builder.as_dataset
    dataset = _with_encoded_pictures(opened(split=config.split), config)
    return dataset, _fingerprint(config, dataset, commit)


def _prepare(builder: Any, config: HuggingFaceData) -> None:
    """Write the rows to the cache of `datasets`."""
    from datasets.exceptions import DatasetGenerationError

    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        raise ValueError(f"{config.label}: `datasets` cannot prepare its rows ({error.__cause__!r:.300}).") from error


def _with_encoded_pictures(dataset: Any, config: HuggingFaceData) -> Any:
    """The data set with its pictures left encoded, and what is none undecoded: rows of it will be skipped.

    Raises:
        ValueError: Where a column of pictures has a name nobody reads.
    """
    from datasets import Audio, Image, List, Video

    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Audio | Video):
            dataset = dataset.cast_column(name, type(feature)(decode=False))
        is_list = isinstance(feature, List)
        if not isinstance(feature.feature if is_list else feature, Image):
            continue
        if not _is_picture_column(name):
            raise ValueError(
                f"{config.label}: its column {name!r} holds pictures, but only {_known_columns()} are read. Rename "
                "it, or write the data set without it."
            )
        encoded = Image(decode=False)
        dataset = dataset.cast_column(name, List(encoded) if is_list else encoded)
    return dataset


def _picture_tars(base: Any) -> Any:
    """Reader of tars that decodes nothing but JSON and text, and tells of a member that is neither."""

    def decode_or_tell(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        def decoded(data: bytes) -> Any:
            try:
                return decode(data)
            except (ValueError, RecursionError) as error:
                return _BrokenMember(str(error))

        return decoded

    class PictureTars(base):
        DECODERS = {suffix: decode_or_tell(base.DECODERS[suffix]) for suffix in TEXT_SUFFIXES}  # noqa: RUF012

        @classmethod
        def _get_pipeline_from_tar(cls, tar_path: str, tar_iterator: Any) -> Iterator[dict]:
            for example in super()._get_pipeline_from_tar(tar_path, tar_iterator):
                broken = {key: value for key, value in example.items() if isinstance(value, _BrokenMember)}
                faults = [
                    f"{example['__key__']}.{key} of {tar_path.rpartition('/')[2]} cannot be decoded ({value.error})"
                    for key, value in broken.items()
                ]
                yield {**example, **dict.fromkeys(broken), FAULT: "; ".join(faults)}

    return PictureTars


@dataclass(frozen=True)
class _BrokenMember:
    """Stands for a member of a tar that cannot be decoded."""

    error: str


def _is_picture_column(name: str) -> bool:
    return name in PICTURES or f".{name.rpartition('.')[2].lower()}" in PICTURE_SUFFIXES


def _known_columns() -> str:
    return f"{', '.join(PICTURES)} and members of a tar named {', '.join(PICTURE_SUFFIXES)}"


def _layout(config: HuggingFaceData) -> str:
    """How local files are laid out, by their names if the recipe does not say."""
    if config.format != "auto":
        return config.format
    path = Path(config.path)
    files = path.rglob("*") if path.is_dir() else [path]
    suffixes = {file.suffix.lower() for file in files}
    for layout, known in (("parquet", {".parquet"}), ("webdataset", {".tar"}), ("imagefolder", PICTURE_SUFFIXES)):
        if suffixes.intersection(known):
            return layout
    raise ValueError(
        f"data.path: {path} holds no parquet files, tars or pictures ({', '.join(sorted(suffixes)) or 'nothing'}); "
        "set data.format if they have other names."
    )


def _fingerprint(config: HuggingFaceData, dataset: Any, commit: str | None) -> str:
    """Short hash of local files, or of a Hub id with its commit; of columns, and of rows if known."""
    path = Path(config.path)
    files = sorted(path.rglob("*")) if path.is_dir() else sorted(path.parent.glob(path.name))
    if commit is None:
        made_of = fingerprint_files([file for file in files if file.is_file()], path if path.is_dir() else path.parent)
    else:
        made_of = config.path
    rows = None if config.streaming else len(dataset)
    parts = (made_of, config.subset, config.split, sorted(dataset.features or {}), rows)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16] + (f"@{commit}" if commit else "")


class DatasetRecords:
    """A map-style data set."""

    def __init__(self, config: HuggingFaceData):
        self.config = config
        self.dataset, self.fingerprint = open_dataset(config)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int, /) -> Record:
        name = f"{self.config.label}[{place}]"
        with sparing_the_run(name):
            return record_from_row(self.dataset[place], name, self.config)


class DatasetStream:
    """A streamed data set; each shard of the run reads its share of the files, or of the rows if they do not divide.

    Only the order of the files is shuffled: rows mixed in a buffer would be lost when a run is resumed. So shuffle
    the rows before writing the files, and write a multiple of the run's shards (micro-batches per step).
    """

    def __init__(self, config: HuggingFaceData):
        self.config = config
        self.dataset, self.fingerprint = open_dataset(config)

    def open_shard(self, shard: int, num_shards: int, seed: int, state: dict | None) -> "ShardStream":
        """Read a shard's share, from its beginning or from where `ShardStream.state` was taken."""
        return ShardStream(self, shard, num_shards, seed, state or {"epoch": 0, "num_rows": 0, "dataset": None})


class ShardStream:
    """One shard of a run reads its share of a streamed data set, epoch after epoch."""

    def __init__(self, source: DatasetStream, shard: int, num_shards: int, seed: int, state: dict):
        self.source, self.shard, self.num_shards, self.seed = source, shard, num_shards, seed
        self._open_epoch(state)

    def _open_epoch(self, state: dict) -> None:
        from datasets.distributed import split_dataset_by_node

        self.epoch, self.num_rows = state["epoch"], state["num_rows"]
        shuffled = self.source.dataset.shuffle(
            seed=self.seed * 7919 + self.epoch, buffer_size=1, max_buffer_input_shards=1
        )
        self.dataset = split_dataset_by_node(shuffled, self.shard, self.num_shards)
        if state["dataset"] is not None:
            self.dataset.load_state_dict(json.loads(state["dataset"]))
        self.rows: Iterator[dict] = iter(self.dataset)

    def state(self) -> dict:
        """Where the next row stands; plain values."""
        dataset = json.dumps(self.dataset.state_dict()) if self.num_rows else None
        return {"epoch": self.epoch, "num_rows": self.num_rows, "dataset": dataset}

    def next_record(self) -> Record:
        """Read on, into the next epoch where one ends."""
        row = next(self.rows, None)
        if row is None:
            if self.num_rows == 0:
                raise ValueError(
                    f"{self.source.config.label}: nothing to read for one of the run's {self.num_shards} shards "
                    "(micro-batches per step): the stream has fewer rows than shards. Do not stream it."
                )
            self._open_epoch({"epoch": self.epoch + 1, "num_rows": 0, "dataset": None})
            return self.next_record()
        self.num_rows += 1
        name = f"{self.source.config.label} shard {self.shard} epoch {self.epoch} row {self.num_rows}"
        with sparing_the_run(name):  # and not the reading: a stream that fails is at its end
            return record_from_row(row, name, self.source.config)


def record_from_row(row: dict, name: str, config: HuggingFaceData) -> Record:
    """Turn a row into a record; SkipSampleError where it has neither pictures nor text, or too few of them."""
    member = row.get("json")
    if isinstance(member, Mapping):
        row = {**member, **{key: value for key, value in row.items() if key != "json"}}
    name = f"{name} ({row['__key__']})" if "__key__" in row else name
    if row.get(FAULT):
        raise SkipSampleError(name, "malformed", f"{row[FAULT]}.")
    pictures = _pictures(row, name, config)
    if not pictures:
        _check_no_picture_is_missing(row, name)
    turns, read = _turns(row, name, len(pictures), config)
    unread = _unread(row, read, len(pictures), name)
    if turns is None and len(pictures) == 1:
        return Record(name, conversation(pictures[0], "", ""), unread=unread)
    if turns is None:
        columns = ", ".join(key for key, value in row.items() if value is not None)
        raise SkipSampleError(
            name, "malformed", f"expected a conversation, a caption or one picture, found {columns}."
        )
    return Record(name, messages_from_turns(name, with_system(turns, row, name), pictures), unread=unread)


def _unread(row: dict, read: str | None, num_pictures: int, name: str) -> tuple[str, ...]:
    """Keys of a row, and of the turns it was read from, that nobody reads; see `rows`."""
    known = [key for key in row if _is_picture_column(key) or key in (read, "system", FAULT)]
    unread = unread_keys(row, known, num_pictures, name, is_caption=read in CAPTIONS)
    for turn in row[read] if read in CONVERSATIONS else []:
        unread += unread_keys(turn, TURN_KEYS, num_pictures, name)
    return unread


def _pictures(row: dict, name: str, config: HuggingFaceData) -> list[str | bytes]:
    """Encoded pictures of a row, or paths of files that stay inside the data set's folder."""
    given: list = []
    for key, value in row.items():
        if _is_picture_column(key):
            if value is not None and not isinstance(value, str):
                given += value if isinstance(value, list) else [value]
        elif shows_a_picture(value):
            detail = f"its column {key!r} holds a picture, but only {_known_columns()} are read; rename it."
            raise SkipSampleError(name, "picture in an unknown column", detail)
    pictures: list[str | bytes] = []
    for picture in given:
        if isinstance(picture, bytes):
            pictures.append(picture)
        elif isinstance(picture, Mapping) and picture.get("bytes"):
            pictures.append(picture["bytes"])
        elif isinstance(picture, Mapping) and picture.get("path") and Path(config.path).is_dir():
            try:
                pictures.append(str(inside(Path(config.path), picture["path"])))
            except ValueError as error:
                raise SkipSampleError(name, "picture outside its folder", str(error)) from error
        else:
            raise SkipSampleError(
                name, "missing file", f"a picture without bytes and without a file: {picture!r:.80}."
            )
    return pictures


def _check_no_picture_is_missing(row: dict, name: str) -> None:
    """Raise where a row without pictures tells that it should have one; an empty list says that it has none.

    Where turns have marks for their pictures, the marks say how many there should be.
    """
    named = {key: value for key, value in row.items() if _is_picture_column(key)}
    for key, value in named.items():
        if isinstance(value, str) and value:
            detail = f"its {key} is the text {value!r:.80}; the data set must hold the pictures themselves."
            raise SkipSampleError(name, "missing file", detail)
    has_marks = row.get("messages") or row.get("conversations")
    if not has_marks and any(not value and value != [] for value in named.values()):
        raise SkipSampleError(name, "missing file", f"its {', '.join(named)} is empty.")


def _turns(
    row: dict, name: str, num_pictures: int, config: HuggingFaceData
) -> tuple[list[tuple[str, str]] | None, str | None]:
    """Role and text of each turn, and the column they come from.

    Pictures go before the first question where nothing marks their places; LLaVA's `image` comes with marks.
    """
    key = next((key for key in CONVERSATIONS if row.get(key)), None)
    try:
        if key == "messages":
            turns = [(ROLES[message["role"]], _flat(message["content"], name)) for message in row[key]]
            return with_pictures_first(turns, num_pictures), key
        if key == "conversations":
            turns = [(ROLES[turn["from"]], turn["value"]) for turn in row[key]]
            is_beside = all(is_empty(value) for column, value in row.items() if _is_marked_column(column))
            return with_pictures_first(turns, num_pictures) if is_beside else turns, key
        if key == "texts":
            pairs = [[("user", turn["user"]), ("assistant", turn["assistant"])] for turn in row[key]]
            return with_pictures_first([turn for pair in pairs for turn in pair], num_pictures), key
    except (KeyError, TypeError) as error:
        raise SkipSampleError(name, "malformed", f"cannot read its conversation ({error!r}).") from error
    key = next((key for key in CAPTIONS if isinstance(row.get(key), str)), None)
    if key is None:
        return None, None
    return [("user", PICTURE_MARK * num_pictures + config.prompt), ("assistant", row[key])], key


def _is_marked_column(name: str) -> bool:
    """Whether pictures of a column have marks in LLaVA's turns."""
    return _is_picture_column(name) and name != "images"


def _flat(content: str | list[dict], name: str) -> str:
    """Text of a message, with a mark where an item stands for a picture."""
    if isinstance(content, str):
        return content
    films = [item["type"] for item in content if item["type"] in FILM_ITEMS]
    if films:
        raise SkipSampleError(name, FILM, f"a message has an item of the type {films[0]}.")
    return "".join(PICTURE_MARK if item["type"] == "image" else item["text"] for item in content)
