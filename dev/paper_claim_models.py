"""What HoVLE is compared with, made of a HoVLE without holistic layers: with an image encoder, or with one matrix."""

import math

import torch
from torch import nn

from hovle import HoVLEForConditionalGeneration
from hovle.model.modeling_hovle import HoVLEPatchEmbedding
from hovle.train import StageConfig
from hovle.train.data.batch import TileBatch
from hovle.train.data.mixture import open_mixture
from hovle.train.model.start import start_processor
from hovle.train.objectives.choice import load_teacher, raw_features
from hovle.train.objectives.teachers import Targets


def standardized_teacher(config: StageConfig) -> Targets:
    """A distillation stage's teachers side by side, standardised on the first pictures it would read."""
    teacher = load_teacher(config)
    assert teacher is not None  # such a stage has one
    mixture = open_mixture(config.data, config.seed)
    teacher.standardize(raw_features(teacher, mixture, start_processor(config.model)))
    return teacher


def show_features(model: HoVLEForConditionalGeneration, teacher: Targets) -> None:
    """Put frozen features of each token's pixels in the place of its patches: the projector is the MLP behind them.

    The model keeps the weights of a stock HoVLE, so it trains, saves and loads as any other. The features are saved
    nowhere: show them again wherever it is loaded. Its convolution and its positions learn nothing: their gradient is
    zero, not absent, because a run resumes only where the optimizer knows all that learns.

    Raises:
        ValueError: Where the projector has no room for the features.
    """
    projector, factor = model.model.projector, model.config.shuffle_factor
    room = projector.linear_1.in_features
    if sum(teacher.widths) > room:
        raise ValueError(
            f"The teachers give {sum(teacher.widths)} numbers for a token, but the projector takes {room}: name fewer "
            "teachers, or a wider language model."
        )

    def instead_of_patches(stem: HoVLEPatchEmbedding, arguments: tuple, patches: torch.Tensor) -> torch.Tensor:
        num_tiles, num_patches, width = patches.shape
        side = round(num_patches**0.5) // factor
        tiles = TileBatch(pixel_values=as_bytes(arguments[0], stem))
        features = teacher.to(patches.device).targets(tiles, side)
        tokens = nn.functional.pad(features, (0, room - features.shape[-1])).to(patches.dtype)
        blocks = tokens.view(num_tiles, side, side, factor, factor, width)  # which pixel shuffle will join again
        return blocks.permute(0, 1, 3, 2, 4, 5).reshape(patches.shape) + 0 * patches

    model.model.patch_embedding.register_forward_hook(instead_of_patches)


def as_bytes(pixel_values: torch.Tensor, stem: HoVLEPatchEmbedding) -> torch.Tensor:
    """The bytes of tiles that the stem takes, normalised or not, shape `(N, 3, s, s)`, uint8."""
    if pixel_values.dtype == torch.uint8:
        return pixel_values
    mean, std = (pixel_values.new_tensor(item).view(1, -1, 1, 1) for item in (stem.image_mean, stem.image_std))
    return (255 * (pixel_values * std + mean)).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def begin_as_long_as_words(model: HoVLEForConditionalGeneration) -> None:
    """Draw a new model's only matrix again so that image tokens begin about as long as words.

    Behind a projector they do anyway. A matrix of thousands of pixels would make them seven times as long; what the
    language model's layers add is little beside that, and it would see worse for a reason that nobody claims.
    """
    if model.model.projector is None:
        weight = model.model.patch_embedding.projection.weight
        weight.normal_(std=float(model.model.input_embedding_matrix().std()) / math.sqrt(weight[0].numel()))
