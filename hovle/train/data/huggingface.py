"""Sources read by Hugging Face `datasets`: parquet, tars of WebDataset, picture folders, data sets of the Hub.

A row needs no fixed columns; it may hold

- pictures: `image` or `images`, members of a tar with a picture's suffix, or items of its messages;
- a conversation: `messages` (role, content), `conversations` (from, value) or `texts` (user, assistant), also as JSON
  in a text or inside a member `.json`; a question and its reply (`QUESTIONS`); or a caption: `text`, `caption` or a
  member `.txt`, the reply to `data.prompt`. `data.columns` says which columns these are where they have other names;
- `regions` of its first picture.

Pictures stay encoded until their batch is packed. Of a tar, pictures, JSON and text are decoded and nothing else.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files.documents import UnreadableError, parse_json
from ...files.fingerprints import fingerprint_files
from ..config import HuggingFaceData
from .local_files import LocalFiles, check_beginnings, find_files, origin_of
from .records import PICTURE_MARK, PICTURE_SUFFIXES, ROLES, Record, conversation, inside, messages_from_turns
from .regions import REGIONS, read_regions
from .rows import (
    FAULT,
    FILM_ITEMS,
    LEFT,
    MEMBERS,
    PICTURE_ITEMS,
    is_empty,
    item_picture,
    shows_a_picture,
    unread_keys,
    with_pictures_first,
    with_system,
)
from .skips import FILM, SkipSampleError, sparing_the_run

CONVERSATIONS = ("messages", "conversations", "texts")
"""Columns that hold a conversation."""

TURN_KEYS = ("role", "content", "name", "from", "value", "user", "assistant", "source")
"""Keys of the turns of a conversation that are read or harmless."""

QUESTIONS = {"question": "answer", "prompt": "completion", "query": "response"}
"""Columns that hold a question -> those that hold its reply; both are text, or messages."""

CAPTIONS = ("caption", "text", "txt")
"""Columns that hold a caption."""

PICTURES = ("image", "images")
"""Columns that hold pictures, beside members with a picture's suffix."""


@dataclass(frozen=True)
class OpenedDataset:
    """A data set as it is read."""

    rows: Any
    """Rows by number, or a stream of `datasets`."""
    fingerprint: str
    """Short hash of what it is made of."""
    left_aside: list[str]
    """What of its folder is not read."""


def open_dataset(config: HuggingFaceData) -> OpenedDataset:
    """Open a data set, map-style or as a stream, with its pictures left encoded.

    Raises:
        ValueError: When there is nothing to read, when files are not what their names say, or where columns have names
            nobody reads.
    """
    local = find_files(config)
    if local is None:
        return _open_builder(_hub_builder(config), config, config.split or "train", None)
    if local.layout == "imagefolder":
        return _open_folder(local, config)
    if local.layout == "saved":
        return _open_saved(local, config)
    check_beginnings(local, config.label)
    return _open_builder(_local_builder(local), config, local.split, local)


def _hub_builder(config: HuggingFaceData) -> Any:
    from datasets import load_dataset_builder  # an extra: other sources do without it
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    builder = load_dataset_builder(config.path, config.subset, revision=config.revision)
    if not isinstance(builder, WebDataset):
        return builder
    from .tars import Tars

    return Tars(data_files=builder.config.data_files, hash=builder.hash)


def _local_builder(local: LocalFiles) -> Any:
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules.parquet.parquet import Parquet

    from .tars import Tars

    splits = {
        name: DataFilesList([str(file.absolute()) for file in files], [origin_of(file) for file in files])
        for name, files in local.splits.items()
    }
    return {"parquet": Parquet, "webdataset": Tars}[local.layout](data_files=DataFilesDict(splits))


def _open_builder(builder: Any, config: HuggingFaceData, split: str, local: LocalFiles | None) -> OpenedDataset:
    if not config.streaming:
        _prepare(builder, config)
    try:
        dataset = (builder.as_streaming_dataset if config.streaming else builder.as_dataset)(split=split)
    except ValueError as error:  # an unknown split, whose names it tells
        raise ValueError(f"{config.label}: {error}") from error
    commit = None if local else builder.hash
    return _opened(dataset, config, _fingerprint(config, dataset, commit), local)


def _prepare(builder: Any, config: HuggingFaceData) -> None:
    """Write the rows to the cache of `datasets`."""
    from datasets.exceptions import DatasetGenerationError

    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        raise ValueError(f"{config.label}: `datasets` cannot prepare its rows ({error.__cause__!r:.300}).") from error


def _open_saved(local: LocalFiles, config: HuggingFaceData) -> OpenedDataset:
    """What `save_to_disk` wrote: a data set, or one for each split."""
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(config.path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{config.label}: {config.path} cannot be read as what save_to_disk wrote: {error}"
        ) from error
    left_aside = local.left_aside
    if isinstance(dataset, DatasetDict):
        splits = dataset
        name = config.split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
        if name not in splits:
            raise ValueError(f"data.split: {config.path} has no split {name!r}; it has {', '.join(splits)}.")
        dataset = splits[name]
        others = [f"{other} ({len(part):,} rows)" for other, part in splits.items() if other != name]
        left_aside = [*left_aside, *([f"left aside the splits {', '.join(others)}"] if others else [])]
    if config.streaming:
        dataset = dataset.to_iterable_dataset(num_shards=max(1, min(len(dataset), len(dataset.cache_files))))
    opened = _opened(dataset, config, _fingerprint(config, dataset, None), local)
    return OpenedDataset(opened.rows, opened.fingerprint, left_aside)


def _open_folder(local: LocalFiles, config: HuggingFaceData) -> OpenedDataset:
    """Pictures with what lies beside them."""
    from datasets import IterableDataset

    from .picture_folder import FolderRows

    rows = FolderRows(local, config)
    left_aside = [*local.left_aside, *rows.left_aside]
    if not rows:
        raise ValueError(f"{config.label}: {config.path} holds no picture to read. {' '.join(left_aside)}")
    fingerprint = _fingerprint(config, rows, None)
    if not config.streaming:
        return OpenedDataset(rows, fingerprint, left_aside)
    places = {"rows": rows, "places": list(range(len(rows)))}  # a list is dealt out to shards
    return OpenedDataset(IterableDataset.from_generator(_rows_at, gen_kwargs=places), fingerprint, left_aside)


def _rows_at(rows: Sequence[dict], places: list[int]) -> Iterator[dict]:
    for place in places:
        yield rows[place]


def _opened(dataset: Any, config: HuggingFaceData, fingerprint: str, local: LocalFiles | None) -> OpenedDataset:
    """A data set whose pictures, sounds and videos are left as they are stored.

    Raises:
        ValueError: Where a column of pictures has a name nobody reads, or none of the columns is read.
    """
    features = dataset.features or {}
    _check_columns(features, config)
    if not config.streaming:
        dataset = _Stored(dataset)
    elif features:
        dataset = dataset.decode(False)
    return OpenedDataset(dataset, fingerprint, local.left_aside if local else [])


class _Stored(Sequence[dict]):
    """Rows of a map-style data set as they are stored, nothing decoded."""

    def __init__(self, dataset: Any):
        self.dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Any) -> Any:
        if place >= len(self):
            raise IndexError(place)
        [row] = self.dataset[place : place + 1].to_pylist()
        return row


def _check_columns(features: Mapping, config: HuggingFaceData) -> None:
    """Raise where columns that a recipe names are not there, or where those that are there are not read."""
    if not features or MEMBERS in features:
        return
    found = ", ".join(features)
    absent = [name for name in config.columns.values() if name not in features]
    if absent:
        raise ValueError(f"{config.label}: data.columns names {absent[0]!r}, but the columns are: {found}.")
    read = {*config.columns.values(), *CONVERSATIONS, *QUESTIONS, *CAPTIONS, "json"}
    for name, feature in features.items():
        if _holds_pictures(feature) and not (name in read or _is_picture_column(name) or "image" in config.columns):
            raise ValueError(
                f"{config.label}: its column {name!r} holds pictures, but only {_known_columns()} are read. Name "
                f"it in the recipe, `columns: {{image: {name}}}`, or write the data set without it."
            )
    if not any(name in read or _is_picture_column(name) for name in features):
        raise ValueError(
            f"{config.label}: none of its columns is read: {found}. Say in data.columns what they are, for instance "
            "{image: NAME, question: NAME, answer: NAME} or {image: NAME, caption: NAME}."
        )


def _holds_pictures(feature: Any) -> bool:
    """Whether a feature of `datasets` is a picture, or a list or structure with one in it."""
    from datasets import Image

    if isinstance(feature, Mapping):
        return any(map(_holds_pictures, feature.values()))
    if isinstance(feature, list | tuple):
        return any(map(_holds_pictures, feature))
    return isinstance(feature, Image) or _holds_pictures(getattr(feature, "feature", ()))


def _is_picture_column(name: str) -> bool:
    return name in PICTURES or f".{name.rpartition('.')[2].lower()}" in PICTURE_SUFFIXES


def _known_columns() -> str:
    return f"{', '.join(PICTURES)} and members of a tar named {', '.join(PICTURE_SUFFIXES)}"


def _fingerprint(config: HuggingFaceData, dataset: Any, commit: str | None) -> str:
    """Short hash of local files, or of a Hub id with its commit; of columns, and of rows if known."""
    path = Path(config.path)
    files = sorted(path.rglob("*")) if path.is_dir() else sorted(path.parent.glob(path.name))
    if commit is None:
        made_of = fingerprint_files([file for file in files if file.is_file()], path if path.is_dir() else path.parent)
    else:
        made_of = config.path
    rows = None if config.streaming else len(dataset)
    features = getattr(dataset, "features", None) or {}
    parts = (made_of, config.subset, config.split, sorted(features), rows, *sorted(config.columns.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16] + (f"@{commit}" if commit else "")


class DatasetRecords:
    """A map-style data set."""

    def __init__(self, config: HuggingFaceData):
        self.config = config
        opened = open_dataset(config)
        self.dataset, self.fingerprint, self.left_aside = opened.rows, opened.fingerprint, opened.left_aside

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
        opened = open_dataset(config)
        self.dataset, self.fingerprint, self.left_aside = opened.rows, opened.fingerprint, opened.left_aside

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
            self.dataset.load_state_dict(parse_json(state["dataset"], "the data's place in a checkpoint"))
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
    name = f"{name} ({row['__key__']})" if "__key__" in row else name
    if row.get(FAULT):
        raise SkipSampleError(name, "malformed", f"{row[FAULT]}.")
    left = tuple(row.get(LEFT) or ())
    row = _renamed(_with_members(row, name), config, name)
    beside = _pictures(row, name, config)
    turns, read, inside_turns = _turns(row, name, len(beside), config)
    if beside and inside_turns:
        raise SkipSampleError(name, "picture count", "pictures stand both in its messages and beside them.")
    pictures = beside + [_source(picture, name, config) for picture in inside_turns]
    if not pictures:
        _check_no_picture_is_missing(row, name)
    unread = (*_unread(row, read, len(pictures), name, config), *left)
    regions = read_regions(row, len(pictures), name)
    if turns is None and len(pictures) == 1:
        return Record(name, conversation(pictures[0], "", ""), unread=unread, regions=regions)
    if turns is None:
        columns = ", ".join(key for key, value in row.items() if value is not None)
        raise SkipSampleError(
            name, "malformed", f"expected a conversation, a caption or one picture, found {columns}."
        )
    messages = messages_from_turns(name, with_system(turns, row, name), pictures)
    return Record(name, messages, unread=unread, regions=regions)


def pictures_of_row(row: dict, name: str, config: HuggingFaceData) -> list[str | bytes]:
    """Encoded pictures that stand in columns of a row, or the paths of their files, whatever else the row holds.

    Raises:
        SkipSampleError: Where there are none, or where they cannot be had.
    """
    if row.get(FAULT):
        raise SkipSampleError(name, "malformed", f"{row[FAULT]}.")
    pictures = _pictures(_renamed(_with_members(row, name), config, name), name, config)
    if not pictures:
        raise SkipSampleError(name, "no picture", f"its columns hold no picture; read are {_known_columns()}.")
    return pictures


def _with_members(row: dict, name: str) -> dict:
    """A row with the members of a tar as its columns, named by what follows the row's name, and those of its JSON."""
    if MEMBERS in row:
        members = {member["name"]: member["data"] for member in row[MEMBERS]}
        if len(members) < len(row[MEMBERS]):
            raise SkipSampleError(name, "malformed", f"its tar holds a member twice: {', '.join(members)}.")
        columns = {member.removeprefix(row["__key__"] + ".").lower(): data for member, data in members.items()}
        row = {
            key: _decoded(key, data, f"{row['__key__']}.{key} of {row['__url__'].rpartition('/')[2]}", name)
            for key, data in columns.items()
        }
    member = row.get("json")
    if not isinstance(member, Mapping):
        return row
    return {**member, **{key: value for key, value in row.items() if key != "json"}}


def _decoded(column: str, data: bytes | None, member: str, name: str) -> Any:
    """What a member of a tar says: bytes of a picture, JSON, text, or its name where it is not read."""
    suffix = column.rpartition(".")[2].lower()
    if data is None:
        return member
    if suffix not in ("json", "txt"):
        return data
    try:
        return parse_json(data, member) if suffix == "json" else data.decode("utf-8-sig")
    except ValueError as error:
        raise SkipSampleError(name, "malformed", f"{member} cannot be decoded ({error}).") from error


def _renamed(row: dict, config: HuggingFaceData, name: str) -> dict:
    """A row with the names that the recipe gives to its columns; columns that had these are not read."""
    if not config.columns:
        return row
    absent = [theirs for theirs in config.columns.values() if theirs not in row]
    if absent:
        raise SkipSampleError(name, "malformed", f"it has no column {absent[0]!r}, its columns are: {', '.join(row)}.")
    given = {ours: row[theirs] for ours, theirs in config.columns.items()}
    taken = {*config.columns.values()}
    rest = {(f"{key} (not read)" if key in given else key): value for key, value in row.items() if key not in taken}
    return {**given, **rest}


def _unread(
    row: dict, read: tuple[str, ...], num_pictures: int, name: str, config: HuggingFaceData
) -> tuple[str, ...]:
    """Keys of a row, and of the turns it was read from, that nobody reads; see `rows`."""
    known = [key for key in row if _is_picture_column(key) or key in (*read, "system", REGIONS, FAULT, LEFT)]
    if "image" in config.columns:  # the recipe has chosen among the pictures
        known += [key for key, value in row.items() if shows_a_picture(value)]
    is_caption = bool({*read} & {*CAPTIONS})
    unread = unread_keys(row, known, num_pictures, name, is_caption=is_caption)
    for turn in _parsed(row[read[0]], name) if read and read[0] in CONVERSATIONS else []:
        unread += unread_keys(turn, TURN_KEYS, num_pictures, name)
    return unread


def _pictures(row: dict, name: str, config: HuggingFaceData) -> list[str | bytes]:
    """Encoded pictures of a row, or paths of files that stay inside the data set's folder."""
    given: list = []
    texts: list[str] = []
    is_chosen = "image" in config.columns
    for key, value in row.items():
        if key == "image" if is_chosen else _is_picture_column(key):
            items = value if isinstance(value, list | tuple) else [value]
            texts += [item for item in items if isinstance(item, str)]
            given += [item for item in items if not isinstance(item, str)] if value is not None else []
        elif shows_a_picture(value) and not is_chosen:
            detail = f"its column {key!r} holds a picture, but only {_known_columns()} are read; rename it."
            raise SkipSampleError(name, "picture in an unknown column", detail)
    if not given:  # of a tar's row, the picture itself is another member
        given = [{"path": text} for text in texts if _is_file(text, config)]
    return [_source(picture, name, config) for picture in given]


def _is_file(name: str, config: HuggingFaceData) -> bool:
    """Whether a text is the name of a file in the data set's folder."""
    try:
        return bool(name) and len(name) < 1000 and inside(_folder(config), name).is_file()
    except (ValueError, OSError):
        return False


def _folder(config: HuggingFaceData) -> Path:
    path = Path(config.path)
    return path if path.is_dir() else path.parent


def _source(picture: Any, name: str, config: HuggingFaceData) -> str | bytes:
    """Bytes of a picture that a row holds, or its path inside the data set's folder."""
    if isinstance(picture, str):
        picture = {"path": picture}
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, Mapping) and picture.get("bytes"):
        return picture["bytes"]
    if isinstance(picture, Mapping) and picture.get("path") and Path(config.path).exists():
        try:
            return str(inside(_folder(config), picture["path"]))
        except ValueError as error:
            raise SkipSampleError(name, "picture outside its folder", str(error)) from error
    raise SkipSampleError(name, "missing file", f"a picture without bytes and without a file: {picture!r:.80}.")


def _check_no_picture_is_missing(row: dict, name: str) -> None:
    """Raise where a row without pictures tells that it should have one; an empty list says that it has none.

    Where turns have marks for their pictures, the marks say how many there should be.
    """
    named = {key: value for key, value in row.items() if _is_picture_column(key)}
    for key, value in named.items():
        if isinstance(value, str) and value:
            detail = f"its {key} is the text {value!r:.80}; the data set must hold the pictures themselves."
            raise SkipSampleError(name, "missing file", detail)
        if isinstance(value, list) and any(isinstance(item, str) and item for item in value):
            detail = f"its {key} are the texts {value!r:.80}; the data set must hold the pictures themselves."
            raise SkipSampleError(name, "missing file", detail)
    has_marks = row.get("messages") or row.get("conversations")
    if not has_marks and any(not value and value != [] for value in named.values()):
        raise SkipSampleError(name, "missing file", f"its {', '.join(named)} is empty.")


def _parsed(value: Any, name: str) -> Any:
    """A column, which may hold a list as JSON in a text."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return parse_json(value, "its conversation")
    except UnreadableError as error:
        raise SkipSampleError(name, "malformed", f"{error}.") from error


Turns = list[tuple[str, str]]


def _turns(
    row: dict, name: str, num_pictures: int, config: HuggingFaceData
) -> tuple[Turns | None, tuple[str, ...], list]:
    """Role and text of each turn, the columns they come from, and pictures that stand in them.

    Pictures go before the first question where nothing marks their places; LLaVA's `image` comes with marks.
    """
    named = {*config.columns} - {"image", "system"}  # the recipe has chosen among the columns
    shown: list = []
    try:
        key = next((key for key in CONVERSATIONS if row.get(key) and (not named or key in named)), None)
        if key is not None:
            turns = _turns_of(key, _parsed(row[key], name), name, shown)
            is_marked = key == "conversations" and not all(
                is_empty(value) for column, value in row.items() if _is_marked_column(column)
            )
            return turns if is_marked else with_pictures_first(turns, num_pictures), (key,), shown
        for asked, answered in QUESTIONS.items():
            has_both = not is_empty(row.get(asked)) and not is_empty(row.get(answered))
            if has_both and (not named or {asked, answered} <= named):
                turns = [
                    *_said("user", row[asked], name, shown),
                    *_said("assistant", row[answered], name, shown),
                ]
                return with_pictures_first(turns, num_pictures), (asked, answered), shown
    except (KeyError, TypeError, AttributeError) as error:
        raise SkipSampleError(name, "malformed", f"cannot read its conversation ({error!r}).") from error
    key = next((key for key in CAPTIONS if isinstance(row.get(key), str) and (not named or key in named)), None)
    if key is None:
        return None, (), []
    return [("user", PICTURE_MARK * num_pictures + config.prompt), ("assistant", row[key])], (key,), []


def _turns_of(key: str, given: Any, name: str, shown: list) -> Turns:
    """Turns of a conversation; `shown` takes the pictures in them."""
    if key == "messages":
        return [(ROLES[message["role"]], _flat(message["content"], name, shown)) for message in given]
    if key == "conversations":
        return [(ROLES[turn["from"]], turn["value"]) for turn in given]
    pairs = [[("user", turn["user"]), ("assistant", turn["assistant"])] for turn in given]
    return [turn for pair in pairs for turn in pair]


def _said(role: str, given: Any, name: str, shown: list) -> Turns:
    """Turns of a question or a reply: a text, a list with one, or messages."""
    given = _parsed(given, name) if role == "user" else given
    if isinstance(given, str):
        return [(role, given)]
    if isinstance(given[0], str) and len(given) == 1:
        return [(role, given[0])]
    return _turns_of("messages", given, name, shown)


def _is_marked_column(name: str) -> bool:
    """Whether pictures of a column have marks in LLaVA's turns."""
    return _is_picture_column(name) and name != "images"


def _flat(content: str | list[dict], name: str, shown: list) -> str:
    """Text of a message, with a mark where an item stands for a picture; `shown` takes those that items hold."""
    if isinstance(content, str):
        return content
    films = [item["type"] for item in content if item["type"] in FILM_ITEMS]
    if films:
        raise SkipSampleError(name, FILM, f"a message has an item of the type {films[0]}.")
    pieces = []
    for item in content:
        is_picture = item["type"] in PICTURE_ITEMS
        pieces.append(PICTURE_MARK if is_picture else item["text"])
        held = item_picture(item, name) if is_picture else None
        shown += [] if held is None else [held]
    return "".join(pieces)
