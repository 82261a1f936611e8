"""Skips: counts over processes and resumed runs, and the budget that stops a run."""

from types import SimpleNamespace

import pytest

from hovle.train.data.skips import NO_PICTURE, UNANSWERED, Skip, SkipBudgetError, SkipLedger


def batch_of(num_drawn: int, *reasons: str) -> SimpleNamespace:
    skips = [Skip("chat", reason, f"line {place}", f"{reason}!", place) for place, reason in enumerate(reasons)]
    return SimpleNamespace(num_drawn=num_drawn, num_split=1, skips=skips)


def counted(max_fraction: float, *batches: SimpleNamespace, **fields) -> SkipLedger:
    ledger = SkipLedger(max_fraction, **fields)
    for batch in batches:
        ledger.add(batch)
    ledger.share()
    return ledger


def test_reasons_are_counted_over_all_batches():
    ledger = counted(1, batch_of(10, "missing file", "over-long"), batch_of(5, "over-long"))
    assert ledger.summary() == {
        "samples_drawn": 15,
        "samples_skipped": {"missing file": 1, "over-long": 2},
        "samples_split": 2,
    }
    assert ledger.share() == []  # each is new once


def test_processes_count_together():
    other = [(7, 0, [Skip("b", "missing file", "x", "gone")])]
    ledger = SkipLedger(1)
    ledger.add(batch_of(10, "missing file"))
    assert len(ledger.share(lambda own: own + other)) == 2
    assert ledger.summary()["samples_skipped"] == {"missing file": 2}
    assert ledger.num_drawn == 17


@pytest.mark.parametrize(("size", "num_skipped", "is_fine"), [(10, 1, True), (10, 2, False), (3000, 3, True)])
def test_the_budget_is_a_share_of_a_thousand_records_at_least(size, num_skipped, is_fine):
    ledger = counted(0.001, batch_of(5, *["missing file"] * num_skipped), size_of=lambda source, num_drawn: size)
    if is_fine:
        ledger.check()
    else:
        expected = r"(?s)2 records of chat cannot .* of 1,000 allows.*chat: missing file.*line 0: missing file!"
        with pytest.raises(SkipBudgetError, match=expected):
            ledger.check()


def test_a_record_that_every_epoch_reads_again_is_one_bad_record():
    skips = [Skip("chat", "missing file", "line 3", "gone", 10 * epoch + 3, epoch) for epoch in range(5)]
    parts = [Skip("chat", "missing file", f"line 3 ({part} of 2)", "gone", 3, 0) for part in (1, 2)]
    other = [Skip("notes", "missing file", "line 3", "gone", 4, 0)]
    ledger = counted(0.001, SimpleNamespace(num_drawn=50, num_split=0, skips=[*skips, *parts, *other]))
    ledger.check()  # one of each source
    assert ledger.summary()["samples_skipped"] == {"missing file": 8}  # every time it was read
    ledger.add(SimpleNamespace(num_drawn=1, num_split=0, skips=[Skip("chat", "over-long", "line 4", "", 44, 4)]))
    ledger.share()
    with pytest.raises(SkipBudgetError, match="2 records of chat"):
        ledger.check()


def test_only_the_worst_names_are_listed():
    ledger = counted(0, *[batch_of(1, *["missing file"] * 30)] * 3)
    with pytest.raises(SkipBudgetError, match=r"\.\.\. and 20 more"):
        ledger.check()


@pytest.mark.parametrize("reason", [NO_PICTURE, UNANSWERED])
def test_a_conversation_without_a_picture_and_an_unanswered_turn_are_counted_but_no_faults(reason):
    ledger = counted(0, batch_of(10, *[reason] * 5))
    ledger.check()
    assert ledger.summary()["samples_skipped"] == {reason: 5}


def test_a_checkpoint_brings_the_counts_back():
    ledger = counted(1, batch_of(10, "missing file", "over-long"))
    other = SkipLedger(1)
    other.load_state_dict(ledger.state_dict())
    assert other == ledger
    assert other.bad == {("chat", 0): {0, 1}}
    del (older := ledger.state_dict())["bad"]  # which an earlier version did not write
    other.load_state_dict(older)
    assert other.bad == {}
