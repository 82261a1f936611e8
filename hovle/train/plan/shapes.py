"""The shapes of a stage's model, from configs alone: no weights are read and none need exist."""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, Qwen3Config
from transformers.configuration_utils import PreTrainedConfig

from ...loading import load_config, reading
from ...model.configuration_hovle import HoVLEConfig
from ...model.language_model import IMAGE_TOKENS, config_around, load_language_config
from ..config import Architecture, ModelConfig, StageConfig, TeacherConfig, load_stage
from ..model.start import check_checkpoint
from ..objectives.letter_guide import LetterGuide
from ..objectives.words import num_character_classes


def _llama(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


_SMOLLM2_135M = _llama(576, 1536, 30, 9, 3, 49152, tied=True)

KNOWN_LANGUAGE_MODELS: dict[str, PreTrainedConfig] = {
    "asset:smollm2-135m-instruct": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-360M-Instruct": _llama(960, 2560, 32, 15, 5, 49152, tied=True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _llama(2048, 8192, 24, 32, 32, 49152, tied=True),
    "internlm/internlm2-chat-1_8b": _llama(2048, 8192, 24, 16, 8, 92544, tied=False),  # a Llama once it is converted
    "Qwen/Qwen3-1.7B": Qwen3Config(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
        dtype="bfloat16",
    ),
}
"""Shapes of the language models that shipped recipes name, so that planning them needs no network."""


@dataclass(frozen=True)
class TeacherShapes:
    """What matters of a teacher that is not there."""

    num_parameters: int
    flops_per_tile: int
    widths: tuple[int, ...]
    """Channels of each matched layer."""


def teacher_shapes(config: TeacherConfig) -> TeacherShapes:
    """Run a teacher without weights on the meta device; ValueError unless it is a timm model."""
    if config.kind != "timm":
        raise ValueError(
            f"Only timm teachers are planned; {config.name} is of kind {config.kind}. Name a timm model of its size, "
            "for instance teacher={name: vit_intern300m_patch14_448, image_size: 448}."
        )
    import timm  # an extra: only distillation needs it

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model: Any = timm.create_model(config.name, pretrained=False).eval()
        count = len(model.feature_info)
        layers = sorted({match.teacher % count for match in config.layers})
        maps = model.forward_intermediates(
            torch.empty(1, 3, config.image_size, config.image_size),
            indices=layers,
            norm=True,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
    widths = tuple(maps[layers.index(match.teacher % count)].shape[1] for match in config.layers)
    return TeacherShapes(sum(item.numel() for item in model.parameters()), counter.get_total_flops(), widths)


@dataclass(frozen=True)
class GuideShapes:
    """What matters of a guide to letters; all zero where a stage has none."""

    num_parameters: int = 0
    """Of the guide and of what makes the student's outputs its features."""
    flops_per_tile: float = 0
    """Of forward and backward pass, in a tile with a line of text."""
    kept_per_tile: float = 0
    """Numbers that autograd keeps."""


def guide_shapes(stage: StageConfig, model: HoVLEConfig) -> GuideShapes:
    """Run a stage's guide to letters on the meta device, if it has one."""
    words = stage.objective.words if stage.objective.name == "distillation" else None
    characters = None if words is None else words.characters
    if characters is None or not characters.guide_weight:
        return GuideShapes()
    sizes: list[int] = []
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False, depth=1) as counter:
        guide = LetterGuide(model, characters.per_token, num_character_classes(characters))
        for layer in (guide.first, guide.second, guide.edges, guide.letters, guide.around):
            layer.register_forward_hook(lambda _, __, output: sizes.append(output.numel()))
        tile = torch.empty(1, model.num_channels, model.image_size, model.image_size)
        guide(tile)
        forward = counter.get_total_flops()
        guide.first(tile)
        first = counter.get_total_flops() - forward
    hidden, num_features = model.text_config.hidden_size, sum(guide.widths)
    reproducing = 2 * hidden * num_features * model.image_seq_length
    return GuideShapes(
        sum(item.numel() for item in guide.parameters()) + (hidden + 1) * num_features + hidden * len(guide.widths),
        3 * (forward + reproducing) - first,  # pixels have no gradient
        2 * sum(sizes[:5]) + 3 * num_features * model.image_seq_length,  # before and after each activation
    )


def model_config(stage: StageConfig, others: Iterable[StageConfig] = ()) -> HoVLEConfig:
    """Describe the model of a stage, whether or not it exists yet.

    Args:
        stage: The stage.
        others: Stages that may write the checkpoint it starts from, for instance those before it.

    Raises:
        ValueError: When neither a folder, nor one of `others`, nor the Hub has the model.
    """
    start = stage.model
    if start.checkpoint is None:
        return _new_model(start)
    if (Path(start.checkpoint) / "config.json").is_file():
        return load_config(start.checkpoint)
    for other in others:
        if Path(other.output) / "model" == Path(start.checkpoint):
            return model_config(other, [item for item in others if item is not other])
    check_checkpoint(
        start.checkpoint,
        advice="Name the recipe that writes it as well, before this one: hovle plan FIRST.yaml SECOND.yaml.",
    )
    return load_config(start.checkpoint)


def _new_model(start: ModelConfig) -> HoVLEConfig:
    language_config = language_model_config(start.language_model or "")
    vocab_size = language_config.vocab_size + len(IMAGE_TOKENS)
    return config_around(
        language_config, image_token_id=vocab_size - 1, vocab_size=vocab_size, **start.part(Architecture)
    )


def language_model_config(name: str) -> PreTrainedConfig:
    """Config of a language model: from its folder, from what is known here, or from the Hub."""
    is_here = (Path(name) / "config.json").is_file()
    if not is_here and name in KNOWN_LANGUAGE_MODELS:
        return KNOWN_LANGUAGE_MODELS[name]
    try:
        with reading(name, weights=False):
            return load_language_config(name)
    except ValueError as error:
        if is_here:
            raise
        raise ValueError(
            f"No config of the language model {name!r}: it is no folder with config.json, it is not among the known "
            f"ones ({', '.join(KNOWN_LANGUAGE_MODELS)}), and the Hub gave none ({error})."
        ) from error


def sibling_stages(recipe: Path, overrides: Sequence[str] = ()) -> list[StageConfig]:
    """The other recipes of a folder, one of which may write the checkpoint this one starts from.

    Overrides of the model hold for them as well; others are meant for the named recipe, and files that are no recipes
    may lie beside it.
    """
    about_model = [override for override in overrides if override.startswith("model.")]
    siblings = []
    for path in sorted(recipe.parent.glob("*.yaml")):
        if path != recipe:
            with contextlib.suppress(ValueError):
                siblings.append(load_stage(str(path), about_model))
    return siblings
