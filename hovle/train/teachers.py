"""Image teachers: pretrained vision models whose features the holistic layers learn to reproduce."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from .config import TeacherConfig
from .pixels import PixelNormalization


class ImageTeacher(nn.Module):
    """A frozen timm model that gives features on the student's token grid.

    Args:
        config: Name, weights and picture size of the teacher.
        weights: Local weights file, or None for timm's own.
    """

    def __init__(self, config: TeacherConfig, weights: Path | None = None):
        super().__init__()
        import timm  # an extra: only distillation needs it

        self.image_size = config.image_size
        full: Any = timm.create_model(config.name, pretrained=weights is None)
        if weights is not None:
            _load_in_order(full, weights)
        backbone: Any = timm.create_model(
            config.name, pretrained=False, features_only=True, out_indices=(config.feature_index,)
        )
        known = full.state_dict()
        missing = [name for name in backbone.state_dict() if name not in known]
        if missing:
            raise ValueError(f"{config.name} cannot serve as a feature teacher: no weights for {missing[:3]}.")
        backbone.load_state_dict({name: known[name] for name in backbone.state_dict()})
        self.backbone = backbone.eval().requires_grad_(False)
        self.width: int = backbone.feature_info.channels()[-1]
        mean, std = full.default_cfg["mean"], full.default_cfg["std"]
        self.normalize = PixelNormalization(mean, std)
        self.feature_mean: torch.Tensor
        self.feature_std: torch.Tensor
        self.register_buffer("feature_mean", torch.zeros(self.width), persistent=False)
        self.register_buffer("feature_std", torch.ones(self.width), persistent=False)

    def standardize(self, pictures: Iterable[torch.Tensor], grid_size: int) -> None:
        """From now on give features with mean 0 and deviation 1 per channel, as measured on these pictures' tiles."""
        count = 0
        total, squares = torch.zeros(2, self.width, dtype=torch.float64)
        for pixel_values in pictures:
            features = self.features(pixel_values, grid_size).flatten(0, 1).double()
            count += len(features)
            total += features.sum(dim=0)
            squares += features.square().sum(dim=0)
        mean = total / count
        self.feature_mean = mean.float()
        self.feature_std = (squares / count - mean.square()).clamp(min=1e-12).sqrt().float()

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor, grid_size: int) -> torch.Tensor:
        """Describe tiles on a square grid.

        Args:
            pixel_values: Tiles, uint8, shape `(N, 3, s, s)`.
            grid_size: Tokens along one side of the student's grid.

        Returns:
            Row-major features, shape `(N, grid_size ** 2, width)`, float32.
        """
        pixels = self.normalize(pixel_values)
        if pixels.shape[-1] != self.image_size:
            pixels = nn.functional.interpolate(pixels, size=self.image_size, mode="bicubic", antialias=True)
        features = self.backbone(pixels)[-1].float()
        features = nn.functional.adaptive_avg_pool2d(features, grid_size).flatten(2).transpose(1, 2)
        return (features - self.feature_mean) / self.feature_std

    def train(self, mode: bool = True) -> "ImageTeacher":
        """Stay in evaluation mode: batch statistics of a frozen teacher must not move."""
        return super().train(False)


def _load_in_order(model: nn.Module, weights: Path) -> None:
    """Load a state dict whose tensors match the model's one to one in order, whatever their names."""
    if weights.suffix == ".safetensors":
        source = load_file(weights)
    else:
        source = torch.load(weights, map_location="cpu", weights_only=True)
    target = model.state_dict()
    if set(source) == set(target):
        model.load_state_dict(source)
        return
    if [tensor.shape for tensor in source.values()] != [tensor.shape for tensor in target.values()]:
        raise ValueError(
            f"{weights.name} holds {len(source)} tensors that do not match the {len(target)} of the teacher in order "
            "and shape: are weights and teacher.name of the same model?"
        )
    model.load_state_dict(dict(zip(target, source.values(), strict=True)))
