"""Load the model and the processor a stage starts from."""

import dataclasses
import math
import os
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from ...assets import resolve_asset
from ...files.model_folder import refuse_missing_folder
from ...loading import check_chat_template, load_config, load_model, load_processor, reading
from ...model.configuration_hovle import HoVLEConfig
from ...model.language_model import load_language_config
from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ...model.processing_hovle import HoVLEProcessor
from ...model.rotary import embedding_rope_config, same_rotation
from ...packaged import NAMES, STARTS, resolve_model
from ..config import Architecture, Geometry, ModelConfig, StageConfig


def with_shipped_model(config: StageConfig) -> StageConfig:
    """The stage with the folder of a shipped model, where it starts from one by its name."""
    start = config.model
    checkpoint, lower = (
        None if name is None else os.fspath(resolve_model(name, names))
        for name, names in ((start.checkpoint, (*NAMES, *STARTS)), (start.lower_layers, STARTS))
    )
    if (checkpoint, lower) == (start.checkpoint, start.lower_layers):
        return config
    return dataclasses.replace(config, model=dataclasses.replace(start, checkpoint=checkpoint, lower_layers=lower))


def start_model(config: StageConfig) -> tuple[HoVLEForConditionalGeneration, HoVLEProcessor]:
    """Load the model a stage starts from, in float32, with its processor."""
    start = config.model
    if start.checkpoint is not None:
        check_checkpoint(start.checkpoint)
        processor = load_processor(start.checkpoint)
        model = load_model(start.checkpoint, dtype=torch.float32)
        check_stated_fields(start, model, processor)
        return model, processor
    assert start.language_model is not None  # ModelConfig wants one of the two
    name = resolve_asset(start.language_model)
    with reading(name):
        model = HoVLEForConditionalGeneration.from_language_model(
            name, dtype=torch.float32, **start.part(Architecture)
        )
    if start.lower_layers is not None:
        check_checkpoint(start.lower_layers, "lower_layers")
        grow(model, load_model(start.lower_layers, dtype=torch.float32), start.lower_layers)
    return model, _new_processor(name, start, config=model.config)


@torch.no_grad()
def grow(model: HoVLEForConditionalGeneration, lower: HoVLEForConditionalGeneration, name: str) -> None:
    """Take stem and lowest holistic layers of a new model from another one with the same number of them or fewer.

    Args:
        model: The new model, its holistic layers the identity; changed in place.
        lower: What it grows from.
        name: Of the latter, for errors.

    Raises:
        ValueError: Where one does not fit into the other.
    """
    count, most = lower.config.num_embedding_layers, model.config.num_embedding_layers
    if count > most:
        raise ValueError(
            f"model.lower_layers: {name} has {count} holistic layers, but the new model only {most}; raise "
            "model.num_embedding_layers."
        )
    try:
        _below(model, count).load_state_dict(_below(lower, count).state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"model.lower_layers: {name} does not fit below the new model; expected one around the same language "
            f"model with the same model.image_size, patch_size, pixel_shuffle_loc and untie_text_embeddings. {error}"
        ) from None


def _below(model: HoVLEForConditionalGeneration, num_layers: int) -> nn.ModuleDict:
    """What lies below a holistic layer: the stem, the layers, the text table where they have one of their own."""
    base = model.model
    parts = {"patch_embedding": base.patch_embedding, "layers": nn.ModuleList(base.embedding_layers[:num_layers])}
    if base.projector is not None:
        parts["projector"] = base.projector
    if not model.config.tie_word_embeddings:
        parts["text_embeddings"] = model.get_input_embeddings()
    return nn.ModuleDict(parts)


def start_processor(start: ModelConfig) -> HoVLEProcessor:
    """Load the processor of the model a stage starts from, without the model."""
    if start.checkpoint is not None:
        check_checkpoint(start.checkpoint)
        return load_processor(start.checkpoint)
    assert start.language_model is not None  # ModelConfig wants one of the two
    return _new_processor(resolve_asset(start.language_model), start, **start.part(Geometry))


class Positions(NamedTuple):
    """How long samples may be."""

    total: int | None = None
    """Positions of the language model; None where its config has no limit."""
    shared: float = math.inf
    """Those of conversations that share pictures: beyond, a rope rotates what is shared by the length of each."""


UNLIMITED = Positions()


def start_positions(start: ModelConfig) -> Positions:
    """Positions of the model a stage starts from, without the model."""
    if start.checkpoint is not None:
        check_checkpoint(start.checkpoint)
        return positions_of(load_config(start.checkpoint))
    assert start.language_model is not None  # ModelConfig wants one of the two
    name = resolve_asset(start.language_model)
    with reading(name, weights=False):
        text_config = load_language_config(name)
    return _positions(text_config, text_config)


def positions_of(config: HoVLEConfig) -> Positions:
    """Positions of a model."""
    own_rope = embedding_rope_config(config.text_config, config.embedding_rope_parameters)
    return _positions(config.text_config, own_rope)


def _positions(text_config: PreTrainedConfig, own_rope: PreTrainedConfig) -> Positions:
    shared = min(same_rotation(text_config), same_rotation(own_rope))
    return Positions(getattr(text_config, "max_position_embeddings", None), shared)


def _new_processor(name: str, start: ModelConfig, **geometry) -> HoVLEProcessor:
    own_template: dict = {} if start.chat_template is None else {"chat_template": start.chat_template}
    with reading(name, weights=False):
        processor = HoVLEProcessor.from_language_model(name, max_tiles=start.max_tiles, **geometry, **own_template)
        check_chat_template(processor)
    return processor


def check_checkpoint(
    name: str, field: str = "checkpoint", advice: str = "Where a stage writes it, run that one first."
) -> None:
    """Raise where neither a model folder nor a Hub id is named, with advice for who expects one to come."""
    try:
        refuse_missing_folder(name)
    except ValueError as error:
        raise ValueError(f"model.{field}: {error} {advice}") from None


def check_stated_fields(start: ModelConfig, model: HoVLEForConditionalGeneration, processor: HoVLEProcessor) -> None:
    """Raise where a recipe describes a checkpoint otherwise than it is: these fields shape new models only."""
    found = {
        **{name: getattr(model.config, name, None) for name in start.part(Architecture)},
        "untie_text_embeddings": not model.config.tie_word_embeddings,
        "max_tiles": processor.image_processor.max_patches,
        "chat_template": processor.chat_template,
    }
    for name, value in found.items():
        stated = getattr(start, name)
        if stated not in (value, ModelConfig.__dataclass_fields__[name].default):
            raise ValueError(
                f"model.{name} is {stated}, but {start.checkpoint} has {value}; take it out of the recipe."
            )
