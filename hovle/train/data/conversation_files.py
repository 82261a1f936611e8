"""Files of conversations: ours (`messages`) and LLaVA's (`conversations`), read alike.

A file is a JSON list or JSON lines, in UTF-8. Of a row, the turns, `system`, the pictures beside them and `regions`
are read; `rows` says what becomes of other keys. A file that is not what it seems is refused; a row that cannot be
used is told of when it is drawn.
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files.documents import UnreadableError, parse_json
from ...files.fingerprints import at_even_distances, fingerprint_files
from .records import (
    CHAT_ROLES,
    PICTURE_MARK,
    ROLES,
    Record,
    check_marks,
    inside,
    messages_from_turns,
    picture_item,
    picture_items,
    picture_paths,
)
from .regions import REGIONS, read_regions
from .rows import (
    FILM_ITEMS,
    ITEM_KEYS,
    PICTURE_ITEMS,
    is_empty,
    item_picture,
    side_pictures,
    unread_keys,
    with_pictures_first,
    with_system,
)
from .skips import FILM, SkipSampleError, sparing_the_run

OTHER_ENCODINGS = ("gb18030", "cp1252")
"""What a file that is not in UTF-8 may be in, for its error."""


# --- the file --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entries:
    """What a file of rows holds."""

    items: list
    """Lines of JSON, or values of a list."""
    numbers: Sequence[int]
    """Of each, for its name: its line, or its place in the list from 1 on."""
    text: str
    """The whole file."""


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark, its line ends as `\\n`.

    Raises:
        ValueError: When it is no regular file, or in another encoding.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; expected a text file.")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not in UTF-8: line {line} has the byte 0x{data[error.start]:02x} (byte {error.start + 1} of "
            f"the file). It may be in {_encoding_of(data)}: convert it, for instance with "
            f"`iconv -f {_encoding_of(data)} -t UTF-8`."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _encoding_of(data: bytes) -> str:
    """What bytes that are no UTF-8 may be."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    for encoding in OTHER_ENCODINGS:
        with contextlib.suppress(UnicodeDecodeError):
            data.decode(encoding)
            return encoding.upper()
    return "ISO-8859-1"


def read_entries(path: Path, is_list: bool) -> Entries:
    """Read a file of rows; lines are not parsed yet.

    Args:
        path: The file.
        is_list: Whether it is one JSON document, or JSON lines.

    Raises:
        UnreadableError: When it is no JSON document.
        ValueError: When it holds a list where lines were expected, or as of `read_text`.
    """
    text = read_text(path)
    if is_list:
        items = parse_json(text, path)
        return Entries(items, range(1, len(items) + 1) if isinstance(items, list) else (), text)
    if text.lstrip().startswith("["):
        raise ValueError(
            f"{path} holds a JSON list, but each line of JSON lines is an object of its own: name it .json, or write "
            "one row a line."
        )
    lines = [(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]  # at line feeds only
    return Entries([line for line, _ in lines], [number for _, number in lines], text)


# --- our own format --------------------------------------------------------------------------------------------------

EXPECTED_CHAT = (
    'expected {"messages": [{"role": ..., "content": [{"type": "image", "path": ...}, '
    '{"type": "text", "text": ...}]}]}'
)

MESSAGE_KEYS = ("role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id")
"""Keys of a message that chat templates read."""


class PartlyUsable:
    """Records of which some are told of as skips when they are drawn."""

    def __init__(self, items: list[Record | SkipSampleError]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int, /) -> Record:
        item = self.items[place]
        if isinstance(item, SkipSampleError):
            raise item
        return item


def read_chats(path: Path) -> list[Record] | PartlyUsable:
    """Read rows `{"messages": [...]}`; relative picture paths are relative to the file and stay beside it.

    Raises:
        ValueError: When a row is malformed, shows a picture outside the folder, or there is none.
    """
    is_list = path.suffix == ".json" and read_text(path).lstrip().startswith("[")
    try:
        entries = read_entries(path, is_list)
    except UnreadableError as error:
        raise ValueError(f"{path.name}:1: {EXPECTED_CHAT}, in a list or one a line ({error}).") from error
    records: list[Record | SkipSampleError] = []
    for entry, number in zip(entries.items, entries.numbers, strict=True):
        try:
            records.append(_chat_record(entry, f"{path.name}:{number}", path.parent))
        except SkipSampleError as error:
            records.append(error)
    if not records:
        raise ValueError(f"{path} holds no conversations.")
    usable = [record for record in records if isinstance(record, Record)]
    return usable if len(usable) == len(records) else PartlyUsable(records)


def _chat_record(entry: Any, name: str, folder: Path) -> Record:
    """Record of a row; SkipSampleError where it is about what cannot be shown, ValueError where it is malformed."""
    try:
        row = parse_json(entry, name) if isinstance(entry, str) else entry
        fault = _chat_fault(row, name)
    except (UnreadableError, KeyError, TypeError, AttributeError) as error:
        fault = repr(error)
    if fault:
        raise ValueError(f"{name}: {EXPECTED_CHAT}, found {str(entry)[:80]!r} ({fault}).")
    messages = row["messages"]
    for message in messages:
        for item in message["content"] if isinstance(message["content"], list) else []:
            _resolve_picture(item, folder, name)
    side = [str(inside(folder, picture)) for picture in side_pictures(row, ("images", "image"), name)]
    if side:
        messages = _with_side_pictures(messages, side, name)
    else:
        check_marks((text for message in messages if message["role"] == "user" for text in _texts(message)), name)
    first = [(message["role"], "".join(_texts(message))) for message in messages[:1]]
    added = [{"role": role, "content": text} for role, text in with_system(first, row, name)[:-1]]
    unread, regions = _unread_chat_keys(row, messages, name), read_regions(row, len(picture_items(messages)), name)
    return Record(name, added + messages, unread=unread, regions=regions)


def _resolve_picture(item: dict, folder: Path, name: str) -> None:
    """Let an item that holds a picture name its file in full, or hold its bytes."""
    picture = item_picture(item, name) if item["type"] in PICTURE_ITEMS else None
    if picture is not None:
        for key in ITEM_KEYS:
            item.pop(key, None)
        item |= picture_item(picture if isinstance(picture, bytes) else inside(folder, str(picture)))


def _unread_chat_keys(row: Mapping, messages: list[dict], name: str) -> tuple[str, ...]:
    num_pictures = len(picture_items(messages))
    unread = unread_keys(row, ("messages", "images", "image", "system", REGIONS), num_pictures, name)
    for message in messages:
        unread += unread_keys(message, MESSAGE_KEYS, num_pictures, name)
        for item in message["content"] if isinstance(message["content"], list) else []:
            unread += unread_keys(item, ("type", "text", "path", "image"), num_pictures, name)
    return unread


def _chat_fault(row: Any, name: str) -> str | None:
    """What is wrong with a row of a chat file, None where nothing is; SkipSampleError where it shows a film."""
    messages, has_side_pictures = row["messages"], not all(is_empty(row.get(key)) for key in ("images", "image"))
    if not isinstance(messages, list) or not messages:
        return "messages is no list with a message in it"
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in CHAT_ROLES:
            return f"role {role!r} is none of {', '.join(CHAT_ROLES)}"
        for item in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            if item["type"] in FILM_ITEMS:
                raise SkipSampleError(name, FILM, f"a message has an item of the type {item['type']}.")
            if item["type"] in PICTURE_ITEMS:
                fault = _picture_fault(item, has_side_pictures, name)
                if fault:
                    return fault
            elif item["type"] != "text":
                return f"an item's type {item['type']!r} is neither image nor text"
            elif not isinstance(item["text"], str):
                return f"text {item['text']!r:.40} is no text"
    return None


def _picture_fault(item: dict, has_side_pictures: bool, name: str) -> str | None:
    """What is wrong with an item that stands for a picture, which may lie beside the messages."""
    try:
        picture = item_picture(item, name)
    except SkipSampleError as error:
        return error.detail
    if isinstance(picture, str | bytes) or (picture is None and has_side_pictures):
        return None
    return f"path {item.get('path')!r:.40} is no text"


def _texts(message: Mapping) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [item["text"] for item in content if item["type"] == "text"]


def _with_side_pictures(messages: list[dict], pictures: list[str], name: str) -> list[dict]:
    """Messages with the pictures beside them at their marks or at items without a path, else before the question."""
    if any("path" in item or "image" in item for item in picture_items(messages)):
        detail = "pictures stand both in its messages and beside them."
        raise SkipSampleError(name, "picture count", detail)
    turns = [(message["role"], _with_marks(message["content"])) for message in messages]
    placed = messages_from_turns(name, with_pictures_first(turns, len(pictures)), pictures)
    return [{**message, **shown} for message, shown in zip(messages, placed, strict=True)]


def _with_marks(content: str | list[dict]) -> str:
    if isinstance(content, str):
        return content
    return "".join(PICTURE_MARK if item["type"] == "image" else item["text"] for item in content)


# --- LLaVA's format --------------------------------------------------------------------------------------------------


class LlavaRecords:
    """Conversations `{"image": ..., "conversations": [{"from": "human", "value": "<image>..."}, ...]}`.

    Pictures named by `images`, a list beside the turns, stand before the first question where no turn has a mark.

    Args:
        path: JSON (one list) or JSON lines; lines are parsed when they are drawn.
        folder: Picture paths are relative to it and may not leave it.
    """

    def __init__(self, path: Path, folder: Path):
        self.name, self.folder = path.name, folder
        try:
            entries = read_entries(path, is_list=path.suffix != ".jsonl")
        except UnreadableError as error:
            raise ValueError(f"{path} is no JSON ({error}); JSON lines are named .jsonl.") from error
        self._text_digest = hashlib.sha256(entries.text.encode())
        self.entries, self.numbers = entries.items, entries.numbers
        if not isinstance(self.entries, list) or not self.entries:
            raise ValueError(f"{path} must hold a list of conversations, found {entries.text[:40]!r}.")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Short hash of the text and of the pictures of so many conversations as are looked into."""
        digest = self._text_digest.copy()
        digest.update(fingerprint_files(picture_paths(self._readable()), self.folder.resolve()).encode())
        return digest.hexdigest()[:16]

    def _readable(self) -> Iterator[Record]:
        for place in at_even_distances(range(len(self.entries))):
            with contextlib.suppress(SkipSampleError):
                yield self[place]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, place: int, /) -> Record:
        name = f"{self.name}:{self.numbers[place]}"
        with sparing_the_run(name):
            return self._read(self.entries[place], name)

    def _read(self, entry: Any, name: str) -> Record:
        try:
            entry = parse_json(entry, name) if isinstance(entry, str) else entry
            turns = [(ROLES[turn["from"]], turn["value"]) for turn in entry["conversations"]]
            names = side_pictures(entry, ("image", "images"), name)
            paths = [str(inside(self.folder, picture)) for picture in names]
        except SkipSampleError:
            raise
        except (UnreadableError, KeyError, TypeError, AttributeError) as error:
            expected = '{"image": ..., "conversations": [{"from": "human" or "gpt", "value": ...}]}'
            detail = f"expected {expected}, found {str(entry)[:80]!r} ({error!r})."
            raise SkipSampleError(name, "malformed", detail) from error
        except ValueError as error:
            raise SkipSampleError(name, "picture outside its folder", str(error)) from error
        if is_empty(entry.get("image")):  # LLaVA's own key comes with marks
            turns = with_pictures_first(turns, len(paths))
        read = ("conversations", "image", "images", "system", REGIONS)
        unread = unread_keys(entry, read, len(paths), name)
        for turn in entry["conversations"]:
            unread += unread_keys(turn, ("from", "value"), len(paths), name)
        messages = messages_from_turns(name, with_system(turns, entry, name), paths)
        return Record(name, messages, unread=unread, regions=read_regions(entry, len(paths), name))
