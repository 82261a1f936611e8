"""What the answers of `hovle serve` may hold; without its packages, as its options name it."""

from dataclasses import dataclass

MAX_REQUESTS = 128
"""Requests in work or waiting, where whoever starts the server does not say; those beyond are told to come again."""


@dataclass(frozen=True)
class BatchLimits:
    """What all answers in work may hold.

    Attributes:
        num_rows: Answers in work at a time.
        cache_bytes: Of their keys and values, each at its longest; one answer may always be in work.
        prefix_bytes: Of keys and values that are kept for prompts that begin as an earlier one did.
    """

    num_rows: int = 32
    cache_bytes: int = 4 * 2**30
    prefix_bytes: int = 2**30
