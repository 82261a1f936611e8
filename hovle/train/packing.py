"""Packing: samples fill rows of fixed length whole, and the stream of packed batches continues exactly."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.utils.data import IterableDataset

from ..modeling_hovle import IGNORE_INDEX
from .config import StageConfig
from .samples import RandomTextSamples, ReplySamples, Sample
from .sources import Record


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
