"""Samples, packing and the batch the objectives receive.

A source is an endless, seeded stream: sample `i` depends on the seed and on `i` alone, so resuming a run needs one
number. Samples are packed whole into rows of fixed length; positions restart at each sample, which keeps packed
samples apart (attention_mask stays None). Conversations that start alike, such as several questions about one
picture, share that beginning: the picture is computed once, and a mask lets each see the beginning and itself only.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import IterableDataset

from ..assets import easy_vqa
from ..eval.vqa import Question, draw_weighted, load_questions, wording_weights
from ..modeling_hovle import IGNORE_INDEX
from ..pictures import load_picture
from ..processing_hovle import HoVLEProcessor
from .config import DataConfig, StageConfig

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


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

    @property
    def has_branches(self) -> bool:
        """Whether samples of it hold several conversations."""
        return bool(self.others) and self.num_drawn != 1

    def draw(self, seed: int) -> "Record":
        """Choose `num_drawn` of the conversations by weight, without repetition."""
        if not self.weights:
            return self
        chosen = draw_weighted(self.weights, self.num_drawn, seed)
        first, *others = [[self.messages, *self.others][place] for place in chosen]
        return Record(self.name, first, tuple(others))


@dataclass
class Sample:
    """One conversation ready for packing."""

    name: str
    index: int
    """Stream index."""
    input_ids: torch.Tensor
    """Shape `(T,)`."""
    labels: torch.Tensor
    """Ids to predict at their own position, -100 elsewhere, shape `(T,)`."""
    pixel_values: torch.Tensor
    """Normalised tiles, shape `(N, 3, s, s)`."""
    branch_ids: torch.Tensor | None = None
    """0 where conversations share their beginning, then 1, 2, ... for the rest of each; None for one conversation."""

    @property
    def position_ids(self) -> torch.Tensor:
        """Positions of the tokens in their own conversation, shape `(T,)`."""
        positions = torch.arange(len(self.input_ids))
        if self.branch_ids is not None:
            for branch in range(1, int(self.branch_ids.max()) + 1):
                inside = self.branch_ids == branch
                positions[inside] += int((self.branch_ids == 0).sum()) - int(positions[inside][0])
        return positions


def load_records(config: DataConfig) -> list[Record]:
    """Read the list of conversations of a source; pictures stay on disk."""
    if config.source == "easy_vqa":
        folder = Path(config.path) if config.path else easy_vqa()
        questions = load_questions(folder / config.split)
        if config.balance_answers:
            return _balanced_records(questions, config.questions_per_sample)
        return _question_records(questions, config.questions_per_sample)
    if config.path is None:
        raise ValueError(f"data.path is missing: the source {config.source!r} needs a file or folder.")
    if config.source == "chat":
        return _chat_records(Path(config.path))
    if config.source == "pictures":
        return _picture_records(Path(config.path))
    raise ValueError(f"Unknown data.source {config.source!r}; known: easy_vqa, chat, pictures.")


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


def conversation(picture: Path, question: str, answer: str) -> list[dict]:
    """Messages of one question about one picture, and its answer."""
    return [
        {"role": "user", "content": [{"type": "image", "path": str(picture)}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def _chat_records(path: Path) -> list[Record]:
    """Read JSON lines `{"messages": [...]}`; relative picture paths are relative to the file and stay beside it."""
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            name = f"{path.name}:{number}"
            try:
                messages = json.loads(line)["messages"]
                for message in messages:
                    for item in message["content"] if isinstance(message["content"], list) else ():
                        if item["type"] == "image":
                            item["path"] = str(_inside(path.parent, item["path"]))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{name}: expected {{"messages": [{{"role": ..., "content": [{{"type": "image", "path": ...}}, '
                    f'{{"type": "text", "text": ...}}]}}]}}, found {line[:80]!r} ({error!r}).'
                ) from error
            records.append(Record(name, messages))
    if not records:
        raise ValueError(f"{path} holds no conversations.")
    return records


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"Picture {name!r} lies outside {folder}; keep pictures beside the data file.")
    return path


def _picture_records(folder: Path) -> list[Record]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)}).")
    return [Record(path.name, conversation(path, "", "")) for path in paths]


class ReplySamples:
    """Conversations with a loss on every reply (`next_token`)."""

    def __init__(self, processor: HoVLEProcessor):
        self.processor = processor

    def make(self, record: Record, index: int) -> Sample:
        """Tokenise a record; its replies, end-of-turn tokens included, are supervised."""
        pixel_values, num_tiles = load_tiles(self.processor, record.messages)
        input_ids, labels = self._encode(record.name, record.messages, num_tiles)
        if not record.others:
            return Sample(record.name, index, torch.tensor(input_ids), torch.tensor(labels), pixel_values)
        others = [self._encode(record.name, messages, num_tiles) for messages in record.others]
        input_ids, labels, branch_ids = share_beginning([(input_ids, labels), *others])
        return Sample(
            record.name, index, torch.tensor(input_ids), torch.tensor(labels), pixel_values, torch.tensor(branch_ids)
        )

    def _encode(self, name: str, messages: list[dict], num_tiles: list[int]) -> tuple[list[int], list[int]]:
        """Ids and labels of one conversation whose pictures have so many tiles."""
        replies = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not replies:
            raise ValueError(f"{name}: no reply to learn from.")
        prompts = [messages[:number] for number in replies]
        answered = [messages[: number + 1] for number in replies]
        starts = self.processor.encode_chats(prompts, num_tiles, add_generation_prompt=True)
        ends = self.processor.encode_chats(answered, num_tiles)
        input_ids = ends[-1]  # what follows the last reply teaches nothing
        labels = [IGNORE_INDEX] * len(input_ids)
        special = special_ids(self.processor.tokenizer)
        for start, end in zip(starts, ends, strict=True):
            if input_ids[: len(end)] != end or end[: len(start)] != start:
                raise ValueError(f"{name}: the chat template rewrites earlier turns; replies cannot be located.")
            stop = max((place for place in range(len(start), len(end)) if end[place] in special), default=len(end) - 1)
            labels[len(start) : stop + 1] = end[len(start) : stop + 1]
        if not self.processor.tokenizer.decode(input_ids[stop + 1 :]).strip():  # a line break teaches nothing
            input_ids, labels = input_ids[: stop + 1], labels[: stop + 1]
        return input_ids, labels


def share_beginning(conversations: list[tuple[list[int], list[int]]]) -> tuple[list[int], list[int], list[int]]:
    """Join conversations that start alike into one sequence: the beginning once, then the rest of each.

    Args:
        conversations: Ids and labels of each; nothing is supervised before they part.

    Returns:
        Ids, labels and branch ids (0 for the beginning) of the joint sequence.
    """
    columns = zip(*(ids for ids, _ in conversations), strict=False)
    shared = next((place for place, column in enumerate(columns) if len(set(column)) > 1), None)
    first_supervised = min(
        next(place for place, label in enumerate(labels) if label != IGNORE_INDEX) for _, labels in conversations
    )
    # The first token after the beginning follows another branch's last one, so it must not be supervised.
    shared = min(first_supervised - 1 if shared is None else shared, first_supervised - 1)
    joint_ids, joint_labels = conversations[0][0][:shared], [IGNORE_INDEX] * shared
    branch_ids = [0] * shared
    for branch, (ids, labels) in enumerate(conversations, 1):
        joint_ids = joint_ids + ids[shared:]
        joint_labels = joint_labels + labels[shared:]
        branch_ids = branch_ids + [branch] * (len(ids) - shared)
    return joint_ids, joint_labels, branch_ids


def special_ids(tokenizer) -> set[int]:
    """Ids that stand for no ordinary text: special and added tokens."""
    return set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)


def load_tiles(processor: HoVLEProcessor, messages: list[dict]) -> tuple[torch.Tensor, list[int]]:
    """Read and tile the pictures of a conversation: `(N, 3, s, s)`, and the tile count of each picture."""
    paths = picture_paths(messages)
    if not paths:
        size = processor.image_processor.size["height"]
        return torch.zeros(0, 3, size, size), []
    pictures = [load_picture(path) for path in paths]
    tiles = processor.image_processor(pictures, return_tensors="pt")
    return tiles["pixel_values"], [int(count) for count in tiles["num_patches"]]


def picture_paths(messages: list[dict]) -> list[str]:
    """Paths of a conversation's pictures in their order."""
    return [
        item["path"]
        for message in messages
        if isinstance(message["content"], list)
        for item in message["content"]
        if item["type"] == "image"
    ]


class RandomTextSamples:
    """Pictures with unrelated random tokens (`distillation`): the whole vocabulary is covered, no pairs are needed."""

    STAND_IN = "\uf8ff"
    """Marks in the rendered chat where random tokens go: a private character no template contains."""

    def __init__(self, processor: HoVLEProcessor, num_random_tokens: int, seed: int):
        self.processor = processor
        self.num_random_tokens = num_random_tokens
        self.seed = seed
        tokenizer = processor.tokenizer
        special = special_ids(tokenizer)
        self.ordinary_ids = torch.tensor([index for index in range(len(tokenizer)) if index not in special])
        self.stand_in_ids = processor._encode_text(self.STAND_IN, at_start=False)

    def make(self, record: Record, index: int) -> Sample:
        """Place a picture in a user turn, random ordinary tokens after it and as many again in the reply."""
        paths = picture_paths(record.messages)
        if not paths:
            raise ValueError(f"{record.name}: no picture to distil; distillation takes one from every conversation.")
        messages = conversation(Path(paths[0]), self.STAND_IN, self.STAND_IN)
        pixel_values, num_tiles = load_tiles(self.processor, messages)
        [ids] = self.processor.encode_chats([messages], num_tiles)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        input_ids = torch.tensor(self._with_random_tokens(ids, generator))
        return Sample(record.name, index, input_ids, torch.full_like(input_ids, IGNORE_INDEX), pixel_values)

    def _with_random_tokens(self, ids: list[int], generator: torch.Generator) -> list[int]:
        length = len(self.stand_in_ids)
        places = [start for start in range(len(ids)) if ids[start : start + length] == self.stand_in_ids]
        if len(places) != 2:
            raise ValueError(f"The chat template shows {len(places)} of 2 turns; random text has no place in it.")
        for place in reversed(places):
            chosen = torch.randint(len(self.ordinary_ids), (self.num_random_tokens,), generator=generator)
            ids[place : place + length] = self.ordinary_ids[chosen].tolist()
        return ids


@dataclass(frozen=True)
class StreamPosition:
    """Where a stream of samples stands between two batches; plain numbers, so that a checkpoint can hold them."""

    next_index: int = 0
    """Where this rank draws next, its rank added."""
    pending: list[int] = field(default_factory=list)
    """Indices this rank has drawn but not packed."""


def pack_rows(window: list[Sample], num_rows: int, row_length: int) -> tuple[list[list[Sample]], list[Sample]]:
    """Pack whole samples into rows: the oldest first, so that none waits for ever, then the longest that fit.

    Args:
        window: Samples in the order they were drawn, none longer than a row.
        num_rows: Rows to fill.
        row_length: Tokens of a row.

    Returns:
        The rows, and the samples that found no place, in their order.
    """
    rows: list[list[Sample]] = [[] for _ in range(num_rows)]
    free = [row_length] * num_rows
    oldest, *others = window
    left = []
    for sample in [oldest, *sorted(others, key=lambda item: -len(item.input_ids))]:
        length = len(sample.input_ids)
        fitting = [row for row in range(num_rows) if free[row] >= length]
        if not fitting:
            left.append(sample)
            continue
        row = min(fitting, key=lambda candidate: free[candidate])  # best fit: the fullest row that has room
        rows[row].append(sample)
        free[row] -= length
    return rows, sorted(left, key=lambda sample: sample.index)


class PackedBatches(IterableDataset):
    """Endless packed batches of one rank.

    Args:
        records: The source.
        maker: Turns a record and its stream index into a `Sample`.
        config: Row count, row length and seed.
        start: Where the stream continues, for resuming.
        rank: This process.
        world_size: Processes that share the stream; each takes every `world_size`-th sample.
        pad_token_id: Fills row ends.
    """

    def __init__(
        self,
        records: list[Record],
        maker: "ReplySamples | RandomTextSamples",
        config: StageConfig,
        start: StreamPosition,
        rank: int,
        world_size: int,
        pad_token_id: int,
    ):
        self.records = records
        self.maker = maker
        self.num_rows = config.rows_per_batch
        self.row_length = config.row_length
        self.seed = config.seed
        self.start = start
        self.rank = rank
        self.world_size = world_size
        self.pad_token_id = pad_token_id
        self.window_size = config.packing_window
        # In every batch or in none: one compiled graph.
        self.has_branches = isinstance(maker, ReplySamples) and any(record.has_branches for record in records)
        self._epoch = -1
        self._order: list[int] = []

    def record_at(self, index: int) -> Record:
        """Record of a stream index: every epoch visits each record once, in an order and with draws of its own."""
        epoch, position = divmod(index, len(self.records))
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(self.seed * 7919 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.records), generator=generator).tolist()
        return self.records[self._order[position]].draw(self.seed * 1_000_003 + index)

    def __iter__(self) -> Iterator[dict]:
        """Yield batches; `position` of a batch is where a resumed stream continues."""
        position = self.start
        window = [self._sample(index) for index in position.pending]
        next_index = position.next_index
        while True:
            while len(window) < self.window_size or self._num_tokens(window) < self.num_rows * self.row_length:
                window.append(self._sample(next_index + self.rank))
                next_index += self.world_size
            rows, window = pack_rows(window, self.num_rows, self.row_length)
            yield self._batch(rows, StreamPosition(next_index, [sample.index for sample in window]))

    @staticmethod
    def _num_tokens(window: list[Sample]) -> int:
        return sum(len(sample.input_ids) for sample in window)

    def _sample(self, index: int) -> Sample:
        sample = self.maker.make(self.record_at(index), index)
        if len(sample.input_ids) > self.row_length:
            raise ValueError(
                f"{sample.name} has {len(sample.input_ids)} tokens, more than row_length ({self.row_length}); samples "
                "are never cut: raise row_length, or ask fewer questions or use fewer tiles per sample."
            )
        return sample

    def _batch(self, rows: list[list[Sample]], position: StreamPosition) -> dict:
        shape = (self.num_rows, self.row_length)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORE_INDEX)
        position_ids = torch.zeros(shape, dtype=torch.long)
        document_ids = torch.full(shape, -1)  # padding is a document of its own
        branch_ids = torch.zeros(shape, dtype=torch.long)
        for row, samples in enumerate(rows):
            end = 0
            for number, sample in enumerate(samples):
                start, end = end, end + len(sample.input_ids)
                input_ids[row, start:end] = sample.input_ids
                labels[row, start:end] = sample.labels
                labels[row, start] = IGNORE_INDEX  # nothing before a sample may predict its first token
                position_ids[row, start:end] = sample.position_ids
                document_ids[row, start:end] = number
                if sample.branch_ids is not None:
                    branch_ids[row, start:end] = sample.branch_ids
            position_ids[row, end:] = torch.arange(self.row_length - end)
        samples = [sample for row in rows for sample in row]
        batch = {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": position_ids,
            "is_sample": document_ids >= 0,
            "pixel_values": torch.cat([sample.pixel_values for sample in samples]),
            "names": [sample.name for sample in samples],
            "position": position,
        }
        if self.has_branches:
            batch["attention_mask"] = branch_mask(document_ids, branch_ids)
        return batch


def branch_mask(document_ids: torch.Tensor, branch_ids: torch.Tensor) -> torch.Tensor:
    """Who may look at whom, `(B, 1, T, T)`, bool: at earlier tokens of the same document, outside other branches.

    Args:
        document_ids: Equal within a document, shape `(B, T)`.
        branch_ids: 0 in a document's shared beginning, shape `(B, T)`.
    """
    same_document = document_ids[:, :, None] == document_ids[:, None, :]
    same_branch = (branch_ids[:, :, None] == branch_ids[:, None, :]) | (branch_ids[:, None, :] == 0)
    return (same_document & same_branch).tril()[:, None]
