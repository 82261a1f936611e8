"""Readers turn files into records, conversations whose pictures are still on disk."""

import contextlib
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ...assets import easy_vqa
from ...assets.vqa_questions import Question, load_questions, wording_weights
from ...files.documents import UnreadableError, parse_json
from ...files.fingerprints import at_even_distances, fingerprint_files
from ..config import ChatData, ConversationData, DataConfig, EasyVqaData, HuggingFaceData, LlavaData, PictureData
from .grouping import GroupedRecords, share_pictures
from .records import (
    CHAT_ROLES,
    PICTURE_SUFFIXES,
    ROLES,
    Record,
    Records,
    RecordStream,
    conversation,
    inside,
    messages_from_turns,
    picture_items,
    picture_paths,
)
from .skips import NUM_WORST, SkipSampleError


def load_records(config: DataConfig) -> Records | RecordStream:
    """Open a source; pictures stay on disk."""
    records = _open(config)
    if not isinstance(config, ConversationData) or not (config.questions_per_sample > 1 or config.independent_turns):
        return records
    return share_pictures(records, config.questions_per_sample, config.independent_turns)


def _open(config: DataConfig) -> Records | RecordStream:
    match config:
        case ChatData():
            return _chat_records(Path(config.path))
        case LlavaData():
            path = Path(config.path)
            return LlavaRecords(path, Path(config.picture_folder) if config.picture_folder else path.parent)
        case PictureData():
            return PictureRecords(Path(config.path))
        case HuggingFaceData():
            from .huggingface import DatasetRecords, DatasetStream

            return DatasetStream(config) if config.streaming else DatasetRecords(config)
        case EasyVqaData():
            folder = Path(config.path) if config.path else easy_vqa()
            make = _balanced_records if config.balance_answers else _question_records
            return make(load_questions(folder / config.split), config.questions_per_sample)


def fingerprint_records(records: Records | RecordStream) -> str:
    """Short hash of a source, to notice changed data when resuming."""
    if isinstance(records, GroupedRecords):
        return fingerprint_records(records.records)
    if hasattr(records, "fingerprint"):
        return records.fingerprint
    assert not isinstance(records, RecordStream)  # streams have one
    everything = [records[place] for place in range(len(records))]
    pictures = picture_paths(everything)
    root = os.path.commonpath([os.path.dirname(path) for path in pictures]) if pictures else "/"
    digest = hashlib.sha256(fingerprint_files(pictures, root).encode())
    for record in everything:
        digest.update(repr(record).replace(os.path.join(root, ""), "").encode())  # the folder may have moved
    return digest.hexdigest()[:16]


def _question_records(questions: list[Question], questions_per_sample: int) -> list[Record]:
    """Records of so many questions about one picture; a picture's last record may hold fewer."""
    records = []
    for picture, asked in _by_picture(questions).items():
        conversations = [conversation(picture, question.text, question.answer) for question in asked]
        for start in range(0, len(asked), questions_per_sample):
            first, *others = conversations[start : start + questions_per_sample]
            records.append(Record(f"{picture.name}[{start}]", first, tuple(others)))
    return records


def _balanced_records(questions: list[Question], questions_per_sample: int) -> list[Record]:
    """One record per picture; its questions are drawn the more readily the less their wording tells the answer."""
    weights = dict(zip(questions, wording_weights(questions), strict=True))
    records = []
    for picture, asked in _by_picture(questions).items():
        first, *others = [conversation(picture, question.text, question.answer) for question in asked]
        weights_here = tuple(weights[question] for question in asked)
        records.append(Record(picture.name, first, tuple(others), weights_here, questions_per_sample))
    return records


def _by_picture(questions: list[Question]) -> dict[Path, list[Question]]:
    groups: dict[Path, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.picture, []).append(question)
    return groups


def _chat_records(path: Path) -> list[Record]:
    """Read JSON lines `{"messages": [...]}`; relative picture paths are relative to the file and stay beside it."""
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            name = f"{path.name}:{number}"
            try:
                messages = parse_json(line, name)["messages"]
                fault = _message_fault(messages)
            except (UnreadableError, KeyError, TypeError) as error:
                fault = repr(error)
            if fault:
                raise ValueError(
                    f'{name}: expected {{"messages": [{{"role": ..., "content": [{{"type": "image", "path": ...}}, '
                    f'{{"type": "text", "text": ...}}]}}]}}, found {line[:80]!r} ({fault}).'
                )
            for item in picture_items(messages):
                item["path"] = str(inside(path.parent, item["path"]))
            records.append(Record(name, messages))
    if not records:
        raise ValueError(f"{path} holds no conversations.")
    return records


def _message_fault(messages: object) -> str | None:
    """What is wrong with the messages of a chat file, None where nothing is."""
    if not isinstance(messages, list) or not messages:
        return "messages is no list with a message in it"
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in CHAT_ROLES:
            return f"role {role!r} is none of {', '.join(CHAT_ROLES)}"
        for item in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            if item["type"] not in ("image", "text"):
                return f"an item's type {item['type']!r} is neither image nor text"
            field = "path" if item["type"] == "image" else "text"
            if not isinstance(item[field], str):
                return f"{field} {item[field]!r:.40} is no text"
    return None


class LlavaRecords:
    """Conversations `{"image": ..., "conversations": [{"from": "human", "value": "<image>..."}, ...]}`.

    Args:
        path: JSON (one list) or JSON lines; lines are parsed when they are drawn.
        folder: Picture paths are relative to it and may not leave it.
    """

    def __init__(self, path: Path, folder: Path):
        self.name, self.folder = path.name, folder
        text = path.read_text(encoding="utf-8")
        self._text_digest = hashlib.sha256(text.encode())
        if path.suffix == ".jsonl":
            self.entries = [line for line in text.splitlines() if line.strip()]
        else:
            try:
                self.entries = parse_json(text, path)
            except UnreadableError as error:
                raise ValueError(f"{path} is no JSON ({error}); JSON lines are named .jsonl.") from error
        if not isinstance(self.entries, list) or not self.entries:
            raise ValueError(f"{path} must hold a list of conversations, found {text[:40]!r}.")

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
        entry, name = self.entries[place], f"{self.name}:{place + 1}"
        try:
            entry = parse_json(entry, name) if isinstance(entry, str) else entry
            turns = [(ROLES[turn["from"]], turn["value"]) for turn in entry["conversations"]]
            given = entry.get("image") or []
            names = [given] if isinstance(given, str) else list(given)
            paths = [str(inside(self.folder, picture)) for picture in names]
        except (UnreadableError, KeyError, TypeError, AttributeError) as error:
            expected = '{"image": ..., "conversations": [{"from": "human" or "gpt", "value": ...}]}'
            detail = f"expected {expected}, found {str(entry)[:80]!r} ({error!r})."
            raise SkipSampleError(name, "malformed", detail) from error
        except ValueError as error:
            raise SkipSampleError(name, "picture outside its folder", str(error)) from error
        return Record(name, messages_from_turns(name, turns, paths))


class PictureRecords(list[Record]):
    """The pictures of a folder and its subfolders; other files and linked subfolders are left aside and told of.

    A link to a folder is not followed: what it leads to lies outside, which is refused, or is read anyway.
    """

    def __init__(self, folder: Path):
        linked, pictures, others = [], [], []
        for path in sorted(folder.rglob("*")):
            if path.is_symlink():
                inside(folder, str(path.relative_to(folder)))
            if path.is_dir():
                linked += [path] if path.is_symlink() else []
            elif path.suffix.lower() in PICTURE_SUFFIXES:
                pictures.append(path)
            else:
                others.append(path)
        if not pictures:
            raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)}).")
        super().__init__(Record(path.name, conversation(path, "", "")) for path in pictures)
        self.left_aside = _describe_left(others, "files that are no pictures by their names")
        self.left_aside += _describe_left(linked, "links to folders, which are read where they lie")


def _describe_left(paths: list[Path], what: str) -> list[str]:
    if not paths:
        return []
    suffixes = Counter(path.suffix.lower() or "no suffix" for path in paths)
    shown = [f"{count:,} {suffix}" for suffix, count in suffixes.most_common(NUM_WORST)]
    names = [path.name for path in paths[:NUM_WORST]]
    return [
        f"left aside {len(paths):,} {what} ({', '.join(shown)}): {', '.join(names)}"
        + ", ..." * (len(paths) > NUM_WORST)
    ]
