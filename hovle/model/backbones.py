"""What families of decoders do differently from Llama, gathered in one place.

Where HoVLE runs a stock decoder section by section (holistic layers, then language model), it repeats the few lines
that join a decoder's layers. This module knows how those lines differ between families; what it does not know is found
by comparing text logits with the bare model's (`language_model.py`) and refused by name.
"""

import inspect
import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import PreTrainedModel

from .rotary import rotary_table

MASK_FUNCTIONS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
"""Attention patterns a layer may have, under their transformers names."""

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""How layers, masks, outputs and `generate` call a cache: `cache` since transformers 5.24."""

NORM_NAMES = ("norm", "final_layernorm")
"""Names of the norm after the last layer: most families', Phi's."""

NO_ROPE_IN_FULL_ATTENTION = frozenset(
    ("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe", "flint", "kolibri1"),
)
"""Model types whose layers of full attention know no positions, but for what the sliding ones tell them."""

DENSE_LAYER_COUNTS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "moe_layer_end_index")
"""Config fields that say which layers are dense, the others a mixture of experts, by an index counted from below."""

EMBEDDING_DROPOUTS = ("embd_pdrop", "embedding_dropout")
"""Config fields of a dropout between input embedding matrix and first layer: Phi's, Starcoder 2's."""

RESIDUAL_WRITERS = re.compile(r"(^|\.)(o_proj|dense|down_proj|fc2|c_proj|output_linear)([._](weight|bias))?$")
"""Parameters of attention and MLP whose product is added to the residual stream, experts included."""


def attention_types(text_config: PreTrainedConfig) -> list[str]:
    """Name the attention pattern of each decoder layer, as transformers' caches read it from the config."""
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types is not None:
        return list(layer_types)
    sliding = getattr(text_config, "sliding_window", None) is not None
    return ["sliding_attention" if sliding else "full_attention"] * text_config.num_hidden_layers


def only_sliding_layers_rotate(text_config: PreTrainedConfig) -> bool:
    """Whether layers of full attention leave queries and keys as they are, whatever their positions."""
    sliding = getattr(text_config, "sliding_window", None) is not None
    return sliding and text_config.model_type in NO_ROPE_IN_FULL_ATTENTION


def rotating_layers(text_config: PreTrainedConfig) -> list[bool]:
    """Say of each decoder layer whether it uses a rotary table."""
    if (flags := getattr(text_config, "no_rope_layers", None)) is not None:  # 1 means with rotary positions
        return [bool(flag) for flag in flags]
    types = attention_types(text_config)
    return [pattern == "sliding_attention" or not only_sliding_layers_rotate(text_config) for pattern in types]


def add_layers_below(text_config: PreTrainedConfig, num_new: int, new_type: str) -> None:
    """Count `num_new` more layers in a decoder's config, placed below those it has and built like the lowest one.

    Args:
        text_config: Config of the decoder, changed in place.
        num_new: Layers to add.
        new_type: Their attention pattern, where layers differ in it.
    """
    num_old = text_config.num_hidden_layers
    text_config.num_hidden_layers += num_new
    _shift_dense_layers(text_config, num_old, num_new)
    for name, values in list(vars(text_config).items()):
        if "layer" in name and name != "mlp_only_layers" and isinstance(values, list) and len(values) == num_old:
            # SmolLM3's no_rope_layers: 1 means with rotary positions.
            new = {"layer_types": new_type, "no_rope_layers": 1}.get(name, values[0])
            setattr(text_config, name, [new] * num_new + values)


def _shift_dense_layers(text_config: PreTrainedConfig, num_old: int, num_new: int) -> None:
    """Keep a mixture of experts' dense layers dense, whose index in the decoder grows by `num_new`."""
    for name in DENSE_LAYER_COUNTS:
        if getattr(text_config, name, None):
            setattr(text_config, name, getattr(text_config, name) + num_new)
    if getattr(text_config, "mlp_only_layers", None) is None:
        return
    step = getattr(text_config, "decoder_sparse_step", 1)
    dense = [index for index in range(num_old) if index in text_config.mlp_only_layers or (index + 1) % step]
    new = [*range(num_new)] if 0 in dense else []
    text_config.mlp_only_layers = [*new, *(index + num_new for index in dense)]
    text_config.decoder_sparse_step = 1


def check_backbone(decoder: PreTrainedModel) -> None:
    """Raise ValueError, with the backbone's name, unless it is a decoder that HoVLE can run section by section."""
    config = decoder.config
    name = f"{type(decoder).__name__} (model_type {config.model_type!r})"
    missing = [part for part in ("embed_tokens", "layers", "rotary_emb") if not hasattr(decoder, part)]
    if not any(hasattr(decoder, norm) for norm in NORM_NAMES):
        missing.append("norm")
    if not missing and decoder.rotary_emb is None:
        missing.append("rotary positions")
    if missing:
        raise ValueError(
            f"{name} cannot be the backbone of HoVLE: it lacks {', '.join(missing)}. HoVLE needs a decoder built like "
            "Llama's."
        )
    if differing := sorted(getattr(config, "per_layer_attributes", None) or ()):  # Gemma 4's global heads
        raise ValueError(
            f"{name} cannot be the backbone of HoVLE: its layers differ in {', '.join(differing)}, but the holistic "
            "layers need one shape for all."
        )
    unknown = sorted(set(attention_types(config)) - MASK_FUNCTIONS.keys())
    if unknown:
        raise ValueError(
            f"{name} cannot be the backbone of HoVLE: it has layers of type {', '.join(unknown)}; only "
            f"{' and '.join(MASK_FUNCTIONS)} are supported."
        )


def refuse_router_losses(text_config: PreTrainedConfig, wants_router_logits: bool | None) -> None:
    """Raise ValueError where a mixture of experts is asked for router logits, or the auxiliary loss made of them."""
    if wants_router_logits or getattr(text_config, "output_router_logits", False):
        raise ValueError(
            "HoVLE gives no router logits and trains mixtures of experts without the routers' auxiliary loss: leave "
            "output_router_logits out, and set it to False in the language model's config."
        )


def final_norm(decoder: PreTrainedModel) -> nn.Module:
    """The norm after the last layer."""
    return next(getattr(decoder, name) for name in NORM_NAMES if hasattr(decoder, name))


def has_rotary_per_pattern(rotary_emb: nn.Module) -> bool:
    """Whether a family (Gemma 3, OLMo 3) has a rotary table of its own for each attention pattern."""
    return "layer_type" in inspect.signature(rotary_emb.forward).parameters


def rotary_tables(
    rotary_emb: nn.Module, hidden_states: torch.Tensor, position_ids: torch.Tensor, types: Sequence[str]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Cosines and sines of the positions for each attention pattern among some layers."""
    patterns = sorted(set(types))
    if has_rotary_per_pattern(rotary_emb):
        return {pattern: rotary_table(rotary_emb, hidden_states, position_ids, pattern) for pattern in patterns}
    return dict.fromkeys(patterns, rotary_table(rotary_emb, hidden_states, position_ids))


def scale_embeddings(embeds: torch.Tensor, text_config: PreTrainedConfig, training: bool = False) -> torch.Tensor:
    """Scale what enters the first layer, as Granite does, or drop some in training, as Phi and Starcoder 2 do.

    Gemma's input embeddings scale themselves.
    """
    multiplier = getattr(text_config, "embedding_multiplier", None)
    embeds = embeds if multiplier is None else embeds * multiplier
    dropout = max(getattr(text_config, name, None) or 0.0 for name in EMBEDDING_DROPOUTS)
    return nn.functional.dropout(embeds, dropout, training) if dropout else embeds


def scale_logits(logits: torch.Tensor, text_config: PreTrainedConfig) -> torch.Tensor:
    """Scale the head's output: Granite divides, Cohere multiplies, Gemma 2 squeezes it between two bounds."""
    if (divisor := getattr(text_config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (factor := getattr(text_config, "logit_scale", None)) is not None:
        logits = logits * factor
    if (bound := getattr(text_config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / bound) * bound
    return logits


@torch.no_grad()
def zero_residual_writers(layer: nn.Module) -> None:
    """Make a decoder layer the identity: zero what its attention and MLP add to the residual stream."""
    for name, parameter in layer.named_parameters():
        if RESIDUAL_WRITERS.search(name):
            parameter.zero_()
