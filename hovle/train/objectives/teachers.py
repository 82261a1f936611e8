"""Image teachers: pretrained vision models whose features the holistic layers learn to reproduce.

Every kind of teacher takes tiles of bytes, normalises them as its own preprocessing does, and gives features on the
student's token grid. A subclass of `ImageTeacher` loads one kind of model and says where its feature maps are.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import foreign_errors
from ...files.checkpoint_files import CONFIG, Checkpoint, local_folder
from ...loading import load_in_order, reading
from ...model.image_tokens import pixel_shuffle
from ..config import TeacherConfig
from ..data.batch import TileBatch
from ..data.tiles import PixelNormalization


class Targets(nn.Module):
    """Where the objective gets the features to reproduce: from a teacher, or from a cache of its features.

    Args:
        widths: Channels of each matched layer; features of all layers lie side by side.
    """

    takes_any_tiles = False
    """Whether it also describes some tiles of a picture without the others."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.widths = tuple(widths)
        self.feature_mean: torch.Tensor
        self.feature_std: torch.Tensor
        self.register_buffer("feature_mean", torch.zeros(sum(widths)), persistent=False)
        self.register_buffer("feature_std", torch.ones(sum(widths)), persistent=False)

    def raw_targets(self, batch: TileBatch, grid_size: int) -> torch.Tensor:
        """Features of a batch's tiles as the teacher gives them, shape `(N, grid_size ** 2, sum(widths))`, float32."""
        raise NotImplementedError  # subclasses say

    def targets(self, batch: TileBatch, grid_size: int) -> torch.Tensor:
        """Features of a batch's tiles, standardised if `standardize` was called; shape as in `raw_targets`."""
        return self._standardized(self.raw_targets(batch, grid_size))

    def _standardized(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.feature_mean) / self.feature_std

    def standardize(self, parts: Iterable[torch.Tensor]) -> None:
        """From now on give features with mean 0 and deviation 1 per channel, as measured on these raw features.

        Args:
            parts: Raw features, shapes `(N, S, sum(widths))`.
        """
        count = 0
        total, squares = torch.zeros(2, sum(self.widths), dtype=torch.float64)
        for part in parts:
            features = part.flatten(0, 1).double().cpu()
            count += len(features)
            total += features.sum(dim=0)
            squares += features.square().sum(dim=0)
        if not count:
            raise ValueError(
                "teacher.standardize found no readable picture among the first records: look at them with `hovle data "
                "doctor RECIPE`, or switch it off."
            )
        mean = total / count
        device = self.feature_mean.device
        self.feature_mean = mean.float().to(device)
        self.feature_std = (squares / count - mean.square()).clamp(min=1e-12).sqrt().float().to(device)


class JointTargets(Targets):
    """Several teachers at once: for each matched layer the features of all of them, side by side.

    Args:
        members: The teachers, or caches of their features; each matches as many layers.
    """

    def __init__(self, members: Sequence[Targets]):
        super().__init__([sum(widths) for widths in zip(*(member.widths for member in members), strict=True)])
        self.members = nn.ModuleList(members)
        self.takes_any_tiles = all(member.takes_any_tiles for member in members)

    def raw_targets(self, batch: TileBatch, grid_size: int) -> torch.Tensor:
        members: Any = self.members
        parts = [member.raw_targets(batch, grid_size).split(member.widths, dim=-1) for member in members]
        return torch.cat([features for layer in zip(*parts, strict=True) for features in layer], dim=-1)


def side_by_side(members: Sequence[Targets]) -> Targets:
    """One teacher, or several as one."""
    return members[0] if len(members) == 1 else JointTargets(members)


class ImageTeacher(Targets):
    """A frozen vision model.

    Args:
        config: Picture size and layers of the teacher.
        backbone: The model; it is put into evaluation mode for good.
        mean: Of the channels, as the model's own preprocessing has it.
        std: Deviation of the same.
    """

    takes_any_tiles = True

    def __init__(self, config: TeacherConfig, backbone: nn.Module, mean: Sequence[float], std: Sequence[float]):
        self.image_size = config.image_size
        self.layers = [match.teacher for match in config.layers]
        self.description = f"teacher {config.name} ({config.kind})"
        backbone.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # convolutions are faster so
        normalize = PixelNormalization(tuple(mean), tuple(std))
        with torch.no_grad():
            tile = normalize(torch.zeros(1, 3, config.image_size, config.image_size, dtype=torch.uint8))
            maps = self.feature_maps(backbone, tile)
        super().__init__([feature_map.shape[1] for feature_map in maps])
        self.backbone = backbone
        self.normalize = normalize

    def feature_maps(self, backbone: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Run the model on its own pixels `(N, 3, s, s)`: the map of each of `layers`, shapes `(N, D, H, W)`."""
        raise NotImplementedError  # subclasses say

    @torch.no_grad()
    def raw_features(self, pixel_values: torch.Tensor, grid_size: int) -> torch.Tensor:
        """Describe tiles on a square grid, as the model itself does.

        Args:
            pixel_values: Tiles, uint8, shape `(N, 3, s, s)`.
            grid_size: Tokens along one side of the student's grid; a finer map is averaged onto it.

        Returns:
            Row-major features of all layers side by side, shape `(N, grid_size ** 2, sum(widths))`, float32. A tile's
            depend by rounding on how many are described with it.
        """
        pixels = self.normalize(pixel_values)
        if pixels.shape[-1] != self.image_size:
            pixels = nn.functional.interpolate(pixels, size=self.image_size, mode="bicubic", antialias=True)
        maps = self.feature_maps(self.backbone, pixels)
        pooled = [nn.functional.adaptive_avg_pool2d(item.float(), grid_size) for item in maps]
        return torch.cat(pooled, dim=1).flatten(2).transpose(1, 2)

    def features(self, pixel_values: torch.Tensor, grid_size: int) -> torch.Tensor:
        """As `raw_features`, standardised if `standardize` was called."""
        return self._standardized(self.raw_features(pixel_values, grid_size))

    def raw_targets(self, batch: TileBatch, grid_size: int) -> torch.Tensor:
        return self.raw_features(batch.pixel_values, grid_size)

    def train(self, mode: bool = True) -> "ImageTeacher":
        """Stay in evaluation mode: batch statistics of a frozen teacher must not move."""
        return super().train(False)

    def choose(self, maps: Sequence[Any]) -> list[Any]:
        """Pick the maps of the matched layers; ValueError where there is no such layer."""
        for layer in self.layers:
            if not -len(maps) <= layer < len(maps):
                raise ValueError(
                    f"teacher.layers names layer {layer}, but {self.description} has {len(maps)} (from 0, or from -1 "
                    "backwards)."
                )
        return [maps[layer] for layer in self.layers]


class TimmTeacher(ImageTeacher):
    """Any timm model with spatial features; a layer is one of its feature maps (stages, or blocks of a ViT)."""

    def __init__(self, config: TeacherConfig):
        import timm  # an extra: only distillation needs it

        if ":" not in config.name and not timm.is_model(config.name):
            near = difflib.get_close_matches(config.name, timm.list_models(), n=3, cutoff=0)
            raise ValueError(f"teacher.name: timm knows no model {config.name!r}; did you mean {', '.join(near)}?")
        with foreign_errors(
            f"teacher.name: timm cannot load {config.name}, whose weights teacher.checkpoint may name"
        ):
            full: Any = timm.create_model(config.name, pretrained=config.checkpoint is None)
        if config.checkpoint is not None:
            load_in_order(full, Path(config.checkpoint))
        if not hasattr(full, "forward_intermediates"):
            raise ValueError(
                f"timm's {config.name} gives no feature maps (forward_intermediates): take another model."
            )
        if full.pretrained_cfg.get("fixed_input_size") and hasattr(full, "set_input_size"):
            full.set_input_size(img_size=config.image_size)
        super().__init__(config, full, full.pretrained_cfg["mean"], full.pretrained_cfg["std"])

    def feature_maps(self, backbone: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Maps before the head, channels first, class tokens dropped; after the final norm where a model has one."""
        count = len(backbone.feature_info)
        wanted = sorted({layer % count for layer in self.choose(range(count))})
        maps = backbone.forward_intermediates(
            pixels, indices=wanted, norm=True, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return [maps[wanted.index(layer % count)] for layer in self.layers]


class OpenClipTeacher(ImageTeacher):
    """The picture tower of an OpenCLIP model; a layer is one of its blocks."""

    def __init__(self, config: TeacherConfig):
        import open_clip  # an extra: only distillation needs it

        has_own_weights = config.name.startswith(("hf-hub:", "local-dir:"))
        if config.checkpoint is None and not has_own_weights:
            raise ValueError(
                f"teacher.checkpoint is missing: which weights of {config.name}? A file, or one of its tags: "
                f"{', '.join(open_clip.list_pretrained_tags_by_model(config.name)) or 'none are known'}."
            )
        with foreign_errors(f"open_clip cannot load {config.name} with {config.checkpoint}"):
            model: Any = open_clip.create_model(
                config.name,
                pretrained=config.checkpoint,
                force_image_size=config.image_size,
                require_pretrained=True,
            )
        visual = model.visual.eval()
        with torch.no_grad():
            blank = torch.zeros(1, 3, config.image_size, config.image_size)
            self.num_maps = len(visual.forward_intermediates(blank, intermediates_only=True)["image_intermediates"])
        super().__init__(config, visual, visual.preprocess_cfg["mean"], visual.preprocess_cfg["std"])

    def feature_maps(self, backbone: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Patches after each block and the final norm, class tokens dropped; for ResNets the map of each stage."""
        count = self.num_maps
        wanted = sorted({layer % count for layer in self.choose(range(count))})
        maps = backbone.forward_intermediates(
            pixels,
            indices=wanted,
            stop_early=True,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NCHW",
        )["image_intermediates"]
        return [maps[wanted.index(layer % count)] for layer in self.layers]


class TransformersTeacher(ImageTeacher):
    """A vision model of transformers (SigLIP, DINOv2, DINOv3, CLIP, ViT, ResNet, ...); a layer is one of its blocks.

    The last layer is `last_hidden_state`; others are hidden states, as the model gives them.
    """

    def __init__(self, config: TeacherConfig):
        from transformers import AutoImageProcessor, AutoModel

        with reading(config.name):
            model: Any = AutoModel.from_pretrained(config.name, dtype=torch.float32, use_safetensors=True)
            processor: Any = AutoImageProcessor.from_pretrained(config.name)
        backbone = getattr(model, "vision_model", model)
        patch_size = getattr(backbone.config, "patch_size", None)
        if isinstance(patch_size, int) and config.image_size % patch_size:
            raise ValueError(
                f"teacher.image_size ({config.image_size}) must be a multiple of {patch_size}, the patch size of "
                f"{config.name}."
            )
        super().__init__(config, backbone, processor.image_mean, processor.image_std)

    def feature_maps(self, backbone: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Patches of the chosen blocks; class and register tokens, which come first, are dropped."""
        outputs = backbone(**self._inputs(backbone, pixels), output_hidden_states=True)
        states = [*outputs.hidden_states[1:-1], outputs.last_hidden_state]
        return [self._as_map(state, backbone.config) for state in self.choose(states)]

    def _inputs(self, backbone: Any, pixels: torch.Tensor) -> dict[str, Any]:
        if backbone.config.model_type == "siglip2_vision_model":
            return _patchified(pixels, backbone.config.patch_size)
        own_size = getattr(backbone.config, "image_size", None)
        is_resized = own_size is not None and own_size != pixels.shape[-1]
        if is_resized and backbone.config.model_type in ("clip_vision_model", "siglip_vision_model", "vit"):
            return {"pixel_values": pixels, "interpolate_pos_encoding": True}  # others do so by themselves
        return {"pixel_values": pixels}

    def _as_map(self, state: torch.Tensor, config: Any) -> torch.Tensor:
        if state.dim() == 4:
            return state
        patch_size = getattr(config, "patch_size", None)
        side = self.image_size // patch_size if isinstance(patch_size, int) else 0
        num_extra = state.shape[1] - side * side
        if not side or not 0 <= num_extra < side * side:
            raise ValueError(
                f"{self.description} gives {state.shape[1]} tokens for a picture of {self.image_size} px and patches "
                f"of {patch_size}: it has no square grid of patches. Take a ViT, or a timm teacher."
            )
        return state[:, num_extra:].transpose(1, 2).unflatten(2, (side, side))


def _patchified(pixels: torch.Tensor, patch_size: int) -> dict[str, Any]:
    """What SigLIP2's flexible models take: flat patches, rows of `(row in patch, column in patch, channel)`."""
    num_tiles, side = len(pixels), pixels.shape[-1] // patch_size
    blocks = pixels.unflatten(3, (side, patch_size)).unflatten(2, (side, patch_size))  # (N, 3, row, r, column, c)
    patches = blocks.permute(0, 2, 4, 3, 5, 1).reshape(num_tiles, side * side, -1)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device),
        "spatial_shapes": torch.full((num_tiles, 2), side, device=pixels.device),
    }


class InternViTTeacher(ImageTeacher):
    """The vision tower of an InternVL model as transformers saves it; a layer is one of its blocks.

    With `projected`, features go through InternVL's own pixel shuffle and MLP and have its language model's width.
    """

    def __init__(self, config: TeacherConfig):
        from transformers import AutoConfig, AutoImageProcessor
        from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector, InternVLVisionModel

        folder = local_folder(config.name)
        with reading(folder):
            model_config: Any = AutoConfig.from_pretrained(folder)
        if model_config.model_type not in ("internvl", "internvl_vision"):
            raise ValueError(
                f"{config.name} holds a {model_config.model_type} model; kind internvit wants an InternVL folder in "
                f"transformers' own layout (model_type internvl or internvl_vision in {CONFIG})."
            )
        is_whole = model_config.model_type == "internvl"
        if config.projected and not is_whole:
            raise ValueError(f"{config.name} holds a vision tower alone; teacher.projected needs the whole InternVL.")
        if config.projected and [match.teacher for match in config.layers] != [-1]:
            raise ValueError("teacher.projected goes with the last layer only, which InternVL's MLP was trained on.")
        checkpoint = Checkpoint(folder)
        vision_config = model_config.vision_config if is_whole else model_config
        backbone = nn.ModuleDict({"tower": InternVLVisionModel(vision_config)})
        _load_part(backbone["tower"], checkpoint, ("model.vision_tower.", "vision_tower.", ""))
        self.shuffle_factor = 0
        if config.projected:
            self.shuffle_factor = round(1 / model_config.downsample_ratio)
            backbone["projector"] = InternVLMultiModalProjector(model_config)
            prefixes = ("model.multi_modal_projector.", "multi_modal_projector.")
            _load_part(backbone["projector"], checkpoint, prefixes)
        self.patch_size = vision_config.patch_size[0]
        step = self.patch_size * max(1, self.shuffle_factor)
        if config.image_size % step:
            raise ValueError(f"teacher.image_size ({config.image_size}) must be a multiple of {step} for InternViT.")
        processor: Any = AutoImageProcessor.from_pretrained(folder)
        super().__init__(config, backbone, processor.image_mean, processor.image_std)

    def feature_maps(self, backbone: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Patches of the chosen blocks, or the last ones projected; the class token is dropped."""
        outputs = backbone["tower"](pixels, output_hidden_states=True)
        states = [*outputs.hidden_states[1:-1], outputs.last_hidden_state]
        patches = [state[:, 1:] for state in self.choose(states)]
        side = pixels.shape[-1] // self.patch_size
        if self.shuffle_factor:
            side //= self.shuffle_factor
            patches = [backbone["projector"](pixel_shuffle(item, self.shuffle_factor)) for item in patches]
        return [item.transpose(1, 2).unflatten(2, (side, side)) for item in patches]


KINDS: dict[str, type[ImageTeacher]] = {
    "timm": TimmTeacher,
    "open_clip": OpenClipTeacher,
    "transformers": TransformersTeacher,
    "internvit": InternViTTeacher,
}
"""`teacher.kind` -> class."""


def make_teacher(config: TeacherConfig) -> ImageTeacher:
    """Load the teacher a config names; its `checkpoint` is a path or, for OpenCLIP, a tag."""
    return KINDS[config.kind](config)  # type: ignore[call-arg]


def _load_part(module: nn.Module, checkpoint: Checkpoint, prefixes: Sequence[str]) -> None:
    """Load the tensors of one part of a checkpoint, under the first prefix that has them all."""
    names = list(module.state_dict())
    for prefix in prefixes:
        if all(prefix + name in checkpoint for name in names):
            module.load_state_dict({name: checkpoint.tensor(prefix + name).float() for name in names})
            return
    missing = next(name for name in names if prefixes[0] + name not in checkpoint)
    raise ValueError(
        f"The checkpoint has no {prefixes[0]}{missing}: {type(module).__name__} cannot be loaded from it."
    )
