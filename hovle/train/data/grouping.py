"""Grouping: conversations about the same pictures share a sample, where each sees the pictures and itself only.

Two conversations can share when all that stands up to their last picture is equal, pictures and text, and no reply
stands before it. Conversations without pictures stay alone, and so do those that show a picture after a reply.

- Of a source that is read by number, all conversations that can share are put together, `size` of them at a time in
  the order in which they stand. Which groups there are depends on the source alone; when each comes, like every
  record's turn, on the seed and the stream index.
- Of a stream, neighbours are put together: one row more than the group is read, and read again after resuming.
"""

import hashlib
from array import array
from collections import deque
from collections.abc import Iterable

import numpy as np

from .records import Record, RecordCursor, Records, RecordStream, picture_items, until_last_reply
from .skips import SkipSampleError


def share_pictures(records: Records | RecordStream, size: int, independent_turns: bool) -> Records | RecordStream:
    """Group the conversations of a source.

    Args:
        records: The source; where it is no stream, all of it is read once to find equal pictures.
        size: Most conversations of a group; 1: each stays alone.
        independent_turns: Whether every question of a record with its reply is a conversation of its own.
    """
    if isinstance(records, RecordStream):
        return GroupedStream(records, size, independent_turns)
    return GroupedRecords(records, size, independent_turns)


def sharing_key(messages: list[dict]) -> bytes | None:
    """Equal for conversations that can share their pictures; None for one that cannot.

    Pictures are compared by their path, or by the bytes of their file where it is embedded.
    """
    messages = until_last_reply(messages)
    replies = (number for number, message in enumerate(messages) if message["role"] == "assistant")
    shown = [number for number, message in enumerate(messages) if picture_items([message])]
    if not shown or shown[-1] >= next(replies):
        return None
    *before, asked = messages[: shown[-1] + 1]
    beginning = [*before, {**asked, "content": _split_after_pictures(asked)[0]}]
    parts = [(message["role"], [_identity(item) for item in _items(message)]) for message in beginning]
    return hashlib.sha256(repr(parts).encode()).digest()


def _items(message: dict) -> list[dict]:
    """Content of a message as a list of items."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _split_after_pictures(message: dict) -> tuple[list[dict], list[dict]]:
    """Items of a message up to its last picture, and those after it."""
    items = _items(message)
    end = max((place + 1 for place, item in enumerate(items) if item["type"] == "image"), default=0)
    return items[:end], items[end:]


def _identity(item: dict) -> str | bytes | tuple[str]:
    """What tells an item from another one: a text, the path of a picture, the hash of its bytes."""
    if item["type"] == "text":
        return item["text"]
    return (item["path"],) if "path" in item else hashlib.sha256(item["image"]).digest()


# --- independent turns -----------------------------------------------------------------------------------------------


def split_turns(record: Record) -> list[Record]:
    """The questions of a record, each with its reply and the pictures of the first one before it.

    A system message stands before every question; a line break between pictures and first question before every
    question, too.

    Raises:
        SkipSampleError: When turns do not alternate, or it is not clear which pictures a question is about.
    """
    messages = record.messages
    num_system = sum(message["role"] == "system" for message in messages[:1])
    system, turns = messages[:num_system], messages[num_system:]
    if sum(message["role"] == "assistant" for message in turns) < 2:
        return [record]
    if any(message["role"] != ("user", "assistant")[place % 2] for place, message in enumerate(turns)):
        raise _not_independent(record, "they do not go from user to assistant and back")
    if picture_items(turns[1:]):
        raise _not_independent(record, "a later one shows a picture of its own")
    pictures, rest = _pictures_first(record, turns[0])
    space = _leading_space(rest)
    pairs = []
    for start in range(0, len(turns) - 1, 2):
        asked = rest if start == 0 else _with_space(space, _items(turns[start]))
        question = {"role": "user", "content": [*pictures, *asked]} if pictures else turns[start]
        end = start + 2 if start + 3 < len(turns) else len(turns)  # what follows the last reply stays with it
        name = f"{record.name} question {start // 2 + 1}"
        unread = record.unread if start == 0 else ()  # counted once
        shown = [*system, question, *turns[start + 1 : end]]
        pairs.append(Record(name, shown, unread=unread, regions=record.regions))
    return pairs


def _not_independent(record: Record, why: str) -> SkipSampleError:
    detail = f"independent_turns: its turns cannot be told apart, {why}; keep such conversations in another source."
    return SkipSampleError(record.name, "turns not independent", detail)


def _pictures_first(record: Record, question: dict) -> tuple[list[dict], list[dict]]:
    """Pictures of a question and its text, which may also stand before the pictures, but not between them."""
    beginning, rest = _split_after_pictures(question)
    kinds = [item["type"] for item in beginning if item["type"] == "image" or item["text"].strip()]
    if "text" not in kinds:
        return beginning, rest
    if "text" in kinds[kinds.index("image") :] or any(item["text"].strip() for item in rest):
        raise _not_independent(record, "the first question has text before and between or after its pictures")
    pictures = [item for item in beginning if item["type"] == "image"]
    text = "".join(item["text"] for item in beginning if item["type"] == "text")
    stripped = text.rstrip()
    return pictures, [{"type": "text", "text": text[len(stripped) :] + stripped}]


def _leading_space(items: list[dict]) -> str:
    text = items[0]["text"] if items else ""
    return text[: len(text) - len(text.lstrip())]


def _with_space(space: str, items: list[dict]) -> list[dict]:
    first, *others = items
    return [{**first, "text": space + first["text"]}, *others]


# --- sources ---------------------------------------------------------------------------------------------------------


def _conversations(record: Record, independent_turns: bool) -> list[Record]:
    return split_turns(record) if independent_turns else [record]


class GroupedRecords:
    """A source read by number whose conversations share their pictures; arguments as of `share_pictures`."""

    def __init__(self, records: Records, size: int, independent_turns: bool):
        self.records, self.independent_turns = records, independent_turns
        self.left_aside = getattr(records, "left_aside", [])
        rows, numbers, groups = array("q"), array("q"), array("q")
        open_groups: dict[bytes, tuple[int, int]] = {}  # key -> number of the group that has room, and its members
        num_groups = 0
        for row in range(len(records)):
            for number, key in enumerate(self._keys(row)):
                group, num_members = open_groups.get(key, (num_groups, 0)) if key else (num_groups, 0)
                num_groups += num_members == 0
                if key:
                    open_groups[key] = (group, num_members + 1)
                if key and num_members + 1 == size:
                    del open_groups[key]
                rows.append(row)
                numbers.append(number)
                groups.append(group)
        order = np.argsort(groups, kind="stable")
        self._rows, self._numbers = np.asarray(rows)[order], np.asarray(numbers)[order]
        self._starts = np.searchsorted(np.asarray(groups)[order], np.arange(num_groups + 1))

    def _keys(self, row: int) -> list[bytes | None]:
        """A key for each conversation of a row, which may turn out not to be usable."""
        try:
            return [sharing_key(item.messages) for item in _conversations(self.records[row], self.independent_turns)]
        except SkipSampleError:
            return [None]

    @property
    def num_conversations(self) -> int:
        """Conversations of all records."""
        return len(self._rows)

    @property
    def has_branches(self) -> bool:
        """Whether a record holds several conversations."""
        return self.num_conversations > len(self)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, place: int, /) -> Record:
        members = range(int(self._starts[place]), int(self._starts[place + 1]))
        rows = {int(self._rows[member]): None for member in members}
        read = {row: _conversations(self.records[row], self.independent_turns) for row in rows}
        return Record.join([read[int(self._rows[member])][int(self._numbers[member])] for member in members])


class GroupedStream:
    """A stream whose neighbouring conversations share their pictures; arguments as of `share_pictures`."""

    def __init__(self, records: RecordStream, size: int, independent_turns: bool):
        self.records, self.size, self.independent_turns = records, size, independent_turns
        self.fingerprint = records.fingerprint
        self.left_aside = getattr(records, "left_aside", [])
        self.has_branches = size > 1

    def open_shard(self, shard: int, num_shards: int, seed: int, state: dict | None) -> "GroupedCursor":
        """Read the share of one of `num_shards` readers, from its beginning or from a state of its cursor."""
        state = dict(state or {})
        num_given = state.pop("num_given", 0)
        cursor = self.records.open_shard(shard, num_shards, seed, state or None)
        return GroupedCursor(cursor, self.size, self.independent_turns, num_given)


class GroupedCursor:
    """Reads groups of neighbours.

    Args:
        cursor: Reads rows.
        size: Most conversations of a group.
        independent_turns: Whether every question of a row is a conversation of its own.
        num_given: Conversations of the next row that were given before.
    """

    def __init__(self, cursor: RecordCursor, size: int, independent_turns: bool, num_given: int):
        self.cursor, self.size, self.independent_turns = cursor, size, independent_turns
        self.epoch = cursor.epoch
        self._waiting: deque[tuple[tuple, Record | SkipSampleError]] = deque()  # what is left of the row read last
        self._row_state: dict = {}
        self._num_given = 0
        if num_given:
            self._read_row()
            self._waiting = deque(list(self._waiting)[num_given:])
            self._num_given = num_given

    def state(self) -> dict:
        """Where the next record stands; plain values."""
        if self._waiting:
            return {**self._row_state, "num_given": self._num_given}
        return {**self.cursor.state(), "num_given": 0}

    def next_record(self) -> Record:
        """Read on; SkipSampleError where a row is not usable."""
        if not self._waiting:
            self._read_row()
        key, first = self._take()
        if isinstance(first, SkipSampleError):
            raise first
        group = [first]
        while key[1] and len(group) < self.size and self._next_key() == key:
            group.append(self._take()[1])
        return Record.join(group)

    def _next_key(self) -> tuple:
        if not self._waiting:
            self._read_row()
        return self._waiting[0][0]

    def _take(self) -> tuple:
        key, item = self._waiting.popleft()
        self._num_given += 1
        self.epoch = key[0]
        return key, item

    def _read_row(self) -> None:
        self._row_state, self._num_given = self.cursor.state(), 0
        items: Iterable[Record | SkipSampleError]
        try:
            items = _conversations(self.cursor.next_record(), self.independent_turns)
        except SkipSampleError as error:
            items = [error]
        for item in items:
            key = None if isinstance(item, SkipSampleError) else sharing_key(item.messages)
            self._waiting.append(((self.cursor.epoch, key), item))
