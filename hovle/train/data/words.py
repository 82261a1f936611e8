"""Words for image tokens: the text of a picture's regions, laid over the tokens that show it.

Canvas and thumbnail are two sheets of tokens (`TileGrid.token_sheets`), each of which shows the whole picture evenly
stretched; every region is laid on both. What is smaller there than `words.min_pixels` is not asked for.

- A line of text: each piece of the tokenizer, encoded as the line stands, has the token in which it ends; where that
  is taken, the next one to the right, which has seen the piece as well where tokens see earlier ones only. The row is
  the one in which the line is nearly passed. A space has the token it lies in, where no piece ends there.
- A name: its pieces, as within a sentence, have the last tokens of the box in reading order, which have seen most of
  it.
- In a picture all of whose regions are lines, tokens elsewhere say that there is nothing to read (the filler). In
  others they are left to the teacher.

A piece that finds no token is counted.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ...model.modeling_hovle import IGNORE_INDEX
from ...model.processing_hovle import HoVLEProcessor
from ...model.tiling import TileGrid
from ..config import StageConfig, WordsConfig
from .mixture import Mixture
from .regions import LINE, NAME, Region, check_inside

NO_WORD = IGNORE_INDEX
"""At a token of which it is not known what it should say."""

SEEN = 0.875
"""A line's words stand in the row of tokens in which so much of its height is passed; below are ends of letters."""

WIDTH_TO_HEIGHT = 0.5
"""Narrowest character of a legible line over `words.min_pixels`."""

NUM_LOOKED_INTO = 256
"""Records among which there must be one with regions."""


class WordTargets(NamedTuple):
    """What the image tokens of a picture of N tiles with S tokens each should say."""

    word_ids: torch.Tensor
    """Of the vocabulary, or `NO_WORD`; shape `(N, S)`."""
    is_filler: torch.Tensor
    """Where a word is the filler, bool, shape `(N, S)`."""
    character_ids: torch.Tensor
    """Classes of the characters over each token of a line, from left to right, then 0 for none; `NO_WORD` at other
    tokens; shape `(N, S, characters.per_token)`."""
    num_pieces: torch.Tensor
    """Pieces of its regions, and how many of them found no token on the canvas; shape `(1, 2)`."""


class WordLayout:
    """Lays regions over image tokens.

    Args:
        processor: Of the student; its tokenizer tells the pieces, its image processor how pictures are cut.
        config: What is asked for.

    Raises:
        ValueError: For a tokenizer without offsets, or where filler or space are not one token each.
    """

    def __init__(self, processor: HoVLEProcessor, config: WordsConfig):
        self.image_processor = processor.image_processor
        self.tokenizer = processor.tokenizer
        self.config = config
        self.side = round(processor.image_seq_length**0.5)
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"objective.words needs to know where pieces end, which {type(self.tokenizer).__name__} does not "
                "tell: save the model with a fast tokenizer."
            )
        self.space_id = single_token(processor, " ", "a space, which objective.words lays between words,")
        self.filler_id = single_token(processor, config.filler, "objective.words.filler")
        alphabet = config.characters.alphabet if config.characters else ""
        self.classes = {character: number for number, character in enumerate(alphabet, 1)}
        self.num_slots = config.characters.per_token if config.characters else 0

    def nothing(self) -> WordTargets:
        """Targets of no picture."""
        return no_words(0, self.side**2, self.config)

    def targets(self, regions: Sequence[Region], height: int, width: int, name: str) -> WordTargets:
        """What the tokens of a picture of these sizes in pixels should say.

        Raises:
            SkipSampleError: When a region lies outside the picture.
        """
        check_inside(regions, height, width, name)
        grid = self.image_processor.choose_grid(height, width)
        num_tokens = grid.num_tiles * self.side**2
        word_ids = np.full(num_tokens, NO_WORD)
        is_filler = np.zeros(num_tokens, dtype=bool)
        character_ids = np.full((num_tokens, self.num_slots), NO_WORD)
        pixels_per_token = self.image_processor.size["height"] / self.side
        pieces = {region: self._pieces(region) for region in regions}
        num_placed = []
        for numbers in token_sheets(grid, self.side):
            sheet = Sheet(numbers, height, width, pixels_per_token, word_ids, character_ids)
            num_placed.append(self._lay(sheet, pieces))
            if pieces and all(region.layout == LINE for region in pieces):
                is_filler[sheet.silent_tokens(list(pieces), self.config.min_pixels)] = True
        word_ids[is_filler] = self.filler_id
        num_pieces = sum(map(len, pieces.values()))
        shape = (grid.num_tiles, self.side**2)
        return WordTargets(
            torch.from_numpy(word_ids).view(shape),
            torch.from_numpy(is_filler).view(shape),
            torch.from_numpy(character_ids).view(*shape, self.num_slots),
            torch.tensor([[num_pieces, num_pieces - num_placed[0]]]),
        )

    def _lay(self, sheet: "Sheet", pieces: dict[Region, list[tuple[int, int]]]) -> int:
        """Lay regions with these pieces on a sheet; returns how many pieces found a token."""
        visible = [region for region in pieces if sheet.shows(region, self.config.min_pixels)]
        lines = [region for region in visible if region.layout == LINE]
        names = sorted((region for region in visible if region.layout == NAME), key=sheet.num_tokens)
        num_placed = sum(sheet.lay_line(line, pieces[line]) for line in lines)
        for line in lines:
            sheet.lay_spaces(line, self.space_id)
            if self.num_slots:
                sheet.lay_characters(line, self.classes)
        return num_placed + sum(sheet.lay_name(name, pieces[name]) for name in names)  # the smallest has least choice

    def _pieces(self, region: Region) -> list[tuple[int, int]]:
        """Ids of a region's pieces, and where in its text each ends."""
        text = region.text if region.layout == LINE else f" {region.text.strip()}"
        found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        return [(token, end) for token, (_, end) in zip(found["input_ids"], found["offset_mapping"], strict=True)]


class Sheet:
    """Image tokens where they lie in a picture, and what they should say.

    Args:
        numbers: Of the tokens, by row and column.
        height: Of the picture in pixels.
        width: Of the picture in pixels.
        pixels_per_token: Side of a token in pixels of the sheet.
        word_ids: Of all tokens of the picture; written to.
        character_ids: The same.
    """

    def __init__(
        self,
        numbers: np.ndarray,
        height: int,
        width: int,
        pixels_per_token: float,
        word_ids: np.ndarray,
        character_ids: np.ndarray,
    ):
        self.numbers = numbers
        self.num_rows, self.num_columns = numbers.shape
        self.down, self.across = self.num_rows / height, self.num_columns / width  # tokens of a pixel of the picture
        self.pixels_per_token = pixels_per_token
        self.word_ids = word_ids
        self.character_ids = character_ids

    def shows(self, region: Region, min_pixels: float) -> bool:
        """Whether a region is large enough on this sheet to be told."""
        left, top, right, bottom = region.box
        height = (bottom - top) * self.down * self.pixels_per_token
        width = (right - left) * self.across * self.pixels_per_token
        if region.layout == LINE:
            width /= len(region.text.strip()) * WIDTH_TO_HEIGHT
        return height >= min_pixels and width >= min_pixels

    def tokens(self, region: Region) -> np.ndarray:
        """Numbers of the tokens whose centre lies in a box, or of the one that holds the box's, in their order."""
        left, top, right, bottom = region.box
        rows = _cells(top * self.down, bottom * self.down, self.num_rows)
        columns = _cells(left * self.across, right * self.across, self.num_columns)
        return np.sort(self.numbers[rows, columns].ravel())

    def num_tokens(self, region: Region) -> int:
        """How many tokens a box holds."""
        return len(self.tokens(region))

    def lay_line(self, line: Region, pieces: list[tuple[int, int]]) -> int:
        """Give each piece of a line the token in which it ends, or the next one; returns how many found one."""
        row, edges = self.numbers[self._row(line)], line.character_edges
        num_placed = 0
        for token, end in pieces:
            column = min(max(math.ceil(edges[end] * self.across) - 1, 0), self.num_columns - 1)
            free = next((place for place in row[column : column + 2] if self.word_ids[place] == NO_WORD), None)
            if free is not None:
                self.word_ids[free] = token
                num_placed += 1
        return num_placed

    def lay_spaces(self, line: Region, space_id: int) -> None:
        """Give each space of a line the token in which it lies, where no piece has it."""
        row = self.numbers[self._row(line)]
        for character, column in self._columns(line):
            if character == " " and self.word_ids[row[column]] == NO_WORD:
                self.word_ids[row[column]] = space_id

    def lay_characters(self, line: Region, classes: dict[str, int]) -> None:
        """Note which characters of a line stand over which tokens, as many as a token has slots for."""
        left, _, right, _ = line.box
        row = self.numbers[self._row(line)]
        under = row[_cells(left * self.across, right * self.across, self.num_columns)]
        self.character_ids[under] = np.maximum(self.character_ids[under], 0)
        others = len(classes) + 1
        for column, group in itertools.groupby(self._columns(line), key=lambda found: found[1]):
            known = [classes.get(character, others) for character, _ in group if not character.isspace()]
            slots = self.character_ids[row[column]]
            slots[:] = ([*slots[slots > 0], *known] + [0] * len(slots))[: len(slots)]

    def lay_name(self, name: Region, pieces: list[tuple[int, int]]) -> int:
        """Give the pieces of a name the last free tokens of its box; returns how many found one."""
        tokens = self.tokens(name)
        free = tokens[self.word_ids[tokens] == NO_WORD][-len(pieces) :]
        for place, (token, _) in zip(free, pieces, strict=False):
            self.word_ids[place] = token
        return min(len(free), len(pieces))

    def silent_tokens(self, regions: Sequence[Region], min_pixels: float) -> np.ndarray:
        """Tokens that have no word, but those with a part of a region that is too small to be told."""
        is_silent = self.word_ids[self.numbers] == NO_WORD
        for region in regions:
            if not self.shows(region, min_pixels):
                is_silent[self._touched(region)] = False
        return self.numbers[is_silent]

    def _touched(self, region: Region) -> tuple[slice, slice]:
        left, top, right, bottom = region.box
        rows = slice(math.floor(top * self.down), math.ceil(bottom * self.down))
        columns = slice(math.floor(left * self.across), math.ceil(right * self.across))
        return rows, columns

    def _row(self, line: Region) -> int:
        """Row of tokens in which a line's words stand."""
        _, top, _, bottom = line.box
        return min(int((top + SEEN * (bottom - top)) * self.down), self.num_rows - 1)

    def _columns(self, line: Region) -> Iterator[tuple[str, int]]:
        """Characters of a line, each with the column of tokens in which its middle lies."""
        for character, (start, end) in zip(line.text, itertools.pairwise(line.character_edges), strict=True):
            yield character, min(int((start + end) / 2 * self.across), self.num_columns - 1)


def _cells(start: float, end: float, count: int) -> slice:
    """Cells of unit width whose middle lies between two places, or the one that holds the middle of these."""
    first, last = math.ceil(start - 0.5), math.floor(end - 0.5)
    if first > last:
        first = last = min(int((start + end) / 2), count - 1)
    return slice(first, last + 1)


@functools.lru_cache(maxsize=256)
def token_sheets(grid: TileGrid, side: int) -> list[np.ndarray]:
    """As `TileGrid.token_sheets`; for reading only."""
    return grid.token_sheets(side)


def single_token(processor: HoVLEProcessor, text: str, what: str) -> int:
    """Id of a text that the tokenizer encodes as one token; ValueError otherwise."""
    ids = processor._encode_text(text, at_start=False)
    if len(ids) != 1:
        raise ValueError(f"{what} must be one token, but the tokenizer encodes {text!r} as {len(ids)}.")
    return ids[0]


def no_words(num_tiles: int, tokens_per_tile: int, config: WordsConfig) -> WordTargets:
    """Targets of so many tiles of which nobody knows what they show."""
    num_slots = config.characters.per_token if config.characters else 0
    return WordTargets(
        torch.full((num_tiles, tokens_per_tile), NO_WORD),
        torch.zeros(num_tiles, tokens_per_tile, dtype=torch.bool),
        torch.full((num_tiles, tokens_per_tile, num_slots), NO_WORD),
        torch.zeros(0, 2, dtype=torch.long),
    )


def join_targets(parts: Iterable[WordTargets]) -> dict[str, torch.Tensor]:
    """Fields of a packed batch whose samples have these targets, at least one."""
    return {
        name: torch.cat(tensors) for name, tensors in zip(WordTargets._fields, zip(*parts, strict=True), strict=True)
    }


def check_has_regions(config: StageConfig, mixture: Mixture) -> None:
    """Refuse `objective.words` where none of the first records has regions: nothing would teach them."""
    if config.objective.name != "distillation" or config.objective.words is None:
        return
    records = mixture.first_records(NUM_LOOKED_INTO)
    if not any(record.regions for record in records):
        raise ValueError(
            f"objective.words is set, but none of the first {NUM_LOOKED_INTO} records has regions. Add "
            '"regions": [{"box": [left, top, right, bottom], "text": ...}] to rows of `chat`, `llava` or '
            "`huggingface` sources, or take words out."
        )
