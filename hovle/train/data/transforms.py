"""What turns the records of a recipe into samples."""

import copy

from ...model.processing_hovle import HoVLEProcessor
from ..config import StageConfig
from .samples import RandomTextSamples, ReplySamples


def limited_processor(config: StageConfig, processor: HoVLEProcessor) -> HoVLEProcessor:
    """The processor with the stage's own limit of tiles; the one that is saved keeps its own."""
    if config.max_tiles_per_picture is None:
        return processor
    limited = copy.copy(processor)
    limited.image_processor = copy.copy(processor.image_processor)
    limited.image_processor.max_patches = config.max_tiles_per_picture
    return limited


def make_transform(config: StageConfig, processor: HoVLEProcessor):
    """What turns records into samples for the objective."""
    processor = limited_processor(config, processor)
    if config.objective.name == "distillation":
        return RandomTextSamples(processor, config.objective.num_random_tokens, config.seed)
    return ReplySamples(processor)
