"""Alignment and instruction tuning: the next token of every reply."""

import torch
from torch import nn

from ...model.modeling_hovle import HoVLEForConditionalGeneration, HoVLEModelOutputWithPast
from ..data.batch import PackedBatch
from ..data.tiles import PixelNormalization
from ..model.bare_language_model import BareLanguageModel
from .base import Objective, ObjectiveOutput
from .distillation import mean_norm, norm_ratio
from .text_distance import divergence


class NextTokenObjective(Objective):
    """Cross-entropy of reply tokens, and distance from the bare language model on text without pictures.

    Logits exist only where there are targets, and on that text.

    Args:
        model: The student.
        normalize: Makes a batch's tiles the model's pixels; by default with ImageNet's statistics.
        bare: Says what the language model would alone; None where nothing holds the language.
        language_weight: Weight of the distance from it.
        around_images: Whether to hold the text around images, but for replies, to it too; by the same weight, because
            it is the same distance in the same unit.
    """

    def __init__(
        self,
        model: HoVLEForConditionalGeneration,
        normalize: PixelNormalization | None = None,
        bare: BareLanguageModel | None = None,
        language_weight: float = 1.0,
        around_images: bool = False,
    ):
        super().__init__()
        self.model = model
        self.bare = bare
        held = () if bare is None else ("language_kl", "prompt_kl") if around_images else ("language_kl",)
        self.weights = self.weights | dict.fromkeys(held, language_weight)
        self.text_norm: torch.Tensor
        self.register_buffer("text_norm", mean_norm(model.model.input_embedding_matrix()), persistent=False)
        self.normalize = normalize or PixelNormalization()

    weights = {"cross_entropy": 1.0, "reply_accuracy": 0.0, "image_norm_ratio": 0.0}  # noqa: RUF012 - a constant

    def counts(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """Supervised tokens, image tokens and tokens of text of a batch."""
        supervised = batch.is_supervised.sum()
        image = (batch.input_ids == self.model.config.image_token_id).sum()
        counts = {"image_norm_ratio": image, "language_kl": batch.language_part(batch.is_sample).sum()}
        if "prompt_kl" in self.weights:
            counts["prompt_kl"] = self.prompt_places(batch).sum()
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
        if "prompt_kl" in self.weights:
            terms["prompt_kl"] = self._prompt_kl(outputs, batch)
        return ObjectiveOutput(terms, self.counts(batch))

    def bare_logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        assert self.bare is not None  # the recipe has a language block
        return self.bare(self.model, input_ids, position_ids)

    def _language_kl(self, hidden_states: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Sum of KL(bare language model || model) in nats over the tokens of text without pictures."""
        if not batch.num_language_rows:
            return hidden_states.new_zeros((), dtype=torch.float32)
        input_ids, position_ids = (batch.language_part(item) for item in (batch.input_ids, batch.position_ids))
        expected = self.bare_logits(input_ids, position_ids)
        return divergence(expected, self.model.compute_logits(batch.language_part(hidden_states)))

    def prompt_places(self, batch: PackedBatch) -> torch.Tensor:
        """True at text around images, but for replies, shape `(B, T)`.

        Replies have their own targets, text without images its own term, and where an image follows, no word does.
        """
        is_image = batch.input_ids == self.model.config.image_token_id
        places = batch.is_sample & ~(is_image | is_image.roll(-1, dims=1) | batch.is_supervised)
        batch.language_part(places).fill_(False)
        return places

    def _prompt_kl(self, outputs: HoVLEModelOutputWithPast, batch: PackedBatch) -> torch.Tensor:
        """Sum of KL(bare language model, shown the same images || model) in nats over the text around images."""
        assert self.bare is not None
        places, images = self.prompt_places(batch), outputs.image_hidden_states
        expected = self.bare(
            self.model,
            batch.input_ids,
            batch.position_ids,
            image_hidden_states=None if images is None else images.detach(),
            attention_mask=batch.attention_mask,
            places=places,
        )
        return divergence(expected, self.model.compute_logits(outputs.last_hidden_state[places]))
