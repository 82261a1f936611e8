"""Text without pictures, on which a run holds the language: documents laid end to end and cut into windows.

A window may begin within a document and hold several; positions begin anew with each document, and with the window.
The last twentieth of the windows, at least one, is never trained on: validation measures there.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ...language.documents import encode_row, read_text_documents
from ...model.processing_hovle import HoVLEProcessor
from ..config import HuggingFaceData, StageConfig

HELD_OUT = 20
"""One window in so many is held out."""

FIELD = "language.source"


class TextWindow(NamedTuple):
    """Text at the beginning of a row, each of shape `(W,)`."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    """Numbers of its documents from 0 on."""


class LanguageText:
    """Windows of a text in an order of their own in each epoch, which depends on the seed alone.

    Args:
        documents: Token ids of each document; an empty one counts for nothing.
        length: Tokens of a window.
        seed: Of the order.
        held_out: Whether to give the windows that training never sees, in their order.

    Raises:
        ValueError: For a text of fewer than two windows.
    """

    def __init__(self, documents: list[list[int]], length: int, seed: int, held_out: bool = False):
        self.length = length
        self.seed = seed
        self.held_out = held_out
        lengths = torch.tensor([len(document) for document in documents], dtype=torch.long)
        self.ends = lengths.cumsum(0)
        self.ids = torch.tensor([token for document in documents for token in document], dtype=torch.int32)
        num_whole = len(self.ids) // length
        if num_whole < 2:
            raise ValueError(
                f"{FIELD} has {len(self.ids)} tokens, but one window of {length} to train on and one to hold out take "
                f"{2 * length}: name a longer text."
            )
        num_held_out = max(1, num_whole // HELD_OUT)
        border = len(self.ids) - num_held_out * length
        if held_out:
            starts = torch.arange(border, len(self.ids), length)
        else:  # the last one ends at the border: it shares tokens with the one before it, so that none is left out
            starts = torch.arange(0, border, length).clamp(max=border - length)
        self.starts = starts
        self._order: tuple[int, torch.Tensor] | None = None

    @property
    def fingerprint(self) -> str:
        """Short hash of tokens and windows, to notice changed text when resuming."""
        digest = hashlib.sha256(self.ids.numpy().tobytes())
        digest.update(repr((self.ends.tolist(), self.length)).encode())
        return digest.hexdigest()[:16]

    def window_at(self, index: int) -> TextWindow:
        """Window of an index: every epoch visits each window once."""
        epoch, place = divmod(index, len(self.starts))
        if not self.held_out:
            place = int(self._order_of(epoch)[place])
        start = int(self.starts[place])
        places = torch.arange(start, start + self.length)
        number = torch.searchsorted(self.ends, places, right=True)  # of the document each token lies in
        begins = torch.cat([self.ends.new_zeros(1), self.ends])[number].clamp(min=start)
        document_ids = torch.cat([number.new_zeros(1), number.diff().ne(0).long()]).cumsum(0)
        return TextWindow(self.ids[start : start + self.length].long(), places - begins, document_ids)

    def _order_of(self, epoch: int) -> torch.Tensor:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 15_485_863 + epoch)
            self._order = epoch, torch.randperm(len(self.starts), generator=generator)
        return self._order[1]


def open_language(config: StageConfig, processor: HoVLEProcessor) -> tuple[LanguageText, LanguageText] | None:
    """The text a recipe names, for training and held out; None where it names none."""
    if config.language is None:
        return None
    documents = list(read_documents(config.language.source, processor))
    training, held_out = (
        LanguageText(documents, config.language_length, config.seed, is_held_out) for is_held_out in (False, True)
    )
    return training, held_out


def read_documents(source: str, processor: HoVLEProcessor) -> Iterator[list[int]]:
    """Token ids of each document of a source; ValueError, which names it, where one cannot be read."""
    path = Path(source)
    if path.is_dir() or path.suffix in (".parquet", ".arrow"):
        from .huggingface import open_dataset

        for number, row in enumerate(open_dataset(HuggingFaceData(path=source)).rows):
            yield encode_row(row, f"{path.name}[{number}]", processor, FIELD)
    else:
        yield from read_text_documents(source, processor, FIELD)
