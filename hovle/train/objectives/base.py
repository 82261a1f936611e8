"""What an objective gives: summed terms of a batch, and how many each counts."""

from dataclasses import dataclass

import torch
from torch import nn

from ...machine.speed import Stopwatch
from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ..data.batch import PackedBatch


@dataclass
class ObjectiveOutput:
    """Summed terms of one micro-batch."""

    terms: dict[str, torch.Tensor]
    """Name -> summed loss term, scalar with gradient."""
    counts: dict[str, torch.Tensor]
    """Name -> number of positions the term is summed over."""


class Objective(nn.Module):
    """Maps a packed batch to summed terms."""

    weights: dict[str, float]
    """Weight of each mean term in the total loss; 0 for what is only watched."""
    only_validated: tuple[str, ...] = ()
    """Terms that cost too much for every step and are measured out of training only."""
    model: HoVLEForConditionalGeneration
    """What learns."""

    def __init__(self):
        super().__init__()
        self.teacher_time = Stopwatch()  # runs while a teacher works

    def counts(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """Positions each term is summed over, known before the forward pass."""
        raise NotImplementedError  # subclasses say

    def bare_logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """What the language model alone would say of text, where the recipe holds it to that.

        Args:
            input_ids: Text without pictures, shape `(B, T)`.
            position_ids: 0 where a document begins, same shape.

        Returns:
            Next-token logits, shape `(B, T, V)`, without gradient.
        """
        raise NotImplementedError  # subclasses say
