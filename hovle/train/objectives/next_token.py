"""Alignment and instruction tuning: the next token of every reply."""

import torch
from torch import nn

from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ..data.batch import PackedBatch
from ..data.tiles import PixelNormalization
from ..model.bare_language_model import BareLanguageModel
from .base import Objective, ObjectiveOutput
from .distillation import mean_norm, norm_ratio


class NextTokenObjective(Objective):
    """Cross-entropy of reply tokens, and distance from the bare language model on text without pictures.

    Logits exist only where there are targets, and on that text.

    Args:
        model: The student.
        normalize: Makes a batch's tiles the model's pixels; by default with ImageNet's statistics.
        bare: Says what the language model would alone; None where nothing holds the language.
        language_weight: Weight of the distance from it.
    """

    def __init__(
        self,
        model: HoVLEForConditionalGeneration,
        normalize: PixelNormalization | None = None,
        bare: BareLanguageModel | None = None,
        language_weight: float = 1.0,
    ):
        super().__init__()
        self.model = model
        self.bare = bare
        if bare is not None:
            self.weights = {**self.weights, "language_kl": language_weight}
        self.text_norm: torch.Tensor
        self.register_buffer("text_norm", mean_norm(model.model.input_embedding_matrix()), persistent=False)
        self.normalize = normalize or PixelNormalization()

    weights = {"cross_entropy": 1.0, "reply_accuracy": 0.0, "image_norm_ratio": 0.0}  # noqa: RUF012 - a constant

    def counts(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """Supervised tokens, image tokens and tokens of text without pictures of a batch."""
        supervised = batch.is_supervised.sum()
        image = (batch.input_ids == self.model.config.image_token_id).sum()
        counts = {"image_norm_ratio": image, "language_kl": batch.language_part(batch.is_sample).sum()}
        return {name: counts.get(name, supervised) for name in self.weights}

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
        if self.bare is not None:
            terms["language_kl"] = self._language_kl(outputs.last_hidden_state, batch)
        return ObjectiveOutput(terms, self.counts(batch))

    def _language_kl(self, hidden_states: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Sum of KL(bare language model || model) in nats over the tokens of text without pictures."""
        assert self.bare is not None
        if not batch.num_language_rows:
            return hidden_states.new_zeros((), dtype=torch.float32)
        input_ids, position_ids = (batch.language_part(item) for item in (batch.input_ids, batch.position_ids))
        expected = self.bare(self.model, input_ids, position_ids).float().log_softmax(dim=-1)
        found = self.model.compute_logits(batch.language_part(hidden_states)).float().log_softmax(dim=-1)
        return nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
