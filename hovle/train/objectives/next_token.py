"""Alignment and instruction tuning: the next token of every reply."""

import torch
from torch import nn

from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ..data.batch import PackedBatch
from ..data.tiles import PixelNormalization
from .base import Objective, ObjectiveOutput
from .distillation import mean_norm, norm_ratio


class NextTokenObjective(Objective):
    """Cross-entropy of reply tokens; logits exist only where there are targets.

    Args:
        model: The student.
        normalize: Makes a batch's tiles the model's pixels; by default with ImageNet's statistics.
    """

    def __init__(self, model: HoVLEForConditionalGeneration, normalize: PixelNormalization | None = None):
        super().__init__()
        self.model = model
        self.text_norm: torch.Tensor
        self.register_buffer("text_norm", mean_norm(model.model.input_embedding_matrix()), persistent=False)
        self.normalize = normalize or PixelNormalization()

    weights = {"cross_entropy": 1.0, "reply_accuracy": 0.0, "image_norm_ratio": 0.0}  # noqa: RUF012 - a constant

    def counts(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """Supervised tokens and image tokens of a batch."""
        supervised = batch.is_supervised.sum()
        image = (batch.input_ids == self.model.config.image_token_id).sum()
        return {name: image if name.startswith("image") else supervised for name in self.weights}

    def forward(self, batch: PackedBatch) -> ObjectiveOutput:
        """Sum of `-log p(token)` in nats over the reply tokens of a packed batch."""
        outputs = self.model.model(
            input_ids=batch.input_ids,
            pixel_values=self.normalize(batch.pixel_values),
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        )
        supervised = batch.is_supervised
        logits = self.model.compute_logits(outputs.last_hidden_state[supervised]).float()
        targets = batch.targets[supervised]
        terms = {
            "cross_entropy": nn.functional.cross_entropy(logits, targets, reduction="sum"),
            "reply_accuracy": (logits.argmax(dim=-1) == targets).sum().float(),
            "image_norm_ratio": norm_ratio(outputs.image_hidden_states, self.text_norm),
        }
        return ObjectiveOutput(terms, self.counts(batch))
