"""What a stage needs before its first step: model, frozen and trainable parts, number format, compiled layers."""

import copy
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from torch import nn

from .. import assets
from ..backbones import final_norm
from ..image_processing_hovle import HoVLEImageProcessor
from ..machine import compiler_problem, fastest_dtype, return_freed_memory
from ..modeling_hovle import HoVLEForConditionalGeneration
from ..processing_hovle import HoVLEProcessor
from .config import ModelConfig, StageConfig
from .data import RandomTextSamples, ReplySamples
from .objectives import DistillationObjective, NextTokenObjective, Objective
from .pixels import PixelNormalization
from .teachers import make_teacher


def start_model(config: StageConfig) -> tuple[HoVLEForConditionalGeneration, HoVLEProcessor]:
    """Load the model a stage starts from, in float32, with its processor."""
    start = config.model
    if start.checkpoint is not None:
        check_checkpoint(start.checkpoint)
        model = HoVLEForConditionalGeneration.from_pretrained(start.checkpoint, dtype=torch.float32)
        processor = HoVLEProcessor.from_pretrained(start.checkpoint)
        check_stated_fields(start, model, processor)
        return model, processor
    assert start.language_model is not None  # StageConfig wants one of the two
    name = resolve_asset(start.language_model)
    model = HoVLEForConditionalGeneration.from_language_model(
        name,
        start.num_embedding_layers,
        untie_text_embeddings=start.untie_text_embeddings,
        image_size=start.image_size,
        patch_size=start.patch_size,
        pixel_shuffle_loc=start.pixel_shuffle_loc,
        image_attention=start.image_attention,
        dtype=torch.float32,
    )
    own_template: dict = {} if start.chat_template is None else {"chat_template": start.chat_template}
    return model, HoVLEProcessor.from_language_model(name, model.config, max_tiles=start.max_tiles, **own_template)


def start_processor(start: ModelConfig) -> HoVLEProcessor:
    """Load the processor of the model a stage starts from, without the model."""
    if start.checkpoint is not None:
        check_checkpoint(start.checkpoint)
        return HoVLEProcessor.from_pretrained(start.checkpoint)
    assert start.language_model is not None  # StageConfig wants one of the two
    own_template: dict = {} if start.chat_template is None else {"chat_template": start.chat_template}
    return HoVLEProcessor.from_language_model(
        resolve_asset(start.language_model),
        max_tiles=start.max_tiles,
        image_size=start.image_size,
        patch_size=start.patch_size,
        pixel_shuffle_loc=start.pixel_shuffle_loc,
        **own_template,
    )


def check_checkpoint(name: str) -> None:
    """Raise where neither a model folder nor a Hub id is named."""
    if name.count("/") != 1 and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"model.checkpoint: no model in {name}. Run the stage before it first, or name a folder "
            "with config.json or a Hub id such as owner/name."
        )


def check_stated_fields(start: ModelConfig, model: HoVLEForConditionalGeneration, processor: HoVLEProcessor) -> None:
    """Raise where a recipe describes a checkpoint otherwise than it is: these fields shape new models only."""
    found = {
        "num_embedding_layers": model.config.num_embedding_layers,
        "image_size": model.config.image_size,
        "patch_size": model.config.patch_size,
        "pixel_shuffle_loc": model.config.pixel_shuffle_loc,
        "image_attention": model.config.image_attention,
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


def resolve_asset(name: str) -> str:
    """Turn `asset:NAME` into the folder or file the asset was fetched to; anything else stays."""
    if not name.startswith("asset:"):
        return name
    kind = name.removeprefix("asset:")
    known = {"smollm2-135m-instruct": assets.language_model, "efficientnet-lite0": assets.teacher}
    if kind not in known:
        raise ValueError(f"Unknown asset {kind!r}; known here: {', '.join(known)}.")
    return str(known[kind]())


def parameter_groups(model: HoVLEForConditionalGeneration) -> dict[str, list[nn.Parameter]]:
    """Parameters by the names recipes use; a tied table belongs to the language model, whose head it is."""
    base = model.model
    stem = list(base.patch_embedding.parameters())
    if base.projector is not None:
        stem += list(base.projector.parameters())
    table = model.get_input_embeddings().weight
    language_model = [*base.language_layers.parameters(), *final_norm(base.language_model).parameters()]
    return {
        "stem": stem,
        "holistic_layers": list(base.embedding_layers.parameters()),
        "text_embeddings": [] if model.config.tie_word_embeddings else [table],
        "language_model": [*language_model, *model.lm_head.parameters()],
    }


def select_trainable(model: HoVLEForConditionalGeneration, config: StageConfig) -> None:
    """Freeze everything, then open the groups the stage trains."""
    model.requires_grad_(False)
    groups = parameter_groups(model)
    for name in config.trainable:
        if not groups[name]:
            raise ValueError(
                f"trainable names {name}, but this model has none of its own: its text table is tied to the head and "
                "stays the language model's. Use model.untie_text_embeddings=true to train a separate one."
            )
        for parameter in groups[name]:
            parameter.requires_grad_(True)


@torch.no_grad()
def store_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep trainable weights in float32; store frozen ones in `dtype` where that rounds nothing."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        elif torch.equal(parameter.data.to(dtype).to(parameter.dtype), parameter.data):
            parameter.data = parameter.data.to(dtype)
    return_freed_memory()


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


def limited_processor(config: StageConfig, processor: HoVLEProcessor) -> HoVLEProcessor:
    """The processor with the stage's own limit of tiles; the one that is saved keeps its own."""
    if config.max_tiles_per_picture is None:
        return processor
    limited = copy.copy(processor)
    limited.image_processor = copy.copy(processor.image_processor)
    limited.image_processor.max_patches = config.max_tiles_per_picture
    return limited


def make_sampler(config: StageConfig, processor: HoVLEProcessor):
    """What turns records into samples for the objective."""
    processor = limited_processor(config, processor)
    if config.objective.name == "distillation":
        return RandomTextSamples(processor, config.objective.num_random_tokens, config.seed)
    return ReplySamples(processor)


def make_optimizer(objective: nn.Module, config: StageConfig) -> torch.optim.AdamW:
    """AdamW over what is trainable; only matrices decay."""
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    groups = [
        {"params": [item for item in parameters if item.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [item for item in parameters if item.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # torch 2.6 cannot resume an empty one
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.adam_betas[0], config.adam_betas[1]), fused=True
    )


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Number format of matrix products: as named, or for `auto` the one this machine multiplies faster in."""
    if name != "auto":
        return getattr(torch, name)
    return fastest_dtype(device)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def checkpoint_activations(model: HoVLEForConditionalGeneration) -> None:
    """Let each decoder layer run again in the backward pass instead of keeping what it computed."""
    # transformers 5.23 renamed it; the old name goes away in 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # It also lets what enters the first layer require a gradient, which only re-entrant checkpoints need: gradients
    # would be computed through frozen layers that nothing before needs.
    model.disable_input_require_grads()


def compile_layers(model: HoVLEForConditionalGeneration, mode: str, say: Callable[[str], object] = print) -> bool:
    """Compile the decoder layers, which share one graph; `auto` runs eager, and says so, where that is impossible."""
    if mode == "off":
        return False
    problem = compiler_problem(model.device)
    if problem is not None:
        if mode == "on":
            raise ValueError(f"compile is on, but torch.compile does not work here: {problem}")
        say(f"Decoder layers run uncompiled, which is slower: torch.compile does not work here ({problem}).")
        return False
    if model.device.type == "cpu":
        # The fused CPU attention has a slow backward pass; spelt out, the compiler fuses all but its matrix products.
        model.set_attn_implementation("eager")
    for layer in model.model.language_model.layers:
        layer.compile()
    return True


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random."""
    torch.manual_seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 - libraries below use the global generator
    random.seed(seed)
