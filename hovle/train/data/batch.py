"""The packed batch, which all objectives receive, and how rows of samples become one."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch

from ...model.modeling_hovle import IGNORE_INDEX
from .language import TextWindow
from .samples import Sample, SampleMaker
from .skips import Skip, SkipSampleError
from .words import WordTargets, join_targets

if TYPE_CHECKING:
    from .packing import StreamPosition


@dataclass(frozen=True, kw_only=True, eq=False)
class TileBatch:
    """Tiles of the pictures of some samples: all that a teacher looks at."""

    pixel_values: torch.Tensor
    """Tiles in the order of their placeholders, uint8, shape `(N, 3, s, s)`."""
    names: list[str] = field(default_factory=list)
    """Of the samples."""
    picture_keys: list[str] = field(default_factory=list)
    """SHA-256 of each picture's file, where they are needed."""

    def to(self, device: torch.device) -> Self:
        """The same on a device; plain values stay as they are."""
        tensors: dict[str, Any] = {name: item for name, item in vars(self).items() if isinstance(item, torch.Tensor)}
        return dataclasses.replace(self, **{name: item.to(device) for name, item in tensors.items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch(TileBatch):
    """B rows of T tokens, each filled with whole samples; positions begin anew with each."""

    input_ids: torch.Tensor
    """Shape `(B, T)`."""
    targets: torch.Tensor
    """The token to predict at each place, `IGNORE_INDEX` where none is; shape `(B, T)`."""
    position_ids: torch.Tensor
    """0 where a sample begins, and where padding does; shape `(B, T)`."""
    is_sample: torch.Tensor
    """False at padding, bool, shape `(B, T)`."""
    attention_mask: torch.Tensor | None = None
    """Who may look at whom, bool, shape `(B, 1, T, T)`; None where positions tell: at earlier tokens of a sample."""
    num_language_rows: int = 0
    """Last rows that begin with text without pictures and targets, on which the language is held."""
    language_length: int = 0
    """Tokens of it in each of these rows."""
    word_ids: torch.Tensor | None = None
    """What each image token should say, of the vocabulary, or `NO_WORD` of `words`; shape `(N, S)`. This and the next
    three are None where words are not taught."""
    is_filler: torch.Tensor | None = None
    """Image tokens that should say that there is nothing to read, shape `(N, S)`."""
    character_ids: torch.Tensor | None = None
    """Characters over each image token, shape `(N, S, slots)`; see `words.WordTargets`."""
    num_pieces: torch.Tensor | None = None
    """Pieces of each sample's regions, and how many of them found no token; shape `(samples, 2)`."""
    position: "StreamPosition | None" = None
    """Where a resumed stream continues behind this batch."""
    num_drawn: int = 0
    """Records drawn for it."""
    num_split: int = 0
    """Of them conversations that were cut between turns."""
    skips: list[Skip] = field(default_factory=list)
    """Samples that could not be used."""

    @property
    def is_supervised(self) -> torch.Tensor:
        """True where there is a token to predict, shape `(B, T)`."""
        return self.targets != IGNORE_INDEX

    def language_part(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the language text, shape `(rows, length, ...)`, out of those of all places, `(B, T, ...)`."""
        return values[len(values) - self.num_language_rows :, : self.language_length]

    @property
    def num_tokens(self) -> int:
        """Tokens of its samples; padding is none."""
        return int(self.is_sample.sum())


class Place(NamedTuple):
    """Where a sample lies in a packed batch, and what is still to be read for it."""

    source: str
    record: int
    epoch: int
    name: str
    row: int
    start: int
    end: int
    pictures: list[str | bytes]
    num_tiles: list[int]
    words: WordTargets | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchPlan:
    """A packed batch before any picture is read."""

    tokens: dict[str, torch.Tensor]
    """Shapes `(B, T)`: what `BatchLayout.fills` names."""
    places: list[Place]
    num_language_rows: int = 0
    language_length: int = 0
    position: "StreamPosition | None" = None
    num_drawn: int = 0
    num_split: int = 0
    skips: list[Skip] = field(default_factory=list)


class BatchLayout:
    """Makes packed batches of rows of samples, in two parts that different processes may do.

    Args:
        maker: Made the samples and reads their pictures.
        row_length: Tokens of a row.
        pad_token_id: Fills row ends.
        has_branches: Whether samples may hold several conversations: then every batch has a mask, for one graph.
    """

    def __init__(self, maker: SampleMaker, row_length: int, pad_token_id: int, has_branches: bool = False):
        self.maker = maker
        self.row_length = row_length
        self.has_branches = has_branches
        # What stands where no sample is; padding is a document of its own.
        self.fills = {
            "input_ids": pad_token_id,
            "targets": IGNORE_INDEX,
            "position_ids": 0,
            "document_ids": -1,
            "subsegment_ids": 0,
        }

    def lay_out(
        self,
        rows: Sequence[Sequence[Sample]],
        label_of: Callable[[int], str],
        windows: Sequence[TextWindow] = (),
    ) -> BatchPlan:
        """Token tensors, and where each sample lies in them.

        Args:
            rows: Samples of each row, which fit in it.
            label_of: Says what the source of a stream index is called.
            windows: Text of equal length with which as many of the last rows begin.
        """
        tokens = {name: torch.full((len(rows), self.row_length), fill) for name, fill in self.fills.items()}
        places = []
        texts = [None] * (len(rows) - len(windows)) + [*windows]
        for row, (text, samples) in enumerate(zip(texts, rows, strict=True)):
            end = num_documents = 0
            if text is not None:
                end = len(text.input_ids)
                tokens["input_ids"][row, :end] = text.input_ids
                tokens["position_ids"][row, :end] = text.position_ids
                tokens["document_ids"][row, :end] = text.document_ids
                num_documents = int(text.document_ids[-1]) + 1
            for number, sample in enumerate(samples, num_documents):
                start, end = end, end + sample.num_inputs
                tokens["input_ids"][row, start:end] = sample.input_ids[sample.is_input]
                tokens["targets"][row, start:end] = sample.targets[sample.is_input]
                tokens["position_ids"][row, start:end] = sample.position_ids[sample.is_input]
                tokens["document_ids"][row, start:end] = number
                if sample.subsegment_ids is not None:
                    tokens["subsegment_ids"][row, start:end] = sample.subsegment_ids[sample.is_input]
                label = label_of(sample.index)
                what = label, sample.index, sample.epoch, sample.name
                pictures = sample.pictures, sample.num_tiles, sample.words
                places.append(Place(*what, row, start, end, *pictures))
        length = len(windows[0].input_ids) if windows else 0
        return BatchPlan(tokens=tokens, places=places, num_language_rows=len(windows), language_length=length)

    def complete(self, plan: BatchPlan) -> PackedBatch:
        """Read the pixels of a plan; samples with a damaged picture are taken out of their rows."""
        pixel_values: list[torch.Tensor] = []
        names, picture_keys, words, skips, damaged = [], [], [], list(plan.skips), []
        for place in plan.places:
            try:
                pixel_values.append(self.maker.load_pixels(place.name, place.pictures, place.num_tiles))
                names.append(place.name)
                picture_keys += self.maker.picture_keys(place.pictures)
                words.append(place.words)
            except SkipSampleError as error:
                skips.append(Skip(place.source, error.reason, error.name, error.detail, place.record, place.epoch))
                damaged.append(place)
        tokens = plan.tokens
        for place in reversed(damaged):  # from the end of a row, so that the others' places hold
            self._take_out(tokens, place)
        is_sample = tokens["document_ids"] >= 0
        for row, end in enumerate(is_sample.sum(dim=1).tolist()):
            tokens["position_ids"][row, end:] = torch.arange(self.row_length - end)
        # Joined with none, tiles would lose their order in memory; a batch without pictures still has their shape.
        pixel_values = [tiles for tiles in pixel_values if len(tiles)] or [self.maker.load_pixels("none", [], [])]
        mask = branch_mask(tokens["document_ids"], tokens["subsegment_ids"]) if self.has_branches else None
        layout = self.maker.words
        targets = join_targets([layout.nothing(), *filter(None, words)]) if layout else {}
        return PackedBatch(
            input_ids=tokens["input_ids"],
            targets=tokens["targets"],
            position_ids=tokens["position_ids"],
            is_sample=is_sample,
            pixel_values=torch.cat(pixel_values),
            attention_mask=mask,
            num_language_rows=plan.num_language_rows,
            language_length=plan.language_length,
            **targets,
            names=names,
            picture_keys=picture_keys,
            position=plan.position,
            num_drawn=plan.num_drawn,
            num_split=plan.num_split,
            skips=skips,
        )

    def _take_out(self, tokens: dict[str, torch.Tensor], place: Place) -> None:
        """Close the gap of a sample in its row; padding grows by its length."""
        for name, fill in self.fills.items():
            line = tokens[name][place.row]
            padding = line.new_full((place.end - place.start,), fill)
            tokens[name][place.row] = torch.cat([line[: place.start], line[place.end :], padding])


def branch_mask(document_ids: torch.Tensor, subsegment_ids: torch.Tensor) -> torch.Tensor:
    """Who may look at whom, `(B, 1, T, T)`, bool: at earlier tokens of the same document, outside other branches.

    Args:
        document_ids: Equal within a document, shape `(B, T)`.
        subsegment_ids: 0 in a document's shared beginning, shape `(B, T)`.
    """
    same_document = document_ids[:, :, None] == document_ids[:, None, :]
    same_branch = (subsegment_ids[:, :, None] == subsegment_ids[:, None, :]) | (subsegment_ids[:, None, :] == 0)
    return (same_document & same_branch).tril()[:, None]
