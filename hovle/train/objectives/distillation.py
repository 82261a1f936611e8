"""Distillation: teacher features and text embeddings as targets of the holistic layers."""

import contextlib
from collections.abc import Sequence

import torch
from torch import nn

from ...model.modeling_hovle import IGNORE_INDEX, HolisticEmbeddingOutput, HoVLEForConditionalGeneration
from ..config import DistillationConfig
from ..data.batch import PackedBatch, TileBatch
from ..data.tiles import PixelNormalization
from ..model.bare_language_model import bare_logits
from .base import Objective, ObjectiveOutput
from .held_language import embedding_error
from .teachers import Targets
from .words import WordTerms, kinds_of_tokens

LAST = -1
"""The last holistic layer, whose output enters the language model."""


class DistillationObjective(Objective):
    """Reproduce the teacher at image positions and the LLM's text table elsewhere, plus scale control.

    Where words are taught (`config.words`), an image token that has one is pulled to it and not to the teacher.

    Args:
        model: The student; only its stem and holistic layers run.
        teacher: Gives target features on the student's token grid, of each matched layer.
        text_table: The language model's own input embeddings before training, shape `(V, D)`.
        config: Image loss and weights of the terms.
        student_layers: Holistic layer that reproduces each of the teacher's layers, counted as in a list.
        normalize: Makes a batch's tiles the student's pixels; by default with ImageNet's statistics.
        language_weight: Weight of the error of text without pictures; None where batches hold no such text.
    """

    def __init__(
        self,
        model: HoVLEForConditionalGeneration,
        teacher: Targets,
        text_table: torch.Tensor,
        config: DistillationConfig,
        student_layers: Sequence[int] = (-1,),
        normalize: PixelNormalization | None = None,
        language_weight: float | None = None,
    ):
        super().__init__()
        self.model = model
        self.normalize = normalize or PixelNormalization()
        self.teacher = teacher
        self.config = config
        self.student_layers = check_student_layers(student_layers, model)
        self.image_term = f"image_{config.image_loss}"
        self.weights = {
            "image_cosine": 0.0,  # always watched
            self.image_term: -1.0 if config.image_loss == "cosine" else 1.0,
            "text_cosine": -config.text_weight,
            "image_scale": config.scale_weight,
            "text_scale": config.scale_weight,
            "image_norm_ratio": 0.0,
        }
        if language_weight is not None:
            self.weights["text_error"] = language_weight
        hidden_size = text_table.shape[1]
        # Used in training only: compare vectors of different widths.
        self.projections = nn.ModuleList(
            nn.Identity() if width == hidden_size else nn.Linear(hidden_size, width, bias=False)
            for width in teacher.widths
        )
        self.words: WordTerms | None = None
        if config.words is not None:
            self.words = WordTerms(config.words, model)
            self.weights |= self.words.weights
            self.only_validated = self.words.only_validated
        self.text_table: torch.Tensor
        self.text_norm: torch.Tensor
        self.register_buffer("text_table", text_table, persistent=False)
        self.register_buffer("text_norm", mean_norm(text_table), persistent=False)

    def counts(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """Image positions, once for each matched layer, and text positions; padding counts as neither."""
        is_image = batch.input_ids == self.model.config.image_token_id
        num_image, num_text = is_image.sum(), (batch.is_sample & ~is_image).sum()
        counts = {"image_norm_ratio": num_image, "text_cosine": num_text, "text_scale": num_text}
        if "text_error" in self.weights:
            counts["text_error"] = batch.language_part(batch.is_sample).sum()
        if self.words is not None:
            num_image = num_image - kinds_of_tokens(batch)[0].sum()
            counts |= self.words.counts(batch)
        counts["image_scale"] = num_image
        num_matched = num_image * len(self.student_layers)
        return {name: counts.get(name, num_matched) for name in (*self.weights, *self.only_validated)}

    def forward(self, batch: PackedBatch) -> ObjectiveOutput:
        """Summed terms of a packed batch."""
        pixel_values = self.normalize(batch.pixel_values)
        outputs = self.model.get_holistic_embeddings(
            input_ids=batch.input_ids,
            pixel_values=pixel_values,
            position_ids=batch.position_ids,
            output_hidden_states=self._needs_layers,
        )
        image = outputs.image_hidden_states
        assert image is not None  # every sample has a picture
        assert outputs.language_inputs_embeds is not None
        is_image = batch.input_ids == self.model.config.image_token_id
        is_text = batch.is_sample & ~is_image
        text = outputs.language_inputs_embeds[is_text]
        embeddings = nn.functional.embedding(batch.input_ids[is_text], self.text_table)
        featured = image if self.words is None else image[~kinds_of_tokens(batch)[0]]
        terms = {
            **self._image_terms(outputs, is_image, batch),
            "text_cosine": _cosine(text, embeddings),
            "image_scale": _log_norm_ratio(featured, self.text_norm),
            "text_scale": _log_norm_ratio(text, embeddings.float().norm(dim=-1)),
            "image_norm_ratio": norm_ratio(image, self.text_norm),
        }
        if "text_error" in self.weights:
            entering, input_ids = map(batch.language_part, (outputs.language_inputs_embeds, batch.input_ids))
            terms["text_error"] = embedding_error(entering, nn.functional.embedding(input_ids, self.text_table))
        if self.words is not None:
            below = [self._image_part(outputs, layer, is_image) for layer in self.words.layers]
            terms |= self.words(image, below, self.text_table, batch, pixel_values)
        return ObjectiveOutput(terms, self.counts(batch))

    def bare_logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return bare_logits(self.model, nn.functional.embedding(input_ids, self.text_table), position_ids)

    def _image_terms(self, outputs: HolisticEmbeddingOutput, is_image: torch.Tensor, batch: PackedBatch) -> dict:
        """Cosine and image loss of a packed batch, summed over image positions and matched layers."""
        last = outputs.image_hidden_states
        assert last is not None
        is_matched = None if self.words is None else ~kinds_of_tokens(batch)[0]
        with self.teacher_time if self.training else contextlib.nullcontext():
            grid_size = round(last.shape[1] ** 0.5)
            targets = self._targets(batch, grid_size, is_matched).split(self.teacher.widths, dim=-1)
        terms = dict.fromkeys(("image_cosine", self.image_term), last.new_zeros((), dtype=torch.float32))
        for layer, projection, target in zip(self.student_layers, self.projections, targets, strict=True):
            projected = projection(self._image_part(outputs, layer, is_image)).float()
            if self.config.image_loss == "info_nce":
                loss = _info_nce(projected, target, self.config.temperature, self.config.tiles_per_set, is_matched)
                terms[self.image_term] = terms[self.image_term] + loss
            if is_matched is not None:
                projected, target = projected[is_matched], target[is_matched]
            terms["image_cosine"] = terms["image_cosine"] + _cosine(projected, target)
            if self.config.image_loss == "smooth_l1":
                terms[self.image_term] = terms[self.image_term] + _smooth_l1(projected, target)
        return terms

    def _targets(self, batch: PackedBatch, grid_size: int, is_matched: torch.Tensor | None) -> torch.Tensor:
        """Teacher features of a batch's tiles; a teacher need not look at tiles all of whose tokens have words."""
        if is_matched is None or self.config.image_loss == "info_nce":  # there all are among what may be found
            return self.teacher.targets(batch, grid_size)
        is_asked = is_matched.any(dim=1)
        if is_asked.all() or (is_asked.any() and not self.teacher.takes_any_tiles):
            return self.teacher.targets(batch, grid_size)
        shape = (*is_matched.shape, sum(self.teacher.widths))
        targets = torch.zeros(shape, device=is_matched.device)
        if is_asked.any():
            some = TileBatch(pixel_values=batch.pixel_values[is_asked], names=batch.names)
            targets[is_asked] = self.teacher.targets(some, grid_size)
        return targets

    @property
    def _needs_layers(self) -> bool:
        """Whether a term looks at another layer than the last."""
        return bool(self.words and self.words.layers) or set(self.student_layers) != {LAST}

    @staticmethod
    def _image_part(outputs: HolisticEmbeddingOutput, layer: int, is_image: torch.Tensor) -> torch.Tensor:
        """Image tokens of a holistic layer's output, shape `(N, S, D)`."""
        last = outputs.image_hidden_states
        assert last is not None
        if layer == LAST:
            return last
        assert outputs.hidden_states is not None
        return outputs.hidden_states[layer][is_image].view_as(last)


def check_student_layers(layers: Sequence[int], model: HoVLEForConditionalGeneration) -> tuple[int, ...]:
    """Return the holistic layers by their number from 0, the last one as `LAST`; ValueError where one is missing."""
    count = model.config.num_embedding_layers
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong:
        raise ValueError(f"teacher.layers names student layer {wrong[0]}, but there are {count} holistic layers.")
    numbers = tuple(LAST if layer % count == count - 1 else layer % count for layer in layers)
    if model.model.is_hd and set(numbers) != {LAST}:
        raise ValueError(
            "HoVLE-HD can match its last holistic layer only: the others see the patches before they are joined. "
            "Leave student out of teacher.layers."
        )
    return numbers


def _cosine(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cosine_similarity(outputs.float(), targets.float(), dim=-1).sum()


def mean_norm(text_table: torch.Tensor) -> torch.Tensor:
    """Mean length of the text embeddings `(V, D)`."""
    return text_table.float().norm(dim=-1).mean()


def norm_ratio(image: torch.Tensor | None, text_norm: torch.Tensor) -> torch.Tensor:
    """Sum of the image outputs' lengths over that of a text embedding; watched only, so without gradient."""
    if image is None:
        return torch.zeros_like(text_norm)
    return (image.detach().float().norm(dim=-1) / text_norm).sum()


def _smooth_l1(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over positions of the mean over channels."""
    return nn.functional.smooth_l1_loss(outputs, targets, reduction="none").mean(dim=-1).sum()


def _info_nce(
    outputs: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    tiles_per_set: int,
    is_matched: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over patches of `-log p(own feature)` among the features of all patches of the tile set, by their cosines.

    Args:
        outputs: Shape `(N, S, D)`.
        targets: Teacher features, same shape.
        temperature: Divides the cosines.
        tiles_per_set: Tiles of a set; sets do not see each other, so a batch cut between two has the same sum.
        is_matched: Patches whose features are asked for, shape `(N, S)`; the others are only among what may be found.
            None: all.
    """
    outputs, targets = (nn.functional.normalize(item.float(), dim=-1) for item in (outputs, targets))
    total = outputs.new_zeros(())
    sets = [item.split(tiles_per_set) for item in (outputs, targets)]
    parts = [None] * len(sets[0]) if is_matched is None else is_matched.split(tiles_per_set)
    for ours, theirs, asked in zip(*sets, parts, strict=True):
        logits = ours.flatten(0, 1) @ theirs.flatten(0, 1).T / temperature
        own = torch.arange(len(logits), device=logits.device)
        if asked is not None:
            own = own.masked_fill(~asked.flatten(), IGNORE_INDEX)
        total = total + nn.functional.cross_entropy(logits.float(), own, reduction="sum", ignore_index=IGNORE_INDEX)
    return total


def _log_norm_ratio(outputs: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Sum of `log(|output| / norm) ** 2`; zero where outputs are as long as text embeddings."""
    return (outputs.float().norm(dim=-1).clamp(min=1e-6).log() - norms.clamp(min=1e-6).log()).square().sum()
