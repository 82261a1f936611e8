"""Write the patch stem beside an exported decoder, with the reader that needs numpy and Pillow only."""

import json
import shutil
from functools import partial
from pathlib import Path

import torch

from ..files.checkpoint_files import Output, check_finite, write_tensors
from . import stem as reader
from .flat import FlatModel

STEM = Path("stem", "stem.safetensors")
"""In a folder of its own: engines such as vLLM take every such file beside the decoder for weights of it."""


SAME_FEATURES = {torch.float32: 1e-5}
"""By how much, relative to the largest value, the reader's features may differ from a model's of this type."""


def write_stem(flat: FlatModel, folder: Path) -> None:
    """Write the folder `stem`, weights and their reader; ValueError where that would not give the model's features."""
    outputs = []
    for name, tensor in stem_tensors(flat).items():
        check_finite(name, tensor)
        outputs.append(Output(name, tuple(tensor.shape), torch.float32, partial(tensor.float)))
    (folder / STEM).parent.mkdir()
    write_tensors(folder / STEM, outputs, {"hovle_stem": json.dumps(stem_settings(flat))})
    shutil.copyfile(reader.__file__, (folder / STEM).with_name("stem.py"))
    _check_same_features(flat, reader.Stem(folder / STEM))


@torch.no_grad()
def _check_same_features(flat: FlatModel, stem: reader.Stem) -> None:
    """Raise ValueError unless the reader makes of a tile what the model makes of it."""
    side, generator = flat.image_processor.tile_size, torch.Generator().manual_seed(0)
    pixels = torch.randn(1, flat.config.num_channels, side, side, generator=generator)
    expected = flat.model.get_image_features(pixels).pooler_output.float()
    found = torch.from_numpy(stem.embed(pixels.numpy()))
    difference, scale = (found - expected).abs().max(), expected.abs().max()
    if not difference <= SAME_FEATURES.get(flat.model.dtype, 5e-2) * scale:
        raise ValueError(
            f"The stem read with numpy differs from the model's by {difference:.3g} (features reach {scale:.3g}): "
            "please report the model's config.json."
        )


def stem_tensors(flat: FlatModel) -> dict[str, torch.Tensor]:
    """Weights of the stem by name; positions are those of the tiles that the processor cuts, shape `(H * H, D)`."""
    model = flat.model.model
    tensors = {f"patch_embedding.projection.{name}": part for name, part in _state(model.patch_embedding.projection)}
    grid = flat.image_processor.tile_size // flat.config.patch_size
    tensors["position_embedding"] = model.patch_embedding.positions_for(grid).detach()[0]
    if model.projector is not None:
        tensors |= {f"projector.{name}": part for name, part in _state(model.projector)}
    return tensors


def _state(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(module.state_dict().items())


def stem_settings(flat: FlatModel) -> dict:
    """What the reader must know beside the weights."""
    config, images, processor = flat.config, flat.image_processor, flat.processor
    tile_size = images.tile_size
    config.tokens_per_tile(tile_size)
    tokens = None
    if processor is not None:
        tokens = [processor.start_image_token, processor.image_token, processor.end_image_token]
    return {
        "patch_size": config.patch_size,
        "shuffle_factor": config.shuffle_factor,
        "has_projector": flat.model.model.projector is not None,
        "tile_size": tile_size,
        "min_tiles": images.min_tiles if images.crop_to_patches else 1,
        "max_tiles": images.max_tiles if images.crop_to_patches else 1,
        "resample": int(images.resample),
        "rescale_factor": images.rescale_factor,
        "image_mean": list(images.image_mean),
        "image_std": list(images.image_std),
        "image_token_id": config.image_token_id,
        "tokens": tokens,
        "text_after_image": "" if processor is None else processor.text_after_image,
    }
