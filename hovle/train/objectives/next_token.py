"""Alignment and instruction tuning: the next token of every reply, and text that holds the language."""

import torch
from torch import nn

from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ..data.batch import PackedBatch
from ..data.tiles import PixelNormalization
from ..model.bare_language_model import language_hidden_states
from .base import Objective, ObjectiveOutput
from .distillation import mean_norm, norm_ratio
from .held_language import HeldLanguage


class NextTokenObjective(Objective):
    """Cross-entropy of reply tokens, and distance from the bare language model on text without pictures.

    Logits exist only where there are targets, and where they are compared with the bare language model's.

    Args:
        model: The student.
        normalize: Makes a batch's tiles the model's pixels; by default with ImageNet's statistics.
        held: What holds the language; None where nothing does.
    """

    def __init__(
        self,
        model: HoVLEForConditionalGeneration,
        normalize: PixelNormalization | None = None,
        held: HeldLanguage | None = None,
    ):
        super().__init__()
        self.model = model
        self.held = held
        if held is not None:
            self.weights = self.weights | held.weights
        self.text_norm: torch.Tensor
        self.register_buffer("text_norm", mean_norm(model.model.input_embedding_matrix()), persistent=False)
        self.normalize = normalize or PixelNormalization()

    weights = {"cross_entropy": 1.0, "reply_accuracy": 0.0, "image_norm_ratio": 0.0}  # noqa: RUF012 - a constant

    def counts(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """Supervised tokens, image tokens and tokens of held text of a batch."""
        supervised = batch.is_supervised.sum()
        image_token_id = self.model.config.image_token_id
        counts = {"image_norm_ratio": (batch.input_ids == image_token_id).sum()}
        if self.held is not None:
            counts |= self.held.counts(batch, image_token_id)
        return {name: counts.get(name, supervised) for name in self.weights}

    def forward(self, batch: PackedBatch) -> ObjectiveOutput:
        """Sum of `-log p(token)` in nats over the reply tokens of a packed batch."""
        terms = self._reply_terms(batch) if self.held is None else self._held_terms(self.held, batch)
        return ObjectiveOutput(terms, self.counts(batch))

    def _reply_terms(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        outputs = self.model.model(
            input_ids=batch.input_ids,
            pixel_values=self.normalize(batch.pixel_values),
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        )
        return self._terms(outputs.last_hidden_state, outputs.image_hidden_states, batch)

    def _held_terms(self, held: HeldLanguage, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """The same in two sections, because what lies between them is held too."""
        holistic = self.model.model.get_holistic_embeddings(
            input_ids=batch.input_ids,
            pixel_values=self.normalize(batch.pixel_values),
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
        )
        entering, mask = holistic.language_inputs_embeds, batch.attention_mask
        assert entering is not None
        rows = slice(held.num_rows_through_language_model(batch))
        mask = None if mask is None else mask[rows]
        hidden_states = language_hidden_states(self.model, entering[rows], batch.position_ids[rows], mask)
        terms = self._terms(hidden_states, holistic.image_hidden_states, batch)
        return terms | held.terms(self.model, holistic, hidden_states, batch)

    def _terms(
        self, hidden_states: torch.Tensor, images: torch.Tensor | None, batch: PackedBatch
    ) -> dict[str, torch.Tensor]:
        """Terms of the replies; rows that did not enter the language model have none."""
        supervised = batch.is_supervised
        logits = self.model.compute_logits(hidden_states[supervised[: len(hidden_states)]]).float()
        targets = batch.targets[supervised]
        return {
            "cross_entropy": nn.functional.cross_entropy(logits, targets, reduction="sum"),
            "reply_accuracy": (logits.argmax(dim=-1) == targets).sum().float(),
            "image_norm_ratio": norm_ratio(images, self.text_norm),
        }

    def bare_logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        assert self.held is not None  # the recipe has a language block
        return self.held.bare(self.model, input_ids, position_ids)
