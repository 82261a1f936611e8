"""Samples: a record tokenised for an objective, its pictures tiled."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..modeling_hovle import IGNORE_INDEX
from ..pictures import load_picture
from ..processing_hovle import HoVLEProcessor
from .sources import Record, conversation, picture_paths


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
