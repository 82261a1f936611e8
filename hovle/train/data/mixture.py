"""Mixture: which record of which source stands at a stream index.

Both depend on the seed and the index alone, whatever was drawn before, so a run continues from plain numbers. Only a
streamed source has to be read in order; whoever reads it keeps its place (`MixtureReader`).
"""

import contextlib
import functools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch

from ..config import DataConfig, StageConfig
from .readers import fingerprint_records, load_part
from .records import Record, Records, RecordStream
from .skips import SkipSampleError

BLOCK = 256
"""Draws whose sources are chosen together: shares are exact to a sample at the end of each block."""


class Mixture:
    """Several sources read in proportion to their weights, each of them epoch by epoch in an order of its own.

    Args:
        sources: Sequences of records, or streams of them (`open_shard`).
        seed: Of the order of sources and records.
        weights: One per source, in any unit; equal by default.
        labels: What the sources are called.
    """

    def __init__(
        self,
        sources: Sequence[Records | RecordStream],
        seed: int,
        weights: Sequence[float] | None = None,
        labels: Sequence[str] | None = None,
    ):
        self.sources = list(sources)
        self.lists = {number: item for number, item in enumerate(sources) if not isinstance(item, RecordStream)}
        self.streams = {number: item for number, item in enumerate(sources) if isinstance(item, RecordStream)}
        self.seed = seed
        self.weights = [Fraction(str(weight)) for weight in weights or [1] * len(self.sources)]
        self.labels = list(labels or [f"source {number}" for number in range(len(self.sources))])
        self._orders: dict[tuple[int, int], torch.Tensor] = {}
        self._blocks: dict[int, tuple[list[int], list[int]]] = {}

    @functools.cached_property
    def has_branches(self) -> bool:
        """Whether samples may hold several conversations."""
        return any(
            any(record.has_branches for record in records)
            if isinstance(records, list)
            else getattr(records, "has_branches", False)
            for records in self.sources
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Short hash of all sources, to notice changed data when resuming."""
        return "+".join(fingerprint_records(records) for records in self.sources)

    def place(self, index: int) -> tuple[int, int]:
        """Source of a stream index, and how many samples of it come before."""
        if len(self.sources) == 1:
            return 0, index
        block, place = divmod(index, BLOCK)
        if block not in self._blocks:
            before = apportion(self.weights, block * BLOCK)
            after = apportion(self.weights, (block + 1) * BLOCK)
            chosen = [source for source, start in enumerate(before) for _ in range(start, after[source])]
            generator = torch.Generator().manual_seed(self.seed * 104_729 + block)
            order = [chosen[number] for number in torch.randperm(BLOCK, generator=generator).tolist()]
            _remember(self._blocks, block, (order, before))
        order, before = self._blocks[block]
        return order[place], before[order[place]] + order[:place].count(order[place])

    def record_at(self, index: int) -> Record:
        """Record of a stream index: every epoch of a source visits each record once, with draws of its own."""
        source, number = self.place(index)
        records = self.lists[source]
        epoch, position = divmod(number, len(records))
        if (source, epoch) not in self._orders:
            generator = torch.Generator().manual_seed(self.seed * 7919 + epoch + 1_000_000_007 * source)
            order = torch.randperm(len(records), generator=generator)
            _remember(self._orders, (source, epoch), order)
        record = records[int(self._orders[source, epoch][position])]
        return record.draw(self.seed * 1_000_003 + index)

    @property
    def num_records(self) -> int | None:
        """Records of all sources; None where one is a stream, whose end nobody knows."""
        return None if self.streams else sum(len(records) for records in self.lists.values())

    def size_of(self, label: str, num_drawn: int) -> float:
        """Records of the sources of a name; of a stream, what is expected of it among so many draws of all."""
        parts = [
            num_drawn * float(weight / sum(self.weights)) if isinstance(records, RecordStream) else len(records)
            for own, records, weight in zip(self.labels, self.sources, self.weights, strict=True)
            if own == label
        ]
        return sum(parts)

    def describe(self) -> list[str]:
        """One line per source: its name, size and share; then what they leave aside."""
        sizes = [describe_size(records) for records in self.sources]
        shares = [float(weight / sum(self.weights)) for weight in self.weights]
        lines = [
            f"{label}: {size}" + (f", {share:.1%} of the samples" if len(shares) > 1 else "")
            for label, size, share in zip(self.labels, sizes, shares, strict=True)
        ]
        return lines + self.left_aside

    @property
    def left_aside(self) -> list[str]:
        """One line for each kind of file that a source does not read."""
        return [
            f"{label}: {line}"
            for label, records in zip(self.labels, self.sources, strict=True)
            for line in getattr(records, "left_aside", ())
        ]

    def first_records(self, count: int) -> Iterator[Record]:
        """Read up to so many records from the beginning of the stream, without those that cannot be read."""
        reader = MixtureReader(self, 0, 1, {})
        for index in range(min(count, self.num_records or count)):
            with contextlib.suppress(SkipSampleError):
                yield reader.record_at(index)


def describe_size(records: Records | RecordStream) -> str:
    """How many records a source has, and of how many conversations these are made if some share a record."""
    if isinstance(records, RecordStream):
        return "a stream"
    num_conversations = getattr(records, "num_conversations", len(records))
    is_shared = num_conversations > len(records)
    return f"{len(records):,} records" + (f" of {num_conversations:,} conversations" if is_shared else "")


def _remember(cache: dict, key, value, size: int = 8) -> None:
    """Keep the last few values: readers go to and fro at a border only."""
    if len(cache) >= size:
        del cache[next(iter(cache))]
    cache[key] = value


def apportion(weights: Sequence[Fraction], count: int) -> list[int]:
    """Share so many draws by weight after Sainte-Lague, in which no share ever falls as the count grows."""
    # At this threshold nobody has too many; the few draws left go where (2 n + 1) / weight is smallest.
    threshold = (count - len(weights)) / sum(weights)
    shares = [max(0, math.floor(threshold * weight + Fraction(1, 2))) for weight in weights]
    for _ in range(count - sum(shares)):
        next_one = min(range(len(weights)), key=lambda source: (2 * shares[source] + 1) / weights[source])
        shares[next_one] += 1
    return shares


class MixtureReader:
    """Reads every `num_shards`-th record of a mixture in order, keeping the places of its streams.

    Args:
        mixture: What is read.
        shard: Number of this reader among those that share the streams.
        num_shards: How many there are.
        states: Source number -> state of its stream to continue from, as `states` gave it.
    """

    def __init__(self, mixture: Mixture, shard: int, num_shards: int, states: dict[int, dict]):
        self.mixture = mixture
        self.streams = {
            number: records.open_shard(shard, num_shards, mixture.seed, states.get(number))
            for number, records in mixture.streams.items()
        }
        self._passed: dict[int, deque[tuple[int, dict]]] = {number: deque() for number in self.streams}

    def reads_stream(self, index: int) -> bool:
        """Whether the record of an index comes from a stream, which must be read in order."""
        return self.mixture.place(index)[0] in self.streams

    def epoch_of(self, index: int) -> int:
        """How often its source had begun again when the record of an index, the last one read, came."""
        number, place = self.mixture.place(index)
        if number in self.streams:
            return self.streams[number].epoch
        return place // len(self.mixture.lists[number])

    def record_at(self, index: int) -> Record:
        """Record of an index; indices must rise where they fall on streams."""
        number, _ = self.mixture.place(index)
        if number not in self.streams:
            return self.mixture.record_at(index)
        stream = self.streams[number]
        self._passed[number].append((index, stream.state()))
        return stream.next_record()

    def states(self, oldest: int) -> dict[int, dict]:
        """States from which the records of `oldest` and later indices can be read again."""
        for passed in self._passed.values():
            while passed and passed[0][0] < oldest:
                passed.popleft()
        return {
            number: self._passed[number][0][1] if self._passed[number] else stream.state()
            for number, stream in self.streams.items()
        }


def open_mixture(configs: Sequence[DataConfig], seed: int, held_out: bool = False) -> Mixture:
    """Open the sources of a recipe: what is trained on, or what they hold out.

    Args:
        configs: The sources; with `held_out`, those that hold anything out.
        seed: Of the order.
        held_out: Whether to take the other part of sources that are divided.
    """
    return Mixture(
        [load_part(config, held_out) for config in configs],
        seed,
        [config.weight for config in configs],
        [config.label for config in configs],
    )


def open_held_out(config: StageConfig) -> Mixture:
    """What a stage measures and does not train on: `validation`, or what its sources hold out."""
    if config.validation is not None:
        return open_mixture([config.validation], config.seed)
    return open_mixture([source for source in config.data if source.held_out], config.seed, held_out=True)
