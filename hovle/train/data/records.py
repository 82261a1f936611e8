"""Records: conversations whose pictures are still on disk, and what reads them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ...assets.vqa_questions import draw_weighted
from .skips import FILM, SkipSampleError

if TYPE_CHECKING:
    from .regions import Region

PICTURE_MARK = "<image>"
"""Where a picture stands in a human turn of LLaVA's format."""

MARKS = re.compile(r"<(?:image|video|audio)(?:[ _]?\d+)?>")
"""What stands for a picture, a video or a sound in the text of a question."""


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Names of the speakers in LLaVA's format and ours -> role of a chat message."""


CHAT_ROLES = ("system", "user", "assistant")
"""Roles of chat messages."""


@dataclass(frozen=True)
class Record:
    """One conversation as the source holds it, and others about the same pictures."""

    name: str
    """Where it comes from, for messages."""
    messages: list[dict]
    """Chat messages with picture paths."""
    others: tuple[list[dict], ...] = ()
    """Conversations that start with the same pictures; none sees another."""
    weights: tuple[float, ...] = ()
    """How readily each conversation is drawn, this record's own first; empty: all take part."""
    num_drawn: int = 0
    """How many of them make a sample when they are drawn."""
    names: tuple[str, ...] = field(default=(), repr=False)  # fingerprints know the other fields only
    """What each conversation is called, this record's own first; empty: all as the record."""
    unread: tuple[str, ...] = field(default=(), repr=False)
    """Keys of the source that nobody reads, to be counted."""
    is_last_reply_taught: bool = field(default=False, repr=False)
    """Whether of its replies only the last one is learnt; those before it are in other samples."""
    regions: tuple["Region", ...] = field(default=(), repr=False)
    """Where it is known what its first picture shows; fingerprints hold them apart."""

    @classmethod
    def join(cls, records: Sequence["Record"]) -> "Record":
        """One record of conversations that start with the same pictures."""
        first, *others = records
        names = tuple(record.name for record in records)
        others_messages = tuple(record.messages for record in others)
        unread = tuple(dict.fromkeys(key for record in records for key in record.unread))
        regions = tuple(dict.fromkeys(region for record in records for region in record.regions))
        return cls(_joint_name(names), first.messages, others_messages, names=names, unread=unread, regions=regions)

    def part(self, places: Iterable[int]) -> "Record":
        """A record of some of its conversations."""
        chosen = list(places)
        first, *others = [[self.messages, *self.others][place] for place in chosen]
        names = tuple(self.names[place] for place in chosen) if self.names else ()
        name = _joint_name(names) if names else self.name
        return Record(name, first, tuple(others), names=names, unread=self.unread, regions=self.regions)

    @property
    def num_conversations(self) -> int:
        """Conversations it holds."""
        return 1 + len(self.others)

    @property
    def has_branches(self) -> bool:
        """Whether samples of it hold several conversations."""
        return bool(self.others) and self.num_drawn != 1

    def draw(self, seed: int) -> "Record":
        """Choose `num_drawn` of the conversations by weight, without repetition."""
        if not self.weights:
            return self
        return self.part(draw_weighted(self.weights, self.num_drawn, seed))


def _joint_name(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


class Records(Protocol):
    """Conversations by number; reading one raises `SkipSampleError` where it is not usable."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Record: ...


class RecordCursor(Protocol):
    """Reads a shard's share of a stream in order."""

    epoch: int
    """How often it has begun again."""

    def next_record(self) -> Record:
        """Read on; SkipSampleError where a row is not usable."""

    def state(self) -> dict:
        """Where the next record stands; plain values."""


@runtime_checkable
class RecordStream(Protocol):
    """Conversations that can be read in order only."""

    fingerprint: str

    def open_shard(self, shard: int, num_shards: int, seed: int, state: dict | None) -> RecordCursor:
        """Read the share of one of `num_shards` readers, from its beginning or from a state of its cursor."""


def picture_paths(records: Iterable[Record]) -> list[str]:
    """Files of all pictures, each once, in the order in which they come."""
    sources = (source for record in records for source in picture_sources(record.messages))
    return list(dict.fromkeys(source for source in sources if isinstance(source, str)))


def picture_item(picture: Path | str | bytes) -> dict:
    """Item of a chat message for a picture's path or the bytes of its file."""
    if isinstance(picture, bytes):
        return {"type": "image", "image": picture}
    return {"type": "image", "path": str(picture)}


def conversation(picture: Path | str | bytes, question: str, answer: str) -> list[dict]:
    """Messages of one question about one picture, and its answer."""
    return [
        {"role": "user", "content": [picture_item(picture), {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def inside(folder: Path, name: str) -> Path:
    """Full path of a picture; links are followed, and what leads out of the folder is refused.

    A name may have the backslashes of Windows. A snapshot in the Hub's cache consists of links into the `blobs` beside
    it, which belong to it.
    """
    try:
        if "\\" in name and not (folder / name).exists():
            name = "/" + name if PureWindowsPath(name).drive else name.replace("\\", "/")
        path = (folder / name).resolve()
        root = folder.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a null character, links in a circle
        raise ValueError(f"Picture {name[:80]!r} is no name of a file ({error}).") from error
    snapshots = next((parent for parent in root.parents if parent.name == "snapshots"), None)
    roots = [root, *([snapshots.parent / "blobs"] if snapshots else [])]
    if not any(path.is_relative_to(own) for own in roots):
        raise ValueError(f"Picture {name[:200]!r} lies outside {folder}; keep pictures beside the data file.")
    return path


def messages_from_turns(name: str, turns: list[tuple[str, str]], pictures: Sequence) -> list[dict]:
    """Chat messages of turns with `<image>` where a picture stands.

    Args:
        name: Of the conversation, for messages.
        turns: Role and text of each.
        pictures: Paths or bytes, in the order of their marks.

    Raises:
        SkipSampleError: When there are not as many marks in the user's turns as pictures, marks of something else,
            or no turns.
    """
    if not turns or not all(isinstance(text, str) for _, text in turns):
        raise SkipSampleError(name, "malformed", f"expected turns of text, found {str(turns)[:80]!r}.")
    num_marks = sum(text.count(PICTURE_MARK) for role, text in turns if role == "user")
    if num_marks != len(pictures):
        detail = f"{num_marks} {PICTURE_MARK} marks in the user's turns, but {len(pictures)} pictures."
        raise SkipSampleError(name, "picture count", detail)
    check_marks((text.replace(PICTURE_MARK, "") for role, text in turns if role == "user"), name)
    remaining = iter(pictures)
    messages = []
    for role, text in turns:
        content: str | list[dict] = text
        if role == "user" and PICTURE_MARK in text:
            first, *others = text.split(PICTURE_MARK)
            content = [{"type": "text", "text": first}] if first else []
            for piece in others:
                content.append(picture_item(next(remaining)))
                content += [{"type": "text", "text": piece}] if piece else []
        messages.append({"role": role, "content": content})
    return messages


def check_marks(texts: Iterable[str], name: str) -> None:
    """Raise where texts of questions have a mark that nothing stands for: it would be learnt as a word."""
    found = next((mark.group() for text in texts for mark in MARKS.finditer(text)), None)
    if found:
        reason = "picture count" if found.startswith("<image") else FILM
        raise SkipSampleError(name, reason, f"a question has the mark {found}, but nothing stands there.")


def picture_items(messages: list[dict]) -> list[dict]:
    """Items of a conversation that stand for pictures, in their order."""
    return [
        item
        for message in messages
        if isinstance(message["content"], list)
        for item in message["content"]
        if item["type"] == "image"
    ]


def picture_sources(messages: list[dict]) -> list[str | bytes]:
    """Paths, or bytes of the files, of a conversation's pictures in their order."""
    return [item["path"] if "path" in item else item["image"] for item in picture_items(messages)]


def until_last_reply(messages: list[dict]) -> list[dict]:
    """The messages without those behind the last reply, which teach nothing; none where there is no reply."""
    ends = [number + 1 for number, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: ends[-1]] if ends else []


PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
