"""What turns the records of a recipe into samples."""

import copy

from ...model.processing_hovle import HoVLEProcessor
from ..config import StageConfig
from ..model.start import UNLIMITED, Positions
from .samples import RandomTextSamples, ReplySamples, SampleMaker
from .words import WordLayout


def limited_processor(config: StageConfig, processor: HoVLEProcessor) -> HoVLEProcessor:
    """The processor with the stage's own limit of tiles; the one that is saved keeps its own."""
    if config.max_tiles_per_picture is None:
        return processor
    limited = copy.copy(processor)
    limited.image_processor = copy.copy(processor.image_processor)
    limited.image_processor.max_patches = config.max_tiles_per_picture
    return limited


def make_transform(config: StageConfig, processor: HoVLEProcessor, positions: Positions = UNLIMITED) -> SampleMaker:
    """What turns records into samples for the objective.

    Args:
        config: The stage.
        processor: Of the model.
        positions: Of the model.
    """
    processor = limited_processor(config, processor)
    maker: SampleMaker
    if config.objective.name == "distillation":
        objective = config.objective
        words = WordLayout(processor, objective.words) if objective.words else None
        maker = RandomTextSamples(processor, objective.num_random_tokens, config.seed, words)
    else:
        maker = ReplySamples(processor)
    maker.max_positions, maker.max_shared_positions = positions
    return maker
