"""Skips: what cannot be trained on is counted by reason and named, and too much of it stops the run.

A sample that is left out moves no other one: its place in the stream stays empty.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ...errors import StopRunError, printable_name

if TYPE_CHECKING:
    from .batch import PackedBatch

NO_PICTURE = "no picture"
"""Reason of a text-only conversation in distillation."""

UNANSWERED = "unanswered turn"
"""Reason of what follows the last reply of a conversation, which is used without it."""

UNREAD_KEY = "unread key"
"""Reason of a key of a row that nobody reads; the rest of the row is used."""

FILM = "video or audio"
"""Reason of a row about what no model of this kind sees."""

NO_FAULTS = frozenset({NO_PICTURE, UNANSWERED, UNREAD_KEY})
"""Reasons that are counted, but no fault, so the budget does not see them."""

FEWEST_RECORDS = 1000
"""The share of bad records is taken of at least so many: one bad file among ten is no trend."""

MOST_IN_A_ROW = 200
"""So many skips without a good sample between them stop a stream, which might never fill a batch."""

NUM_WORST = 10
"""Names an error lists."""


class SkipSampleError(ValueError):
    """A sample that cannot be used.

    Args:
        name: Of the sample or its record.
        reason: A few words that many samples share; skips are counted by it.
        detail: What is wrong with this one.
    """

    num_parts = 1
    """Parts its record was cut into; this is one of them."""

    def __init__(self, name: str, reason: str, detail: str):
        super().__init__(f"{name}: {detail}")
        self.name, self.reason, self.detail = name, reason, detail

    def __reduce__(self):
        """Workers send it to the main process."""
        return type(self), (self.name, self.reason, self.detail)


class RecipeError(ValueError):
    """A fault that lies in no single record, so it ends the run at once."""


@contextlib.contextmanager
def sparing_the_run(name: str) -> Iterator[None]:
    """Turn whatever goes wrong with one record into a skip by its name; too many of them stop the run.

    What says that the process is ill passes: no memory, a broken assertion.
    """
    try:
        yield
    except (SkipSampleError, RecipeError, StopRunError, MemoryError, AssertionError):
        raise
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise SkipSampleError(name, "unexpected", f"{kind}{error!s:.500}") from error


class SkipBudgetError(StopRunError):
    """More records are bad than `max_skip_fraction` allows; the message lists reasons and the worst offenders."""


class Skip(NamedTuple):
    """One skipped sample; plain values, so that processes can exchange it."""

    source: str
    reason: str
    name: str
    detail: str
    record: int = 0
    """Stream index of its record."""
    epoch: int = 0
    """How often its source had begun again."""


def most_bad(max_fraction: float, num_records: float) -> float:
    """Records of a source that may be bad before a run stops; the run and `hovle data doctor` ask here.

    Each counts once, however often it is read and whatever is wrong with it.
    """
    return max_fraction * max(num_records, FEWEST_RECORDS)


@dataclass
class SkipLedger:
    """Counts of a run over all processes: fed with batches (`add`), brought up to date by `share`."""

    max_fraction: float
    """Largest share of a source's records that may be bad."""
    size_of: Callable[[str, int], float] = field(default=lambda source, num_drawn: num_drawn, compare=False)
    """Says how many records a source has when so many were drawn of all; a stream's are those drawn of it."""
    num_drawn: int = 0
    """Conversations drawn so far, those skipped included."""
    num_split: int = 0
    """Conversations that were cut between turns because they are longer than a row."""
    reasons: Counter = field(default_factory=Counter)
    """(source, reason) -> skipped samples."""
    worst: Counter = field(default_factory=Counter)
    """(name, detail) -> times skipped."""
    bad: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    """(source, epoch) -> stream indices of its records with a fault; an epoch reads each record once."""
    _own: list[tuple[int, int, list[Skip]]] = field(default_factory=list)

    def add(self, batch: "PackedBatch") -> None:
        """Take note of what was drawn for a batch of this process; `share` counts it."""
        self._own.append((batch.num_drawn, batch.num_split, batch.skips))

    def share(self, gather: Callable[[list], list] = list) -> list[Skip]:
        """Count what all processes noted since the last call.

        Args:
            gather: Joins the lists of all processes.

        Returns:
            The new skips.
        """
        noted = gather(self._own)
        self._own = []
        skips = [Skip(*skip) for _, _, some in noted for skip in some]
        self.num_drawn += sum(drawn for drawn, _, _ in noted)
        self.num_split += sum(split for _, split, _ in noted)
        self.reasons.update((skip.source, skip.reason) for skip in skips)
        faults = [skip for skip in skips if skip.reason not in NO_FAULTS]
        self.worst.update((skip.name, skip.detail) for skip in faults)
        for skip in faults:
            self.bad.setdefault((skip.source, skip.epoch), set()).add(skip.record)
        return skips

    def check(self) -> None:
        """Raise SkipBudgetError, on every process alike, when too many records of a source are bad."""
        for (source, _), records in self.bad.items():
            size = self.size_of(source, self.num_drawn)
            if len(records) > most_bad(self.max_fraction, size):
                raise SkipBudgetError(
                    f"{len(records):,} records of {source} cannot be used, more than max_skip_fraction "
                    f"({self.max_fraction:g}) of {max(round(size), FEWEST_RECORDS):,} allows.\n"
                    f"{describe_skips(self.reasons, self.worst)}\nRepair the data (`hovle data doctor RECIPE` looks "
                    "through it), or raise max_skip_fraction."
                )

    def summary(self) -> dict:
        """Counts since the beginning of the run, for its log."""
        by_reason: Counter = Counter()
        for (_, reason), count in self.reasons.items():
            by_reason[reason] += count
        return {
            "samples_drawn": self.num_drawn,
            "samples_skipped": dict(by_reason),
            "samples_split": self.num_split,
        }

    def state_dict(self) -> dict:
        """Plain values for a checkpoint."""
        return {
            "num_drawn": self.num_drawn,
            "num_split": self.num_split,
            "reasons": [[*key, count] for key, count in self.reasons.items()],
            "worst": [[*key, count] for key, count in self.worst.items()],
            "bad": [[*key, sorted(records)] for key, records in self.bad.items()],
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint's counts."""
        self.num_drawn, self.num_split = state["num_drawn"], state["num_split"]
        self.reasons = Counter({(source, reason): count for source, reason, count in state["reasons"]})
        self.worst = Counter({(name, detail): count for name, detail, count in state["worst"]})
        self.bad = {(source, epoch): set(records) for source, epoch, records in state.get("bad", ())}


def describe_skips(reasons: Counter, worst: Counter) -> str:
    """Lines of counts by source and reason, and of the names skipped most often."""
    lines = [f"  {count:6,}  {printable_name(source)}: {reason}" for (source, reason), count in reasons.most_common()]
    lines += [
        f"  {printable_name(name)}: {printable_name(detail)}" for (name, detail), _ in worst.most_common(NUM_WORST)
    ]
    if len(worst) > NUM_WORST:
        lines.append(f"  ... and {len(worst) - NUM_WORST:,} more")
    return "\n".join(lines)


def count_skips(skips: Iterable[Skip]) -> tuple[Counter, Counter]:
    """Count skips by (source, reason) and by (name, detail)."""
    skips = list(skips)
    return Counter((skip.source, skip.reason) for skip in skips), Counter((skip.name, skip.detail) for skip in skips)
