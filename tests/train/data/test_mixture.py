"""Mixture: which record stands at a stream index."""

import itertools
from collections import Counter
from fractions import Fraction

import pytest

from hovle.train.config import ChatData, PictureData
from hovle.train.data.mixture import BLOCK, Mixture, apportion, open_mixture
from hovle.train.data.records import Record


def records_of(label: str, count: int) -> list[Record]:
    return [Record(f"{label}{number}", []) for number in range(count)]


def names(mixture: Mixture, indices) -> list[str]:
    return [mixture.record_at(index).name for index in indices]


def test_every_epoch_visits_each_record_once_in_an_order_of_its_own():
    mixture = Mixture([records_of("a", 7)], seed=0)
    epochs = [names(mixture, range(epoch * 7, epoch * 7 + 7)) for epoch in range(3)]
    assert all(sorted(epoch) == [f"a{number}" for number in range(7)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert mixture.record_at(3).name == epochs[0][3]  # going back is possible


@pytest.mark.parametrize("weights", [[1, 1], [0.7, 0.2, 0.1], [5, 1, 1, 0.013]])
def test_sources_are_drawn_in_exact_proportion(weights):
    mixture = Mixture([records_of(chr(97 + number), 10) for number in range(len(weights))], 3, weights)
    num_draws = 40 * BLOCK
    drawn = Counter(mixture.place(index)[0] for index in range(num_draws))
    for source, weight in enumerate(weights):
        assert drawn[source] == pytest.approx(num_draws * weight / sum(weights), abs=1)


def test_each_source_of_a_mixture_goes_through_its_own_epochs():
    mixture = Mixture([records_of("a", 30), records_of("b", 5)], seed=1, weights=[3, 1])
    drawn = names(mixture, range(2 * BLOCK))
    for label, size in (("a", 30), ("b", 5)):
        own = [name for name in drawn if name.startswith(label)]
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == sorted(f"{label}{n}" for n in range(size))


def test_a_draw_depends_on_seed_and_index_alone():
    def mixture(seed: int) -> Mixture:
        return Mixture([records_of("a", 30), records_of("b", 5)], seed, weights=[3, 1])

    straight = names(mixture(0), range(1000))
    jumping = mixture(0)
    for index in (999, 0, 513, 256, 255, 512, 1):
        assert jumping.record_at(index).name == straight[index]
    assert names(mixture(1), range(1000)) != straight


def test_shards_get_the_same_mixture():
    mixture = Mixture([records_of("a", 30), records_of("b", 5)], seed=0, weights=[1, 1])
    for shard in range(4):
        drawn = Counter(mixture.place(index)[0] for index in range(shard, 4000, 4))
        assert 0.4 < drawn[0] / 1000 < 0.6


def test_no_share_falls_as_the_count_grows():
    weights = [Fraction(w) for w in ("5", "1", "0.3", "0.013", "2.5")]
    shares = [apportion(weights, count) for count in range(300)]
    for count, (before, after) in enumerate(itertools.pairwise(shares)):
        assert sum(before) == count
        assert all(old <= new for old, new in zip(before, after, strict=True))


def test_a_recipes_sources_are_described_with_their_shares(data):
    sources = [
        ChatData(path=str(data / "chat.jsonl"), weight=3),
        PictureData(path=str(data / "pictures"), name="photos"),
    ]
    mixture = open_mixture(sources, seed=0)
    assert mixture.describe() == [
        "chat:chat.jsonl: 18 records, 75.0% of the samples",
        "photos: 12 records, 25.0% of the samples",
    ]
    assert mixture.fingerprint != open_mixture(sources[:1], seed=0).fingerprint
    assert len(list(mixture.first_records(100))) == 30
