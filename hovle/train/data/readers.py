"""Readers turn files into records, conversations whose pictures are still on disk."""

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ...assets import easy_vqa
from ...assets.vqa_questions import Question, load_questions, wording_weights
from ...files.fingerprints import fingerprint_files
from ..config import ChatData, ConversationData, DataConfig, EasyVqaData, HuggingFaceData, LlavaData, PictureData
from .conversation_files import LlavaRecords, read_chats
from .grouping import GroupedRecords, share_pictures
from .local_files import describe_left, list_folder
from .records import PICTURE_SUFFIXES, Record, Records, RecordStream, conversation, picture_paths
from .skips import SkipSampleError

HOLDING_OUT = 0x401D
"""Seed by which records are held out, whatever the run's: what was held out once may be measured by any run."""


def load_records(config: DataConfig) -> Records | RecordStream:
    """Open a source; pictures stay on disk."""
    records = _open(config)
    if not isinstance(config, ConversationData) or not (config.questions_per_sample > 1 or config.independent_turns):
        return records
    return share_pictures(records, config.questions_per_sample, config.independent_turns)


def load_part(config: DataConfig, held_out: bool = False) -> Records | RecordStream:
    """Open what training reads of a source, or what `held_out` of its config keeps from it.

    Raises:
        ValueError: For a stream, which has no numbers to divide it by, and where one of the parts would be empty.
    """
    records = load_records(config)
    if not config.held_out:
        return records
    if isinstance(records, RecordStream):
        raise ValueError(
            f"{config.label}: held_out needs a source that is read by number, not a stream: take streaming out, or "
            "name other data as `validation`."
        )
    count = round(config.held_out * len(records))
    if not 0 < count < len(records):
        raise ValueError(
            f"{config.label}: held_out {config.held_out} of {len(records)} records is {count}: raise or lower it, so "
            "that both parts have some."
        )
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(HOLDING_OUT)).tolist()
    return PartOfRecords(records, sorted(order[:count] if held_out else order[count:]))


class PartOfRecords(Sequence[Record]):
    """Some records of a source.

    Args:
        records: All of them.
        places: Which ones.
    """

    def __init__(self, records: Records, places: Sequence[int]):
        self.records = records
        self.places = places
        self.left_aside = list(getattr(records, "left_aside", ()))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place):
        return self.records[self.places[place]]

    @functools.cached_property
    def has_branches(self) -> bool:
        """Whether records may hold several conversations."""
        if isinstance(self.records, list):
            return any(record.has_branches for record in self.records)
        return getattr(self.records, "has_branches", False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the whole source: the recipe says which part it is."""
        return fingerprint_records(self.records)


def _open(config: DataConfig) -> Records | RecordStream:
    match config:
        case ChatData():
            return read_chats(Path(config.path))
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
    everything, faults = [], []
    for place in range(len(records)):
        try:
            everything.append(records[place])
        except SkipSampleError as error:
            faults.append(str(error))
    pictures = picture_paths(everything)
    root = os.path.commonpath([os.path.dirname(path) for path in pictures]) if pictures else "/"
    digest = hashlib.sha256(fingerprint_files(pictures, root).encode())
    for record in everything:
        digest.update(repr(record).replace(os.path.join(root, ""), "").encode())  # the folder may have moved
        if record.regions:
            digest.update(repr(record.regions).encode())
    digest.update("".join(faults).encode())
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


class PictureRecords(list[Record]):
    """The pictures of a folder and its subfolders; what else lies there is left aside and told of."""

    def __init__(self, folder: Path):
        listing = list_folder(folder)
        pictures = [path for path in listing.files if path.suffix.lower() in PICTURE_SUFFIXES]
        others = [path for path in listing.files if path.suffix.lower() not in PICTURE_SUFFIXES]
        self.left_aside = [*describe_left(others, "that are no pictures by their names"), *listing.left_aside()]
        if not pictures:
            found = "".join(f" {line}." for line in self.left_aside)
            raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)}).{found}")
        super().__init__(Record(path.name, conversation(path, "", "")) for path in pictures)
