"""Packing: rows, masks, shards and where they continue."""

import dataclasses
import itertools

import pytest
import torch

from hovle import HoVLEProcessor
from hovle.train.config import load_stage
from hovle.train.data.batch import PackedBatch, branch_mask
from hovle.train.data.mixture import open_mixture
from hovle.train.data.packing import PackedBatches, StreamPosition, load_batches, pack_rows
from hovle.train.data.records import Record
from hovle.train.data.samples import ReplySamples, Sample, SampleMaker
from hovle.train.data.skips import SkipBudgetError, SkipSampleError
from hovle.train.data.transforms import make_transform
from hovle.train.model.start import start_processor


def test_a_token_looks_back_at_its_own_beginning_and_branch_only():
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, -1]])
    branches = torch.tensor([[0, 1, 1, 2, 0, 1, 0]])
    seen = [row.nonzero().flatten().tolist() for row in branch_mask(documents, branches)[0, 0]]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 3], [4], [4, 5], [6]]


def sample_of(length: int, index: int) -> Sample:
    """A sample that takes `length` places: all its tokens are supervised, so the last one is only predicted."""
    ids = torch.arange(1, length + 2) + 100 * index
    return Sample(f"sample {index}", index, ids, ids.clone(), [f"picture {index}"], [1])


class FixedLengths(SampleMaker):
    """Makes samples whose length depends on their stream index alone; no length: a bad one."""

    def __init__(self, lengths: list[int | None], damaged: set[int], num_tiles: int):
        self.lengths, self.damaged, self.num_tiles = lengths, damaged, num_tiles

    def make(self, record: Record, index: int) -> Sample:
        length = self.lengths[index % len(self.lengths)]
        if length is None:
            raise SkipSampleError(f"sample {index}", "no supervised token", "no reply to learn from.")
        return dataclasses.replace(sample_of(length, index), num_tiles=[self.num_tiles])

    def load_pixels(self, name, pictures, num_tiles) -> torch.Tensor:
        indices = [int(picture.split()[1]) for picture in pictures]
        if self.damaged.intersection(indices):
            raise SkipSampleError(name, "unreadable picture", f"{pictures[0]}: truncated.")
        return torch.tensor(indices, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2)


@pytest.fixture
def stream(next_token_config):
    """`stream(lengths, position, rank, world_size, **fields)`: packed batches of samples of these lengths."""

    def build(
        lengths, position=None, rank=0, world_size=1, num_records=10, damaged=(), num_tiles=1, once=False, **fields
    ) -> PackedBatches:
        fields = {"rows_per_batch": 2, "row_length": 20, "packing_window": 4, **fields}
        return PackedBatches(
            [Record(f"record {number}", []) for number in range(num_records)],
            FixedLengths(lengths, set(damaged), num_tiles),
            dataclasses.replace(next_token_config(), **fields),
            position or StreamPosition(),
            rank,
            world_size,
            pad_token_id=0,
            once=once,
        )

    return build


def test_samples_are_packed_whole_with_positions_of_their_own(stream):
    batch = next(iter(stream([9, 7, 5, 3])))
    for row in range(2):
        starts = [*(batch.position_ids[row] == 0).nonzero().flatten().tolist(), 20]
        for start, end in itertools.pairwise(starts):
            assert batch.position_ids[row, start:end].tolist() == list(range(end - start))
            if not batch.is_sample[row, start]:
                assert end == 20  # padding, at the end only
                assert (batch.targets[row, start:] == -100).all()
                continue
            index = int(batch.input_ids[row, start]) // 100
            expected = sample_of(end - start, index)
            assert torch.equal(batch.input_ids[row, start:end], expected.input_ids[:-1])
            assert torch.equal(batch.targets[row, start:end], expected.input_ids[1:])  # none of the next sample


def test_pictures_follow_the_rows_in_order(stream):
    for batch in itertools.islice(stream([9, 7, 5, 3, 8]), 5):
        is_start = (batch.position_ids == 0) & batch.is_sample
        in_rows = (batch.input_ids[is_start] // 100).tolist()
        assert batch.pixel_values[:, 0, 0, 0].tolist() == in_rows
        assert batch.names == [f"sample {index}" for index in in_rows]


def test_no_sample_is_lost_repeated_or_kept_waiting(stream):
    taken: list[int] = []
    for batch in itertools.islice(stream([18, 3, 11, 6, 20, 2, 9]), 60):
        taken += [int(name.split()[1]) for name in batch.names]
    assert len(taken) == len(set(taken))
    until = 100
    assert set(range(until)) <= set(taken)
    assert max(abs(index - place) for place, index in enumerate(taken)) <= 8  # twice the window


def test_once_takes_every_record_once_and_ends(stream):
    lengths = [18, 3, 11, 6, 20, 2, 9]
    found = list(stream(lengths, num_records=17, damaged=(4, 9), once=True))
    taken = [int(name.split()[1]) for batch in found for name in batch.names]
    assert sorted(taken) == [index for index in range(17) if index not in (4, 9)]
    assert [batch.names for batch in found[:2]] == [
        batch.names for batch in itertools.islice(stream(lengths, num_records=17, damaged=(4, 9)), 2)
    ]
    assert sum(batch.num_drawn for batch in found) == 17
    assert len([skip for batch in found for skip in batch.skips]) == 2
    [only_skips] = stream(lengths, num_records=3, damaged=(0, 1, 2), once=True)
    assert (only_skips.names, len(only_skips.skips), bool(only_skips.is_sample.any())) == ([], 3, False)


def test_the_window_grows_until_it_can_fill_the_batch(stream):
    batch = next(iter(stream([2], packing_window=1)))
    assert batch.is_sample.all()


def test_a_larger_window_wastes_less(stream):
    def filled(window: int) -> float:
        batches = itertools.islice(stream([13, 11, 12, 14, 13, 6, 7, 9], packing_window=window), 20)
        return float(torch.stack([batch.is_sample.float().mean() for batch in batches]).mean())

    assert filled(12) > filled(1) + 0.02


def test_best_fit_leaves_the_shortest():
    rows, left = pack_rows([sample_of(length, index) for index, length in enumerate([4, 3, 9, 6, 2])], [10, 10])
    assert [[sample.index for sample in row] for row in rows] == [[0, 3], [2]]
    assert [sample.index for sample in left] == [1, 4]


def test_an_overlong_sample_is_left_out_and_counted_not_cut(stream):
    batch = next(iter(stream([5, 20, 21])))
    assert "record 2" not in batch.names
    [skip, *_] = batch.skips
    assert (skip.source, skip.reason) == ("source 0", "over-long")
    assert "has 21 tokens, more than row_length (20)" in skip.detail
    assert batch.num_drawn > len(batch.skips) >= 1


def test_ranks_share_the_stream_without_overlap(stream):
    taken = []
    for rank in range(3):
        indices: list[int] = []
        for batch in itertools.islice(stream([9, 4, 7], rank=rank, world_size=3), 12):
            indices += [int(name.split()[1]) for name in batch.names]
        assert all(index % 3 == rank for index in indices)
        taken.append(indices)
    assert not set(taken[0]) & set(taken[1])


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_stream_continues_from_its_position(stream, world_size):
    lengths = [18, 3, 11, 6, 20, 2, 9]
    rank = world_size - 1
    straight = list(itertools.islice(stream(lengths, None, rank, world_size), 8))
    resumed = itertools.islice(stream(lengths, straight[3].position, rank, world_size), 4)
    for expected, found in zip(straight[4:], resumed, strict=True):
        assert found.names == expected.names
        assert torch.equal(found.input_ids, expected.input_ids)
        assert found.position == expected.position


def indices_of(batches) -> list[int]:
    return [int(name.split()[1]) for batch in batches for name in batch.names]


def assert_same(found: PackedBatch, expected: PackedBatch) -> None:
    for name in ("input_ids", "targets", "position_ids", "is_sample", "pixel_values"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    for name in ("names", "position", "skips", "num_drawn", "num_split"):
        assert getattr(found, name) == getattr(expected, name)


LENGTHS = [18, 3, 11, None, 6, 20, 2, 9, 21]
"""Of a stream with a sample that cannot be used and one that is too long."""


def steps_of(stream, num_steps, world_size, num_shards, start=None) -> tuple[list[list[PackedBatch]], StreamPosition]:
    """Micro-batches of each step over all processes, in the order of their shards, and where the data then stands."""
    fields = {"gradient_accumulation_steps": num_shards // world_size}
    ranks = [iter(stream(LENGTHS, start, rank, world_size, **fields)) for rank in range(world_size)]
    steps = [[next(ranks[shard % world_size]) for shard in range(num_shards)] for _ in range(num_steps)]
    reached = [dataclasses.asdict(batch.position) for batch in steps[-1][-world_size:]]
    return steps, StreamPosition.join(reached)


def test_a_run_continues_with_another_number_of_processes(stream):
    straight, _ = steps_of(stream, 9, world_size=1, num_shards=4)
    found, position = [], None
    for world_size in (1, 2, 4, 1):
        steps, position = steps_of(stream, 2, world_size, num_shards=4, start=position)
        found += steps
    for expected_step, found_step in zip(straight, found, strict=False):
        assert [batch.names for batch in found_step] == [batch.names for batch in expected_step]
        for expected, batch in zip(expected_step, found_step, strict=True):
            assert torch.equal(batch.input_ids, expected.input_ids)
    taken = indices_of(batch for step in found for batch in step)
    assert len(taken) == len(set(taken)) > 60
    pending = {index for shard in position.shards.values() for index, _ in shard.pending}
    until = min(shard.next_index for shard in position.shards.values())
    usable = {index for index in range(until) if LENGTHS[index % len(LENGTHS)] not in (None, 21)}
    assert usable <= set(taken) | pending  # none lost
    assert not pending & set(taken)  # none repeated


def test_a_position_of_fewer_shards_is_refused(stream):
    _, position = steps_of(stream, 1, world_size=1, num_shards=2)
    with pytest.raises(ValueError, match=r"knows 2 shards, not \[2\]: keep gradient_accumulation_steps x processes"):
        stream(LENGTHS, position, gradient_accumulation_steps=3)


def test_skips_are_counted_once_however_often_a_run_is_resumed(stream):
    straight, _ = steps_of(stream, 6, world_size=1, num_shards=2)
    found, position = [], None
    for _ in range(6):
        steps, position = steps_of(stream, 1, 1, num_shards=2, start=position)
        found += steps
    for name in ("skips", "num_drawn"):
        assert [getattr(batch, name) for step in found for batch in step] == [
            getattr(batch, name) for step in straight for batch in step
        ]
    assert sum(len(batch.skips) for step in found for batch in step) > 5


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_pending_sample_that_is_gone_when_the_run_resumes_is_counted(stream, num_workers):
    lengths = [9, 7, 5, 3, 8, 6, 2, 7, 4, 3]
    [batch] = itertools.islice(stream(lengths, packing_window=8), 1)
    lost = [index for index, _ in batch.position.shards[0].pending][-1]
    damaged = [None if place == lost else length for place, length in enumerate(lengths)]
    resumed = load_batches(stream(damaged, batch.position, packing_window=8), num_workers)
    taken = list(itertools.islice(resumed, 6))
    assert lost not in indices_of(taken)
    [skip] = [skip for found in taken for skip in found.skips if skip.name == f"sample {lost}"]
    assert skip in taken[0].skips
    assert (skip.source, skip.reason) == ("source 0", "no supervised token")
    assert "drawn before the run was resumed, lost since: no reply" in skip.detail


def test_a_pending_part_of_a_conversation_that_is_shorter_now_is_counted(stream):
    [batch] = itertools.islice(stream([9, 7, 5, 3, 8]), 1)
    shard = batch.position.shards[0]
    pending = [*shard.pending[:-1], [shard.pending[-1][0], 1]]  # a second part, which no sample has here
    position = StreamPosition({0: dataclasses.replace(shard, pending=pending)})
    [resumed] = itertools.islice(stream([9, 7, 5, 3, 8], position), 1)
    [skip] = resumed.skips
    assert (skip.name, skip.reason) == (f"sample {pending[-1][0]}", "changed data")
    assert "no part 2" in skip.detail


def test_a_skipped_sample_moves_no_other(stream):
    places = {}
    for lengths in ([9, 7, 5, 3, 8], [9, 7, None, 3, 8]):
        batches = stream(lengths, packing_window=1, rows_per_batch=1, row_length=9)
        places[lengths[2]] = {index for index in indices_of(itertools.islice(batches, 40)) if index < 30}
    assert places[5] == set(range(30))
    assert places[None] == {index for index in range(30) if index % 5 != 2}


def test_a_picture_that_turns_out_damaged_takes_its_sample_out_of_the_row(stream):
    [whole], [batch] = (itertools.islice(stream([9, 7, 3], damaged=bad), 1) for bad in ((), (1, 3)))
    kept = [name for name in whole.names if name not in ("sample 1", "sample 3")]
    assert batch.names == kept != whole.names
    assert [(skip.reason, skip.name) for skip in batch.skips] == [
        ("unreadable picture", name) for name in whole.names if name not in kept
    ]
    assert "truncated" in batch.skips[0].detail
    assert batch.position == whole.position
    is_start = (batch.position_ids == 0) & batch.is_sample
    assert [f"sample {index}" for index in (batch.input_ids[is_start] // 100).tolist()] == kept
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [float(name.split()[1]) for name in kept]
    for row in range(2):
        length = int(batch.is_sample[row].sum())
        assert batch.is_sample[row, :length].all()  # no gap
        assert batch.position_ids[row, length:].tolist() == list(range(20 - length))
        assert (batch.targets[row, length:] == -100).all()


def test_a_stream_without_a_usable_sample_stops_with_the_reasons(stream):
    with pytest.raises(
        SkipBudgetError, match=r"(?s)200 samples in a row.*source 0: no supervised token.*sample 1: no"
    ):
        next(iter(stream([None])))


def test_a_batch_holds_no_more_tiles_than_its_budget(stream):
    batches = list(itertools.islice(stream([5, 4, 3], num_tiles=3, max_tiles_per_batch=10), 12))
    assert all(len(batch.names) == 3 for batch in batches)  # 10 tokens per row would take 8 of them
    taken = indices_of(batches)
    assert len(taken) == len(set(taken))
    assert set(range(24)) <= set(taken)


def test_a_sample_with_more_tiles_than_the_budget_is_left_out(stream):
    with pytest.raises(SkipBudgetError, match=r"has 3 tiles, more than max_tiles_per_batch \(2\)"):
        next(iter(stream([5], num_tiles=3, max_tiles_per_batch=2)))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_prepare_the_same_batches(stream, num_workers):
    def batches(workers: int) -> list[PackedBatch]:
        source = stream(LENGTHS, damaged=(4, 7), gradient_accumulation_steps=3)
        return list(itertools.islice(load_batches(source, workers), 7))

    for found, expected in zip(batches(num_workers), batches(0), strict=True):
        assert_same(found, expected)


def test_a_batch_moves_with_all_its_tensors_and_keeps_the_rest(stream):
    batch = next(iter(stream(LENGTHS)))
    moved = batch.to(torch.device("meta"))
    for name, item in vars(batch).items():
        if isinstance(item, torch.Tensor):
            assert getattr(moved, name).is_meta
            assert not item.is_meta
        else:
            assert getattr(moved, name) is item


def test_rows_are_nearly_full_when_lengths_have_a_long_tail(stream):
    generator = torch.Generator().manual_seed(0)
    tail = torch.exp(4.5 + 1.1 * torch.randn(997, generator=generator)).int().clamp(8, 2048)
    assert tail.float().mean() > 1.5 * tail.float().median()
    batches = stream(tail.tolist(), row_length=2048, packing_window=64, num_records=997)
    filled = torch.stack([batch.is_sample.float().mean() for batch in itertools.islice(batches, 60)]).mean()
    assert filled >= 0.97  # measured 0.99


@pytest.mark.parametrize("recipe", ["demo/distillation", "demo/alignment"])
def test_rows_of_the_demo_are_nearly_full(recipe):
    config = load_stage(recipe)
    num_text, _ = config.language.layout(config.rows_per_batch, config.row_length)
    config = dataclasses.replace(
        config, language=None, stop_when_forgetting=None, rows_per_batch=config.rows_per_batch - num_text
    )
    processor = start_processor(load_stage("demo/distillation").model)
    mixture, maker = open_mixture(config.data, config.seed), make_transform(config, processor)
    plans = PackedBatches(mixture, maker, config, StreamPosition(), 0, 1, 0).plans()
    filled = torch.stack(
        [(plan.tokens["document_ids"] >= 0).float().mean() for plan in itertools.islice(plans, 12)]
    ).mean()
    assert filled >= 0.97  # measured 1.0 and 0.993


def test_a_batch_of_text_alone_has_no_tiles(checkpoints, next_token_config):
    processor = HoVLEProcessor.from_pretrained(checkpoints["tied"])
    messages = [{"role": "user", "content": "A tree?"}, {"role": "assistant", "content": "Yes"}]
    records = [Record("text", messages)]
    batch = next(iter(PackedBatches(records, ReplySamples(processor), next_token_config(), StreamPosition(), 0, 1, 0)))
    assert batch.pixel_values.shape == (0, 3, 56, 56)
