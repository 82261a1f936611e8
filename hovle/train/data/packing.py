"""Packing: samples fill rows of fixed length whole, and the stream of packed batches continues exactly.

Invariants, which tests hold:

- A step of the run has `gradient_accumulation_steps x processes` micro-batches, whoever computes them. Micro-batch `n`
  of the run belongs to shard `n % num_shards`, where there are as many shards as micro-batches in a step.
- A shard is a stream of its own: it takes stream indices `shard, shard + num_shards, ...` and packs them. Its batches
  depend on the recipe and on its number alone, neither on other shards nor on processes and workers.
- Process `r` of `w` computes shards `r, r + w, ...`. The position of the data is the positions of all shards, so a run
  goes on with another number of processes as long as the number of shards stays: no sample is lost, none repeated.
- A skipped sample leaves its index empty; no other one moves.
- Windows of language text are counted apart: a shard takes windows `shard, shard + num_shards, ...` of theirs.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..config import StageConfig
from .batch import BatchLayout, BatchPlan, PackedBatch
from .language import LanguageText, TextWindow
from .mixture import Mixture, MixtureReader
from .records import Records
from .samples import ReplySamples, Sample, SampleMaker, was_split
from .skips import MOST_IN_A_ROW, NO_FAULTS, Skip, SkipBudgetError, SkipSampleError, count_skips, describe_skips


@dataclass(frozen=True)
class ShardPosition:
    """Where one shard stands between two of its batches."""

    next_index: int
    """Stream index it draws next."""
    pending: list[list[int]] = field(default_factory=list)
    """Index and part of the samples it has drawn but not packed."""
    streams: dict[int, dict] = field(default_factory=dict)
    """Source number -> state of a streamed source before the oldest pending sample."""
    num_windows: int = 0
    """Windows of language text it has drawn."""


@dataclass(frozen=True)
class StreamPosition:
    """Where a run's data stands between two steps; plain values, so that a checkpoint can hold them."""

    shards: dict[int, ShardPosition] = field(default_factory=dict)
    """Shard number -> position; empty at the beginning. A process knows its own shards, a checkpoint all of them."""

    @classmethod
    def join(cls, parts: Sequence[dict]) -> "StreamPosition":
        """Put together the positions of all processes, each as `dataclasses.asdict` gives it.

        Older checkpoints call the shards `lanes`.
        """
        saved = [part["lanes"] if "lanes" in part else part["shards"] for part in parts]
        shards = {number: ShardPosition(**shard) for part in saved for number, shard in part.items()}
        return cls(dict(sorted(shards.items())))


def pack_rows(
    window: list[Sample], free: Sequence[int], max_tiles: int | None = None
) -> tuple[list[list[Sample]], list[Sample]]:
    """Pack whole samples into rows: the oldest first, so that none waits for ever, then the longest that fit.

    Args:
        window: Samples in the order they were drawn, none longer than the emptiest row.
        free: Tokens each row has room for.
        max_tiles: Tiles all rows may hold together; None for any number. No sample has more.

    Returns:
        The rows, and the samples that found no place, in their order.
    """
    free = list(free)
    rows: list[list[Sample]] = [[] for _ in free]
    free_tiles = float("inf") if max_tiles is None else max_tiles
    left = []
    for sample in [*window[:1], *sorted(window[1:], key=lambda item: -item.num_inputs)]:
        length, num_tiles = sample.num_inputs, sum(sample.num_tiles)
        fitting = [row for row in range(len(rows)) if free[row] >= length]
        if not fitting or num_tiles > free_tiles:
            left.append(sample)
            continue
        row = min(fitting, key=lambda candidate: free[candidate])  # best fit: the fullest row that has room
        rows[row].append(sample)
        free[row] -= length
        free_tiles -= num_tiles
    return rows, sorted(left, key=lambda sample: (sample.index, sample.part))


class Shard:
    """One packed stream of samples; see the invariants above.

    Args:
        number: Its first stream index.
        num_shards: From one of its indices to the next.
        mixture: What it reads.
        maker: Turns a record and its stream index into samples.
        config: Row count, row length and window.
        start: Where it continues.
        once: Whether it ends where a source would begin again.
        language: Text with which some rows begin.
    """

    def __init__(
        self,
        number: int,
        num_shards: int,
        mixture: Mixture,
        maker: SampleMaker,
        config: StageConfig,
        start: ShardPosition,
        once: bool = False,
        language: LanguageText | None = None,
    ):
        self.number = number
        self.num_windows = start.num_windows
        self.language = language
        self.num_shards = num_shards
        self.mixture = mixture
        self.maker = maker
        self.config = config
        self.once = once
        self.is_over = False
        self.reader = MixtureReader(mixture, number, num_shards, start.streams)
        self.next_index = start.next_index
        self.window: list[Sample] = []
        self.lost: list[Skip] = []
        self._restore(start)
        self._forget_counts()

    def _restore(self, start: ShardPosition) -> None:
        """Make the pending samples again; streams are read again from the oldest of them on.

        What cannot be made any more is counted with the next batch.
        """
        parts: dict[int, list[int]] = {}
        for index, part in start.pending:
            parts.setdefault(index, []).append(part)
        for index in range(min(parts, default=start.next_index), start.next_index, self.num_shards):
            if index in parts:
                made, _ = self._make(index)
                for part in parts[index]:
                    item = made[part] if part < len(made) else made[-1]
                    self._take_pending(item, index, part)
            elif self.reader.reads_stream(index):
                with contextlib.suppress(SkipSampleError):
                    self.reader.record_at(index)

    def _take_pending(self, item: Sample | SkipSampleError, index: int, part: int) -> None:
        """Put a pending sample that was made again into the window, or note why it was not."""
        if isinstance(item, Sample) and item.part == part:
            self.window.append(item)
            return
        reason, detail = "changed data", f"it has no part {part + 1} now."
        if isinstance(item, SkipSampleError) and item.reason not in NO_FAULTS:
            reason, detail = item.reason, item.detail
        detail = f"drawn before the run was resumed, lost since: {detail}"
        epoch = self.reader.epoch_of(index)
        self.lost.append(Skip(self.label_of(index), reason, item.name, detail, index, epoch))

    def _forget_counts(self) -> None:
        self.num_drawn = self.num_split = self.num_skipped_in_a_row = 0
        self.skips: list[Skip] = []

    @property
    def position(self) -> ShardPosition:
        """Where it continues after the last batch it gave."""
        pending = [[sample.index, sample.part] for sample in self.window]
        oldest = pending[0][0] if pending else self.next_index
        return ShardPosition(self.next_index, pending, self.reader.states(oldest), self.num_windows)

    def next_rows(self) -> list[list[Sample]]:
        """Draw until there is enough to choose from, and pack one batch; rows stay empty once it is over."""
        self._forget_counts()
        self.skips, self.lost = self.lost, []
        config = self.config
        num_plain = config.rows_per_batch - config.num_language_rows
        free = [config.row_length] * num_plain
        free += [config.row_length - config.language_length] * config.num_language_rows
        wanted = sum(free)
        while not self.is_over and (
            len(self.window) < config.packing_window or sum(item.num_inputs for item in self.window) < wanted
        ):
            self._draw()
        rows, self.window = pack_rows(self.window, free, config.max_tiles_per_batch)
        return rows

    def next_windows(self) -> list[TextWindow]:
        """Draw the language text of one batch."""
        if self.language is None:
            return []
        drawn = range(self.num_windows, self.num_windows + self.config.num_language_rows)
        self.num_windows = drawn.stop
        return [self.language.window_at(self.number + count * self.num_shards) for count in drawn]

    def _draw(self) -> None:
        made, num_conversations = self._make(self.next_index)
        if self.once and self.reader.epoch_of(self.next_index) > 0:
            self.is_over = True
            return
        place = self.next_index, self.reader.epoch_of(self.next_index)
        label = self.label_of(self.next_index)
        self.next_index += self.num_shards
        self.num_drawn += num_conversations
        self.num_split += was_split(made)
        faults = [item for item in made if isinstance(item, SkipSampleError)]
        self.window += [item for item in made if isinstance(item, Sample)]
        self.skips += [Skip(label, fault.reason, fault.name, fault.detail, *place) for fault in faults]
        self.num_skipped_in_a_row = self.num_skipped_in_a_row + 1 if len(faults) == len(made) else 0
        if self.num_skipped_in_a_row >= MOST_IN_A_ROW:
            raise SkipBudgetError(
                f"{MOST_IN_A_ROW} samples in a row had to be skipped.\n{describe_skips(*count_skips(self.skips))}\n"
                "`hovle data doctor RECIPE` looks through the data."
            )

    def _make(self, index: int) -> tuple[list[Sample | SkipSampleError], int]:
        """What the record of an index gives, and how many conversations it holds."""
        try:
            record = self.reader.record_at(index)
        except SkipSampleError as error:
            return [error], 1
        made = self.maker.make_all(record, index, self.config.longest_sample, self.config.max_tiles_per_batch)
        for item in made:
            if isinstance(item, Sample):
                item.epoch = self.reader.epoch_of(index)
        return made, record.num_conversations

    def label_of(self, index: int) -> str:
        """What the source of an index is called."""
        return self.mixture.labels[self.mixture.place(index)[0]]


class PackedBatches(IterableDataset):
    """Packed batches of one process, endless or once through the records.

    Args:
        records: A mixture, or the records of a single source.
        maker: Turns a record and its stream index into samples.
        config: Rows, window and seed; with the processes, its micro-batches make the shards.
        start: Where the stream continues, for resuming; it must know this process's shards, or be empty.
        rank: This process.
        world_size: Processes that share the shards.
        pad_token_id: Fills row ends.
        once: Whether a shard ends where a source would begin again; its last batch may hold skips only.
        language: Text without pictures for the recipe's `language`; without it no row begins with any.
    """

    def __init__(
        self,
        records: Mixture | Records,
        maker: SampleMaker,
        config: StageConfig,
        start: StreamPosition,
        rank: int,
        world_size: int,
        pad_token_id: int,
        once: bool = False,
        language: LanguageText | None = None,
    ):
        self.once = once
        self.language = language
        if language is None:  # then samples have the rows for themselves
            config = dataclasses.replace(config, language=None)
        self.mixture = records if isinstance(records, Mixture) else Mixture([records], config.seed)
        self.maker = maker
        self.config = config
        self.start = start
        self.num_shards = config.gradient_accumulation_steps * world_size
        self.shard_numbers = range(rank, self.num_shards, world_size)
        missing = [number for number in self.shard_numbers if start.shards and number not in start.shards]
        if missing:
            raise ValueError(
                f"The position to continue from knows {len(start.shards)} shards, not {missing}: keep "
                "gradient_accumulation_steps x processes."
            )
        has_branches = isinstance(maker, ReplySamples) and self.mixture.has_branches
        self.layout = BatchLayout(maker, config.row_length, pad_token_id, has_branches)

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yield batches; `position` of a batch is where a resumed stream continues."""
        return map(self.layout.complete, self.plans())

    def plans(self) -> Iterator[BatchPlan]:
        """Yield batches that lack their pixels."""
        shards = {
            number: Shard(
                number,
                self.num_shards,
                self.mixture,
                self.maker,
                self.config,
                self.start.shards.get(number, ShardPosition(number)),
                self.once,
                self.language,
            )
            for number in self.shard_numbers
        }
        positions = {number: shard.position for number, shard in shards.items()}
        turns = collections.deque(shards)
        while turns:
            number = turns.popleft()
            shard = shards[number]
            rows = shard.next_rows()
            if not (any(rows) or shard.skips):
                continue
            turns.append(number)
            windows = shard.next_windows()
            positions = {**positions, number: shard.position}
            yield dataclasses.replace(
                self.layout.lay_out(rows, shard.label_of, windows),
                position=StreamPosition(positions),
                num_drawn=shard.num_drawn,
                num_split=shard.num_split,
                skips=shard.skips,
            )


class _Plans(IterableDataset):
    """The plans of a process's batches."""

    def __init__(self, batches: PackedBatches):
        self.batches = batches

    def __iter__(self) -> Iterator[BatchPlan]:
        return self.batches.plans()


class _Completed(Dataset):
    """Completes the plan it is asked for."""

    def __init__(self, layout: BatchLayout):
        self.layout = layout

    def __getitem__(self, plan: BatchPlan) -> PackedBatch:
        return self.layout.complete(plan)


def load_batches(batches: PackedBatches, num_workers: int) -> Iterator[PackedBatch]:
    """Prepare batches in worker processes; in the same order, and the same ones, however many there are.

    Args:
        batches: What to prepare.
        num_workers: 0: this process does it. 1: another one does. More: one plans, the others read pictures.
    """
    options: dict = {
        "batch_size": None,
        "generator": torch.Generator(),
    }  # a draw from the global one moves a resumed run
    if num_workers <= 1:
        return iter(DataLoader(batches, num_workers=num_workers, **options))
    plans: DataLoader = DataLoader(_Plans(batches), num_workers=1, **options)
    return iter(DataLoader(_Completed(batches.layout), sampler=plans, num_workers=num_workers - 1, **options))
