"""The objective a recipe names, and what is set up of its teacher before the first step."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from ...assets import resolve_asset
from ...model.image_processing_hovle import HoVLEImageProcessor
from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ...model.processing_hovle import HoVLEProcessor
from ..config import StageConfig, TeacherConfig
from ..data.batch import PackedBatch, TileBatch
from ..data.mixture import Mixture
from ..data.records import picture_sources
from ..data.tiles import PixelNormalization, picture_key, read_tiles
from ..data.transforms import limited_processor
from ..model.bare_language_model import BareLanguageModel
from .base import Objective
from .distillation import DistillationObjective
from .feature_cache import cached_targets
from .held_language import HeldLanguage
from .next_token import NextTokenObjective
from .teachers import ImageTeacher, JointTargets, Targets, make_teacher, side_by_side

NUM_STANDARDIZING_RECORDS = 256
"""Records whose pictures tell mean and deviation of teacher features."""


def make_objective(
    config: StageConfig,
    model: HoVLEForConditionalGeneration,
    image_processor: HoVLEImageProcessor,
    text_table: torch.Tensor,
    dtype: torch.dtype,
    teacher: Targets | None = None,
) -> Objective:
    """Build the objective a config names, over a model that is prepared for training in a number format.

    The teacher is loaded here unless `load_teacher` has done so.
    """
    normalize = PixelNormalization.of(image_processor)
    if config.objective.name == "next_token":
        if config.language is None:
            return NextTokenObjective(model, normalize)
        return NextTokenObjective(model, normalize, held_language(config, BareLanguageModel(model, dtype)))
    teacher = teacher or load_teacher(config)
    assert teacher is not None  # StageConfig wants one with this objective
    student_layers = [match.student for match in config.teacher[0].layers]
    weight = None if config.language is None else config.language.weight
    return DistillationObjective(model, teacher, text_table, config.objective, student_layers, normalize, weight)


def held_language(config: StageConfig, bare: BareLanguageModel) -> HeldLanguage:
    """What a stage with a language block holds, by which weights."""
    language = config.language
    assert language is not None
    return HeldLanguage(bare, language.weight, config.language_kl_weight, language.around_images)


def _with_weights(config: TeacherConfig) -> TeacherConfig:
    """The config with the path of an asset that has been fetched."""
    checkpoint = config.checkpoint
    return config if checkpoint is None else dataclasses.replace(config, checkpoint=resolve_asset(checkpoint))


def load_teacher(config: StageConfig) -> Targets | None:
    """Load the teacher of a stage that has one, or several side by side."""
    return side_by_side([make_teacher(_with_weights(item)) for item in config.teacher]) if config.teacher else None


def prepare_teacher(
    objective: Objective,
    config: StageConfig,
    mixture: Mixture,
    held_out: list[PackedBatch],
    processor: HoVLEProcessor,
    dtype: torch.dtype,
    *,
    is_main_process: bool,
) -> None:
    """Put feature caches in the teachers' places and standardise features, where the recipe says so.

    Args:
        objective: On its device; one without a teacher stays as it is.
        config: The stage.
        mixture: What training reads.
        held_out: Batches of the validation source.
        processor: Of the student.
        dtype: Number format of the run, in which the teacher computes.
        is_main_process: Whether to tell people what happens.
    """
    if not isinstance(objective, DistillationObjective):
        return
    processor = limited_processor(config, processor)
    teacher = objective.teacher
    with torch.autocast(teacher.feature_mean.device.type, dtype, enabled=dtype != torch.float32):
        members: list[Any] = list(teacher.members) if isinstance(teacher, JointTargets) else [teacher]
        for number, (member, member_config) in enumerate(zip(members, config.teacher, strict=True)):
            if member_config.cache is not None:
                assert isinstance(member, ImageTeacher)
                members[number] = cached_targets(
                    member, member_config, config, mixture, held_out, processor, dtype, is_main_process=is_main_process
                )
        if any(item.cache is not None for item in config.teacher):
            teacher = objective.teacher = side_by_side(members).to(teacher.feature_mean.device)
        if config.teacher[0].standardize:  # several are all standardised
            teacher.standardize(raw_features(teacher, mixture, processor))


def raw_features(teacher: Targets, mixture: Mixture, processor: HoVLEProcessor) -> Iterator[torch.Tensor]:
    """Features of the first pictures of a stream, the same ones whenever a run resumes."""
    grid_size = round(processor.image_seq_length**0.5)
    for record in mixture.first_records(NUM_STANDARDIZING_RECORDS):
        for picture in picture_sources(record.messages)[:1]:
            try:
                key, tiles = picture_key(picture), read_tiles(picture, processor.image_processor)
            except (ValueError, OSError):  # what is damaged counts as skipped when training draws it
                continue
            batch = TileBatch(pixel_values=tiles, picture_keys=[key], names=[record.name])
            yield teacher.raw_targets(batch.to(teacher.feature_mean.device), grid_size)
