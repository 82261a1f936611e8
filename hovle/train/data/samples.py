"""Samples: a record tokenised for an objective.

The tiles of a picture are counted from the header of its file, so samples wait to be packed without their pixels;
these are read for a whole batch at once (`load_pixels`).
"""

import bisect
import dataclasses
import functools
import itertools
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeGuard

import jinja2
import torch

from ...model.chat_rendering import Prompt, SpecialTokens
from ...model.modeling_hovle import IGNORE_INDEX
from ...model.pictures import picture_size
from ...model.processing_hovle import HoVLEProcessor
from .records import Record, conversation, picture_item, picture_sources, until_last_reply
from .rows import remark_on
from .skips import NO_PICTURE, UNANSWERED, UNREAD_KEY, RecipeError, SkipSampleError, sparing_the_run
from .tiles import picture_key, read_tiles
from .words import WordLayout, WordTargets


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
    pictures: list[str | bytes] = field(default_factory=list)
    """Paths, or bytes of the files."""
    num_tiles: list[int] = field(default_factory=list)
    """Tiles of each picture."""
    subsegment_ids: torch.Tensor | None = None
    """0 where conversations share their beginning, then 1, 2, ... for the rest of each; None for one conversation."""
    words: WordTargets | None = None
    """What the image tokens of its picture should say, where that is taught."""
    part: int = 0
    """Counts the samples of a record."""
    num_parts: int = 1
    """Parts its record was cut into, between conversations or turns."""
    epoch: int = 0
    """How often its source had begun again."""

    @functools.cached_property
    def is_input(self) -> torch.Tensor:
        """Tokens that take a place in a row, shape `(T,)`: all but a last one that is there to be predicted only."""
        return ~(self._is_last & (self.labels != IGNORE_INDEX))

    @property
    def num_inputs(self) -> int:
        """Places the sample takes in a row."""
        return int(self.is_input.sum())

    @property
    def targets(self) -> torch.Tensor:
        """Id each token has to predict, -100 for none, shape `(T,)`."""
        following = torch.cat([self.labels[1:], self.labels.new_tensor([IGNORE_INDEX])])
        return following.masked_fill(self._is_last, IGNORE_INDEX)

    @property
    def _is_last(self) -> torch.Tensor:
        """Where a conversation ends, shape `(T,)`."""
        if self.subsegment_ids is None:
            return torch.arange(len(self.input_ids)) == len(self.input_ids) - 1
        following = torch.cat([self.subsegment_ids[1:], self.subsegment_ids.new_tensor([0])])
        return (self.subsegment_ids > 0) & (self.subsegment_ids != following)

    @property
    def position_ids(self) -> torch.Tensor:
        """Positions of the tokens in their own conversation, shape `(T,)`."""
        positions = torch.arange(len(self.input_ids))
        if self.subsegment_ids is not None:
            for branch in range(1, int(self.subsegment_ids.max()) + 1):
                inside = self.subsegment_ids == branch
                positions[inside] += int((self.subsegment_ids == 0).sum()) - int(positions[inside][0])
        return positions


class SampleMaker:
    """Makes the samples of one objective.

    Args:
        processor: Of the model that is trained.
    """

    max_positions: int | None = None
    """Positions of the language model, beyond which it learns nothing that it can use; None: not limited."""
    max_shared_positions: float = math.inf
    """Positions of conversations that share pictures."""
    words: WordLayout | None = None
    """Lays the words of the records' regions over image tokens, where that is taught."""

    def __init__(self, processor: HoVLEProcessor):
        self.processor = processor

    def make(self, record: Record, index: int) -> Sample:
        """Tokenise a record; SkipSampleError where it is of no use."""
        raise NotImplementedError  # subclasses say

    def cuts(self, record: Record) -> Iterator[tuple[Record, Record]]:
        """Ways to cut a record that is too long in two, the longest first part first; none by default."""
        yield from ()

    def replies_apart(self, record: Record) -> list[Record]:
        """Records of one reply each, where replies cannot be learnt together; none where that changes nothing."""
        return []

    def make_all(
        self, record: Record, index: int, max_tokens: int, max_tiles: int | None = None
    ) -> list[Sample | SkipSampleError]:
        """Samples of a record, several where it is too long for one; in place of what cannot be used stands why.

        No picture and no turn is ever cut: the first sample takes the turns that fit, the next starts with all
        pictures and goes on from there. So later turns do not see earlier ones of another sample. Of several
        conversations, those that cannot be used take no other one with them.
        """
        whole, remarks = self._make_checked(record, index, max_tokens, max_tiles), self.remarks(record)
        faults: list[SkipSampleError] = []
        if record.others and _is_fault(whole):
            sound, faults = self._tell_apart(record, index, max_tokens, max_tiles)
            if sound is None:
                return [*faults, *remarks]
            record, whole = sound, self._make_checked(sound, index, max_tokens, max_tiles)
        made = self._make_fitting(record, whole, index, max_tokens, max_tiles)
        if len(made) > 1:
            for part, item in enumerate(made):
                item.num_parts = len(made)
                if isinstance(item, Sample):
                    item.name, item.part = f"{record.name} ({part + 1} of {len(made)})", part
        return [*made, *faults, *remarks]

    def _tell_apart(
        self, record: Record, index: int, max_tokens: int, max_tiles: int | None
    ) -> tuple[Record | None, list[SkipSampleError]]:
        """Conversations of a record that can be used, perhaps cut, and what is wrong with the others."""
        alone = [
            self._make_checked(record.part([place]), index, max_tokens, max_tiles)
            for place in range(record.num_conversations)
        ]
        sound = [place for place, item in enumerate(alone) if not _is_fault(item)]
        return record.part(sound) if sound else None, [item for item in alone if _is_fault(item)]

    def remarks(self, record: Record) -> list[SkipSampleError]:
        """What of a record is left out although the rest of it is used: keys that nobody reads."""
        return [SkipSampleError(record.name, UNREAD_KEY, remark_on(record.unread))] if record.unread else []

    def _make_fitting(
        self,
        record: Record,
        whole: Sample | SkipSampleError,
        index: int,
        max_tokens: int,
        max_tiles: int | None,
    ) -> list[Sample | SkipSampleError]:
        """Samples of a record, which as a whole makes this."""
        if isinstance(whole, SkipSampleError) and whole.reason == REWRITTEN:
            return [
                item
                for part in self.replies_apart(record)
                for item in self._make_fitting(
                    part, self._make_checked(part, index, max_tokens, max_tiles), index, max_tokens, max_tiles
                )
            ] or [whole]
        cuts = list(self.cuts(record)) if _is_over_long(whole) else []
        if not cuts:
            return [whole]

        def made_of(part: Record) -> Sample | SkipSampleError:
            return self._make_checked(part, index, max_tokens, max_tiles)

        # From the longest first part to the shortest: none fits, then all do. If none does, the shortest is left out.
        fitting = bisect.bisect_left(cuts, True, key=lambda cut: not _is_over_long(made_of(cut[0])))
        start, rest = cuts[min(fitting, len(cuts) - 1)]
        return [
            item
            for part in (start, rest)
            for item in self._make_fitting(part, made_of(part), index, max_tokens, max_tiles)
        ]

    def _make_checked(
        self, record: Record, index: int, max_tokens: int, max_tiles: int | None
    ) -> Sample | SkipSampleError:
        try:
            with sparing_the_run(record.name):
                sample = self.make(record, index)
        except SkipSampleError as error:
            return error
        num_tokens, num_tiles = sample.num_inputs, sum(sample.num_tiles)
        if num_tokens > max_tokens:
            detail = (
                f"has {num_tokens} tokens, more than row_length ({max_tokens}); pictures and turns are never cut: "
                "raise row_length, or ask fewer questions or use fewer tiles per sample."
            )
            return SkipSampleError(record.name, OVER_LONG, detail)
        num_positions = int(sample.position_ids[sample.is_input].max()) + 1
        if self.max_positions is not None and num_positions > self.max_positions:
            detail = (
                f"takes {num_positions} positions, more than the language model has ({self.max_positions}); pictures "
                "and turns are never cut: use fewer tiles, or set row_length to no more than that."
            )
            return SkipSampleError(record.name, OVER_LONG, detail)
        if sample.subsegment_ids is not None and num_positions > self.max_shared_positions:
            detail = (
                f"takes {num_positions} positions, and beyond {self.max_shared_positions:.0f} the rope rotates shared "
                "pictures by the length of each conversation: set questions_per_sample to 1."
            )
            return SkipSampleError(record.name, OVER_LONG, detail)
        if max_tiles is not None and num_tiles > max_tiles:
            detail = (
                f"has {num_tiles} tiles, more than max_tiles_per_batch ({max_tiles}); raise it, or lower max_tiles."
            )
            return SkipSampleError(record.name, "too many tiles", detail)
        return sample

    def load_pixels(self, name: str, pictures: list[str | bytes], num_tiles: list[int]) -> torch.Tensor:
        """Read the tiles of a sample's pictures, `(N, 3, s, s)`, uint8; SkipSampleError where one is damaged."""
        image_processor = self.processor.image_processor
        try:
            tiles = [read_tiles(picture, image_processor) for picture in pictures]
        except ValueError as error:
            raise SkipSampleError(name, _picture_fault(pictures), f"{error!s:.500}") from error
        found = [len(part) for part in tiles]
        if found != num_tiles:
            detail = f"the headers of its pictures promise {num_tiles} tiles, their pixels make {found}."
            raise SkipSampleError(name, "unreadable picture", detail)
        side = image_processor.size["height"]
        return torch.cat(tiles) if tiles else torch.zeros(0, 3, side, side, dtype=torch.uint8)

    def picture_keys(self, pictures: list[str | bytes]) -> list[str]:
        """What a batch tells about its pictures; nothing unless a teacher looks at them."""
        return []

    def count_tiles(self, name: str, pictures: list[str | bytes]) -> list[int]:
        """Tiles of each picture, from the headers of the files."""
        count = self.processor.image_processor.get_number_of_image_patches
        try:
            return [count(*picture_size(picture)) for picture in pictures]
        except ValueError as error:
            raise SkipSampleError(name, _picture_fault(pictures), f"{error!s:.500}") from error

    def render(self, name: str, chats: list[list[dict]], **kwargs) -> list[Prompt]:
        """Rendered conversations; SkipSampleError where the template refuses one."""
        try:
            return self.processor._render(self.processor._resolve_template(None, None), chats, **kwargs)
        except (ValueError, jinja2.TemplateError) as error:
            raise SkipSampleError(name, "refused by the chat template", str(error)) from error

    def encode(self, name: str, chats: list[list[dict]], num_tiles: list[int], **kwargs) -> list[list[int]]:
        """Token ids of conversations about the same pictures; SkipSampleError where the template refuses one."""
        try:
            return self.processor.encode_chats(chats, num_tiles, **kwargs)
        except (ValueError, jinja2.TemplateError) as error:
            raise SkipSampleError(name, "refused by the chat template", str(error)) from error


OVER_LONG = "over-long"
"""Reason of a sample that no row can hold and that cannot be cut further."""


REWRITTEN = "rewritten turns"
"""Reason of a conversation of which the chat template shows earlier turns otherwise once later ones follow."""


def _is_over_long(made: Sample | SkipSampleError) -> bool:
    return isinstance(made, SkipSampleError) and made.reason == OVER_LONG


def _is_fault(made: Sample | SkipSampleError) -> TypeGuard[SkipSampleError]:
    """Whether a record cannot be used, not even cut."""
    return isinstance(made, SkipSampleError) and made.reason not in (OVER_LONG, REWRITTEN)


def was_split(made: list[Sample | SkipSampleError]) -> bool:
    """Whether a record, of which `make_all` made this, was cut between conversations or turns."""
    return any(item.num_parts > 1 for item in made)


def _picture_fault(pictures: list[str | bytes]) -> str:
    is_missing = any(isinstance(picture, str) and not os.path.exists(picture) for picture in pictures)
    return "missing file" if is_missing else "unreadable picture"


class ReplySamples(SampleMaker):
    """Conversations with a loss on every reply (`next_token`)."""

    def make(self, record: Record, index: int) -> Sample:
        """Tokenise a record; its replies, end-of-turn tokens included, are supervised."""
        first, *rest = [until_last_reply(messages) for messages in (record.messages, *record.others)]
        pictures = picture_sources(first)
        num_tiles = self.count_tiles(record.name, pictures)
        input_ids, labels = self._encode(record.name, first, num_tiles, record.is_last_reply_taught)
        subsegment_ids = None
        if rest:
            others = [self._encode(record.name, messages, num_tiles) for messages in rest]
            input_ids, labels, branches = share_beginning([(input_ids, labels), *others])
            subsegment_ids = torch.tensor(branches)
            if self.processor.image_token_id in input_ids[branches.count(0) :]:
                raise RecipeError(
                    f"{record.name}: the chat template writes different beginnings for conversations about the same "
                    "pictures, so they cannot share them: set questions_per_sample to 1."
                )
        return Sample(
            record.name, index, torch.tensor(input_ids), torch.tensor(labels), pictures, num_tiles, subsegment_ids
        )

    def remarks(self, record: Record) -> list[SkipSampleError]:
        """Keys that nobody reads, and turns behind the last reply."""
        conversations = [record.messages, *record.others]
        lengths = [(len(until_last_reply(messages)), len(messages)) for messages in conversations]
        num_dropped = sum(length - end for end, length in lengths if end)
        detail = f"{num_dropped} messages after its last reply teach nothing and are left out."
        unanswered = [SkipSampleError(record.name, UNANSWERED, detail)] if num_dropped else []
        return [*unanswered, *super().remarks(record)]

    def cuts(self, record: Record) -> Iterator[tuple[Record, Record]]:
        """Cut between conversations about the same pictures, or between the turns of a single one."""
        for place in range(len(record.others), 0, -1):
            yield record.part(range(place)), record.part(range(place, record.num_conversations))
        if record.others or record.is_last_reply_taught:
            return
        ends = [number + 1 for number, message in enumerate(record.messages) if message["role"] == "assistant"]
        for end in reversed(ends[:-1]):
            start, following = record.messages[:end], continue_conversation(record.messages, end)
            yield dataclasses.replace(record, messages=start), dataclasses.replace(record, messages=following)

    def replies_apart(self, record: Record) -> list[Record]:
        """The conversations of a record, or those of one that end at each of its replies and teach that one."""
        if record.others:
            return [record.part([place]) for place in range(record.num_conversations)]
        ends = [number + 1 for number, message in enumerate(record.messages) if message["role"] == "assistant"]
        if len(ends) < 2 or record.is_last_reply_taught:
            return []
        return [
            dataclasses.replace(record, messages=record.messages[:end], is_last_reply_taught=True)
            for end in ends
            if _has_text(record.messages[end - 1])
        ]

    def _encode(
        self, name: str, messages: list[dict], num_tiles: list[int], is_last_taught: bool = False
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of one conversation whose pictures have so many tiles."""
        replies = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not any(_has_text(messages[number]) for number in replies):
            raise SkipSampleError(name, "no supervised token", "no reply to learn from.")
        replies = replies[-1:] if is_last_taught else replies
        prompts = [messages[:number] for number in replies]
        answered = [messages[: number + 1] for number in replies]
        starts = self.encode(name, prompts, num_tiles, add_generation_prompt=True)
        ends = self.encode(name, answered, num_tiles)
        input_ids = ends[-1]
        found = list(zip(starts, ends, strict=True))
        if any(input_ids[: len(end)] != end or end[: len(start)] != start for start, end in found):
            input_ids, found = self._encode_in_pieces(name, prompts, answered, num_tiles)
        labels = [IGNORE_INDEX] * len(input_ids)
        special = special_ids(self.processor.tokenizer)
        for start, end in found:
            stop = max((place for place in range(len(start), len(end)) if end[place] in special), default=len(end) - 1)
            labels[len(start) : stop + 1] = end[len(start) : stop + 1]
        if not self.processor.tokenizer.decode(input_ids[stop + 1 :]).strip():  # a line break teaches nothing
            input_ids, labels = input_ids[: stop + 1], labels[: stop + 1]
        return input_ids, labels

    def _encode_in_pieces(
        self, name: str, prompts: list[list[dict]], answered: list[list[dict]], num_tiles: list[int]
    ) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        """Ids of a conversation in which a token would reach over the beginning or the end of a reply.

        A reply that begins with line breaks is such: with the one before it they make another token. What stands
        before a reply is encoded as when the model is asked, and the reply by itself, as the model says it.

        Returns:
            The ids, and for each reply those before and those up to its end.
        """
        with_prompt = self.render(name, prompts, add_generation_prompt=True)
        chats = [chat for pair in zip(with_prompt, self.render(name, answered), strict=True) for chat in pair]
        ids = self.processor._encode_pieces(chats[0], _placeholders(self.processor, chats[0], num_tiles))
        borders = [ids]
        for before, after in itertools.pairwise(chats):
            added = continue_prompt(self.processor, before, after, num_tiles)
            if added is None:
                has_question = any(message["role"] == "user" for message in prompts[0])
                if len(prompts) == 1 and not has_question:
                    raise SkipSampleError(
                        name, "no question", "the model speaks first, which its template cannot show."
                    )
                detail = "the chat template rewrites earlier turns; replies cannot be located."
                raise SkipSampleError(name, REWRITTEN, detail)
            borders.append(borders[-1] + added)
        return borders[-1], list(zip(borders[::2], borders[1::2], strict=True))


def _placeholders(processor: HoVLEProcessor, prompt: Prompt, num_tiles: list[int]) -> list[int]:
    return [processor.image_seq_length * count for count in num_tiles[: len(prompt.pictures)]]


def continue_prompt(
    processor: HoVLEProcessor, before: Prompt, after: Prompt, num_tiles: list[int]
) -> list[int] | None:
    """Ids of what a rendered chat has more than another one with which it begins; None where it does not."""
    known, pieces = _comparable(before), _comparable(after)
    place = len(known) - 1
    if pieces[:place] != known[:place] or not pieces[place].startswith(known[place]):
        return None
    rest = after.pieces[place][len(known[place]) :]
    if (
        after.pieces[place + 1 : place + 2]
        and after.pieces[place + 1] in SpecialTokens.of(processor.tokenizer).strip_left
    ):
        rest = rest.rstrip()
    following = Prompt(["", *after.pieces[place + 1 :]], after.pictures[len(before.pictures) :], [], False, after.mark)
    num_shown = len(before.pictures)
    return processor._encode_text(rest, at_start=False) + processor._encode_pieces(
        following, _placeholders(processor, following, num_tiles[num_shown:])
    )


def _comparable(prompt: Prompt) -> list[str]:
    """Pieces of a prompt with one sign for each picture mark, which differ from prompt to prompt."""
    return ["\0" if prompt.is_mark(index) else piece for index, piece in enumerate(prompt.pieces)]


def _has_text(message: dict) -> bool:
    content = message["content"]
    return bool(content if isinstance(content, str) else any(item.get("text") for item in content))


def continue_conversation(messages: list[dict], start: int) -> list[dict]:
    """The messages from a place on, after the system message and with the pictures of those left out."""
    system = messages[:1] if messages[0]["role"] == "system" else []
    pictures = [picture_item(picture) for picture in picture_sources(messages[:start])]
    first, *others = messages[start:]
    content = first["content"]
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [*system, {**first, "content": [*pictures, *items]} if pictures else first, *others]


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
    subsegment_ids = [0] * shared
    for branch, (ids, labels) in enumerate(conversations, 1):
        joint_ids = joint_ids + ids[shared:]
        joint_labels = joint_labels + labels[shared:]
        subsegment_ids = subsegment_ids + [branch] * (len(ids) - shared)
    return joint_ids, joint_labels, subsegment_ids


def special_ids(tokenizer) -> set[int]:
    """Ids that stand for no ordinary text: special and added tokens."""
    return set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)


def reply_end_ids(processor: HoVLEProcessor) -> list[int]:
    """Special tokens with which replies end as training teaches them; none where the chat template ends them in words.

    A reply in the middle of a conversation may end otherwise than the last one.
    """
    turns = [(role, text) for text in ("1", "2") for role in ("user", "assistant")]
    messages = [{"role": role, "content": text} for role, text in turns]
    made = ReplySamples(processor).make_all(Record("two turns", messages), 0, max_tokens=sys.maxsize)
    special = special_ids(processor.tokenizer)
    ends: dict[int, None] = {}
    for sample in (item for item in made if isinstance(item, Sample)):
        labels = [*sample.labels.tolist(), IGNORE_INDEX]
        last = [label for label, following in itertools.pairwise(labels) if following == IGNORE_INDEX]
        ends |= dict.fromkeys(label for label in last if label in special)
    return list(ends)


class RandomTextSamples(SampleMaker):
    """Pictures with unrelated random tokens (`distillation`): the whole vocabulary is covered, no pairs are needed.

    Args:
        processor: Of the student.
        num_random_tokens: After the picture, and as many again in the reply.
        seed: Of the random tokens.
        words: Lays what the records' regions say over the image tokens; None where that is not taught.
    """

    STAND_IN = "\uf8ff"
    """Marks in the rendered chat where random tokens go: a private character no template contains."""

    def __init__(self, processor: HoVLEProcessor, num_random_tokens: int, seed: int, words: WordLayout | None = None):
        super().__init__(processor)
        self.words = words
        self.num_random_tokens = num_random_tokens
        self.seed = seed
        tokenizer = processor.tokenizer
        special = special_ids(tokenizer)
        self.ordinary_ids = torch.tensor([index for index in range(len(tokenizer)) if index not in special])
        # A SentencePiece tokenizer puts a space before what starts a text or follows a picture, but not a line break.
        ways = [processor._encode_text(text, at_start=False) for text in (self.STAND_IN, "\n" + self.STAND_IN)]
        self.stand_in_ids = _common_end(*ways)

    def make(self, record: Record, index: int) -> Sample:
        """Place a picture in a user turn, random ordinary tokens after it and as many again in the reply."""
        pictures = picture_sources(record.messages)[:1]
        if not pictures:
            raise SkipSampleError(record.name, NO_PICTURE, "no picture to distil.")
        num_tiles = self.count_tiles(record.name, pictures)
        [ids] = self.encode(record.name, [conversation(pictures[0], self.STAND_IN, self.STAND_IN)], num_tiles)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        input_ids = torch.tensor(self._with_random_tokens(ids, generator))
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        words = self._words(record, pictures[0]) if self.words else None
        return Sample(record.name, index, input_ids, labels, pictures, num_tiles, words=words)

    def _words(self, record: Record, picture: str | bytes) -> WordTargets:
        assert self.words is not None  # `make` asks
        return self.words.targets(record.regions, *picture_size(picture), record.name)

    def picture_keys(self, pictures: list[str | bytes]) -> list[str]:
        """Names of the pictures by their content, under which a cache knows the teacher's features."""
        return [picture_key(picture) for picture in pictures]

    def _with_random_tokens(self, ids: list[int], generator: torch.Generator) -> list[int]:
        length = len(self.stand_in_ids)
        places = [start for start in range(len(ids)) if ids[start : start + length] == self.stand_in_ids]
        if len(places) != 2:
            raise RecipeError(f"The chat template shows {len(places)} of 2 turns; random text has no place in it.")
        for place in reversed(places):
            chosen = torch.randint(len(self.ordinary_ids), (self.num_random_tokens,), generator=generator)
            ids[place : place + length] = self.ordinary_ids[chosen].tolist()
        return ids


def _common_end(left: list[int], right: list[int]) -> list[int]:
    """The longest end that two lists share."""
    length = 0
    while length < min(len(left), len(right)) and left[-1 - length] == right[-1 - length]:
        length += 1
    return left[len(left) - length :]
