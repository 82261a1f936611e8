"""What the stages minimise: teacher features and text embeddings in distillation, replies afterwards.

An objective is a module that maps one packed batch to summed losses, so that dividing by the counts of the whole
step gives the same number however the step is cut into micro-batches and processes.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..modeling_hovle import IGNORE_INDEX, HoVLEForConditionalGeneration
from .pixels import PixelNormalization
from .teachers import ImageTeacher


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

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Positions each term is summed over, known before the forward pass."""
        raise NotImplementedError  # subclasses say


class NextTokenObjective(Objective):
    """Cross-entropy of reply tokens; logits exist only where there are labels.

    Args:
        model: The student.
        normalize: Makes a batch's tiles the model's pixels; by default with ImageNet's statistics.
    """

    def __init__(self, model: HoVLEForConditionalGeneration, normalize: PixelNormalization | None = None):
        super().__init__()
        self.model = model
        self.normalize = normalize or PixelNormalization()

    weights = {"reply_nats": 1.0, "reply_accuracy": 0.0}  # noqa: RUF012 - a constant

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Supervised tokens of a batch."""
        return dict.fromkeys(self.weights, (batch["labels"][:, 1:] != IGNORE_INDEX).sum())

    def forward(self, batch: dict[str, torch.Tensor]) -> ObjectiveOutput:
        """Sum of `-log p(token)` in nats over the reply tokens of a packed batch."""
        hidden_states = self.model.model(
            input_ids=batch["input_ids"],
            pixel_values=self.normalize(batch["pixel_values"]),
            position_ids=batch["position_ids"],
            attention_mask=batch.get("attention_mask"),
            use_cache=False,
        ).last_hidden_state
        labels = batch["labels"][:, 1:]
        supervised = labels != IGNORE_INDEX
        logits = self.model.compute_logits(hidden_states[:, :-1][supervised]).float()
        labels = labels[supervised]
        terms = {
            "reply_nats": nn.functional.cross_entropy(logits, labels, reduction="sum"),
            "reply_accuracy": (logits.argmax(dim=-1) == labels).sum().float(),
        }
        return ObjectiveOutput(terms, self.counts(batch))


class DistillationObjective(Objective):
    """Negative cosine to the teacher at image positions and to the LLM's text table elsewhere, plus scale control.

    Args:
        model: The student; only its stem and holistic layers run.
        teacher: Gives target features on the student's token grid.
        text_table: The language model's own input embeddings before training, shape `(V, D)`.
        text_weight: Weight of the text cosine.
        scale_weight: Weight of the squared log ratio of output norms to text-embedding norms.
        normalize: Makes a batch's tiles the student's pixels; by default with ImageNet's statistics.
    """

    def __init__(
        self,
        model: HoVLEForConditionalGeneration,
        teacher: ImageTeacher,
        text_table: torch.Tensor,
        text_weight: float,
        scale_weight: float,
        normalize: PixelNormalization | None = None,
    ):
        super().__init__()
        self.model = model
        self.normalize = normalize or PixelNormalization()
        self.teacher = teacher
        self.weights = {
            "image_cosine": -1.0,
            "text_cosine": -text_weight,
            "image_scale": scale_weight,
            "text_scale": scale_weight,
        }
        hidden_size = text_table.shape[1]
        # Used in training only: compares vectors of different widths.
        self.projection = (
            nn.Identity() if teacher.width == hidden_size else nn.Linear(hidden_size, teacher.width, bias=False)
        )
        self.text_table: torch.Tensor
        self.text_norm: torch.Tensor
        self.register_buffer("text_table", text_table, persistent=False)
        self.register_buffer("text_norm", text_table.float().norm(dim=-1).mean(), persistent=False)

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Image and text positions of a batch; padding counts as neither."""
        image = batch["input_ids"] == self.model.config.image_token_id
        text = batch["is_sample"] & ~image
        return {name: (image if name.startswith("image") else text).sum() for name in self.weights}

    def forward(self, batch: dict[str, torch.Tensor]) -> ObjectiveOutput:
        """Summed negative cosines and squared log norm ratios of a packed batch."""
        outputs = self.model.get_holistic_embeddings(
            input_ids=batch["input_ids"],
            pixel_values=self.normalize(batch["pixel_values"]),
            position_ids=batch["position_ids"],
        )
        image = outputs.image_hidden_states
        assert image is not None  # every sample has a picture
        assert outputs.inputs_embeds is not None
        targets = self.teacher.features(batch["pixel_values"], round(image.shape[1] ** 0.5))
        is_text = batch["is_sample"] & (batch["input_ids"] != self.model.config.image_token_id)
        text = outputs.inputs_embeds[is_text]
        embeddings = nn.functional.embedding(batch["input_ids"][is_text], self.text_table)
        terms = {
            "image_cosine": _cosine(self.projection(image), targets),
            "text_cosine": _cosine(text, embeddings),
            "image_scale": _log_norm_ratio(image, self.text_norm),
            "text_scale": _log_norm_ratio(text, embeddings.float().norm(dim=-1)),
        }
        return ObjectiveOutput(terms, self.counts(batch))


def _cosine(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cosine_similarity(outputs.float(), targets.float(), dim=-1).sum()


def _log_norm_ratio(outputs: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Sum of `log(|output| / norm) ** 2`; zero where outputs are as long as text embeddings."""
    return (outputs.float().norm(dim=-1).clamp(min=1e-6).log() - norms.clamp(min=1e-6).log()).square().sum()


def learning_rate_factor(step: int, num_steps: int, warmup_ratio: float, final_ratio: float) -> float:
    """Linear warm-up, then a cosine from 1 to `final_ratio` at the last step; `step` counts from 0."""
    num_warmup = math.ceil(num_steps * warmup_ratio)
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - 1 - num_warmup)
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
