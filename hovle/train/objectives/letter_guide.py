"""A guide to letters: a small convolutional net that learns the same characters beside the student, and faster.

What it sees in a tile is the same at every place, so that it tells characters after a few hundred steps, when a
transformer on patches still guesses. Its features on the way are something to reproduce at every token, whatever
stands there: the lowest layer learns its edges and where they lie in a token, the layer that tells characters its
letters. Used in training only.
"""

from typing import NamedTuple

import torch
from torch import nn

from ...model.configuration_hovle import HoVLEConfig
from ...model.image_tokens import pixel_shuffle

CELL = 4
"""Pixels along a side of what the lower features describe."""

EDGE_WIDTHS = (24, 48)
LETTER_WIDTH = 192


class Guidance(NamedTuple):
    """What the guide makes of N tiles with S tokens each; features have mean 0 and deviation 1 over each tile."""

    edges: torch.Tensor
    """Features of all cells of a token, side by side; shape `(N, S, cells * 48)`."""
    letters: torch.Tensor
    """What it tells characters from, before it looks at the tokens around; shape `(N, S, 192)`."""
    logits: torch.Tensor
    """Of the characters over each token, shape `(N, S, slots, classes)`."""


class LetterGuide(nn.Module):
    """Tells the characters over the tokens of tiles.

    Args:
        config: Of the student; the guide cuts tiles into tokens as it does.
        num_slots: Characters it tells of a token.
        num_classes: What each may be.

    Raises:
        ValueError: Where tokens are not whole cells.
    """

    def __init__(self, config: HoVLEConfig, num_slots: int, num_classes: int):
        super().__init__()
        self.side = round(config.image_seq_length**0.5)
        self.cells = config.image_size // self.side // CELL
        if self.cells * CELL * self.side != config.image_size:
            raise ValueError(
                f"objective.words.characters.guide_weight needs tokens of a multiple of {CELL} pixels; here "
                f"{self.side} tokens share the {config.image_size} pixels of a tile's side."
            )
        narrow, wide = EDGE_WIDTHS
        self.first = _convolution(config.num_channels, narrow, 6, stride=2, padding=2)
        self.second = _convolution(narrow, wide, 4, stride=2, padding=1)
        self.edges = _convolution(wide, wide, 3, padding=1, affine=False)
        self.letters = _convolution(wide, LETTER_WIDTH, self.cells + 2, stride=self.cells, padding=1, affine=False)
        self.around = _convolution(LETTER_WIDTH, LETTER_WIDTH, 3, padding=1)
        self.head = nn.Linear(LETTER_WIDTH, num_slots * num_classes)
        self.shape = (num_slots, num_classes)

    def forward(self, pixel_values: torch.Tensor) -> Guidance:
        """Look at normalised tiles `(N, C, s, s)`."""
        edges = self.edges(self.second(self.first(pixel_values).relu()).relu())
        letters = self.letters(edges.relu())
        told = (letters.relu() + self.around(letters.relu()).relu()).flatten(2).transpose(1, 2)
        logits = self.head(told).unflatten(-1, self.shape)
        cells = pixel_shuffle(edges.flatten(2).transpose(1, 2), self.cells)
        return Guidance(cells, letters.flatten(2).transpose(1, 2), logits)

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers of a token that describe its edges and its letters."""
        return self.cells**2 * EDGE_WIDTHS[1], LETTER_WIDTH


def _convolution(
    inputs: int, outputs: int, side: int, stride: int = 1, padding: int = 0, affine: bool = True
) -> nn.Sequential:
    """Each channel is normalised over its tile alone: contrast does not count, and a batch may be cut anywhere."""
    norm = nn.GroupNorm(outputs, outputs, affine=affine)
    return nn.Sequential(nn.Conv2d(inputs, outputs, side, stride, padding), norm)
