"""The objective a recipe names."""

import dataclasses

import torch

from ...assets import resolve_asset
from ...model.image_processing_hovle import HoVLEImageProcessor
from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ..config import StageConfig
from ..data.tiles import PixelNormalization
from .base import Objective
from .distillation import DistillationObjective
from .next_token import NextTokenObjective
from .teachers import make_teacher


def make_objective(
    config: StageConfig,
    model: HoVLEForConditionalGeneration,
    image_processor: HoVLEImageProcessor,
    text_table: torch.Tensor,
) -> Objective:
    """Build the objective a config names."""
    normalize = PixelNormalization.of(image_processor)
    if config.objective.name == "next_token":
        return NextTokenObjective(model, normalize)
    assert config.teacher is not None  # StageConfig wants one with this objective
    checkpoint = config.teacher.checkpoint
    checkpoint = checkpoint if checkpoint is None else resolve_asset(checkpoint)
    teacher = make_teacher(dataclasses.replace(config.teacher, checkpoint=checkpoint))
    student_layers = [match.student for match in config.teacher.layers]
    return DistillationObjective(model, teacher, text_table, config.objective, student_layers, normalize)
