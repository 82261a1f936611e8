"""Run the decoder: all of it by its own forward pass, or one section of its layers.

A HoVLE is its stock decoder on embeddings of words and images, unless something happens between the holistic layers
and the language model. Then the two sections run one after the other.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .backbones import CACHE, attention_types, rotary_tables
from .cache import holds_tokens
from .checks import may_read_values
from .configuration_hovle import HoVLEConfig
from .holistic_sequence import LanguageInputs, SectionInputs
from .masks import Masks, flash_arguments
from .rotary import depends_on_length

STOCK_FAMILIES = frozenset(
    (
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "internlm3",
        "llama",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "olmo3",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "starcoder2",
    )
)
"""Model types whose own forward pass gives what their layers give section by section; a test compares each."""


def is_stock_decoder(decoder: PreTrainedModel, inputs: LanguageInputs, config: HoVLEConfig) -> bool:
    """Whether all layers may run as one call of the decoder on embeddings of words and images, given one rope.

    Not so where something happens between holistic layers and language model: another sequence (HoVLE-HD), other
    masks (bidirectional images), a division by the norm. Not for a family outside `STOCK_FAMILIES`, which nobody has
    compared. Not for rotary tables that look at the length of all that is packed (`rotary_table`). And not with images
    in a graph, of a layer (as in training) or of the whole model: what the holistic layers give is then out of reach.
    """
    is_plain = config.pixel_shuffle_loc != "post" and config.image_attention == "causal"
    is_known = config.text_config.model_type in STOCK_FAMILIES
    if not is_plain or not is_known or config.normalize_encoder_output or depends_on_length(decoder.rotary_emb):
        return False
    is_compiled = getattr(_first_language_layer(decoder, config), "_compiled_call_impl", None) is not None
    return inputs.image_features is None or (may_read_values() and not is_compiled)


def _first_language_layer(decoder: PreTrainedModel, config: HoVLEConfig) -> nn.Module:
    return decoder.layers[config.num_embedding_layers]


def run_stock_decoder(
    decoder: PreTrainedModel, inputs: LanguageInputs, cache: Cache | None, config: HoVLEConfig, /, **kwargs: Any
) -> tuple[BaseModelOutputWithPast, torch.Tensor | None]:
    """Run the decoder as its own family does, in one call, which scales the embeddings too where the family does.

    Args:
        decoder: The language model with the holistic layers below it.
        inputs: Embeddings, masks and positions.
        cache: Extended in place.
        config: Of the model.
        **kwargs: Handed down.

    Returns:
        What the decoder gives, and the image part of what enters the language model, shape `(N, S, D)`.
    """
    if "flash" in config.text_config._attn_implementation:
        masks = inputs.masks(config, cache)
        kwargs |= _flash_arguments(kwargs, config, inputs.embeds, masks, inputs.position_ids, cache)
    watched = None if inputs.image_features is None else _first_language_layer(decoder, config)
    with _watch_input(watched) as entering:
        outputs = decoder(
            inputs_embeds=inputs.merged(),
            attention_mask=_stock_mask(inputs, cache, config),
            position_ids=inputs.position_ids,
            **({CACHE: cache, "use_cache": cache is not None} | kwargs),
        )
    return outputs, inputs.images_of(entering[0]) if entering else None


def _stock_mask(inputs: LanguageInputs, cache: Cache | None, config: HoVLEConfig) -> torch.Tensor | Masks | None:
    """The caller's mask where the decoder makes of it what `causal_masks` does, else a ready one, which it keeps."""
    given = inputs.attention_mask
    is_padding = given is None or (isinstance(given, torch.Tensor) and given.dim() == 2)
    has_windows = "sliding_attention" in attention_types(config.text_config)  # which some families leave out
    if is_padding and not has_windows and (cache is None or holds_tokens(cache)):  # an empty one hides documents
        return given
    masks = inputs.masks(config, cache)
    if getattr(config.text_config, "layer_types", None) is not None:  # such a family takes one for each pattern
        return masks
    (mask,) = masks.values()
    # Without any mask a decoder would look for documents in rows whose mask says that there are none.
    return given if mask is None and is_padding else mask


@contextlib.contextmanager
def _watch_input(layer: nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """Keep the hidden states that enter a layer while this thread is within, in a list that fills as it is called."""
    entering: list[torch.Tensor] = []
    if layer is None:
        yield entering
        return
    thread = threading.get_ident()

    def keep(_module: nn.Module, arguments: tuple) -> None:
        if threading.get_ident() == thread:
            entering.append(arguments[0])

    hook = layer.register_forward_pre_hook(keep)
    try:
        yield entering
    finally:
        hook.remove()


def run_section(
    layers: Iterable[nn.Module],
    patterns: Sequence[str],
    rotary_emb: nn.Module,
    inputs: SectionInputs,
    cache: Cache | None,
    config: HoVLEConfig,
    /,
    layer_outputs: list[torch.Tensor] | None = None,
    run_layers: Callable[..., torch.Tensor] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Run one section of the decoder, without its final norm.

    Args:
        layers: Those of the section.
        patterns: Their attention patterns.
        rotary_emb: Their rotary table.
        inputs: What enters the first of them, masks and positions.
        cache: Extended in place.
        config: Of the model.
        layer_outputs: Gathers what each layer gives.
        run_layers: Takes the place of `run_all`, for instance the same compiled.
        **kwargs: Handed down.

    Returns:
        What leaves the last of them, shape `(B, L, D)`.
    """
    hidden_states, masks, position_ids = inputs.embeds, inputs.causal_masks, inputs.position_ids
    position_embeddings = rotary_tables(rotary_emb, hidden_states, position_ids, patterns)
    kwargs |= _flash_arguments(kwargs, config, hidden_states, masks, position_ids, cache)
    return (run_layers or run_all)(
        layers, patterns, hidden_states, masks, position_ids, position_embeddings, cache, layer_outputs, **kwargs
    )


def run_all(
    layers: Iterable[nn.Module],
    patterns: Sequence[str],
    hidden_states: torch.Tensor,
    masks: Masks,
    position_ids: torch.Tensor,
    position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]],
    cache: Cache | None,
    layer_outputs: list[torch.Tensor] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Run layers one after the other; what is between embeddings and norm, and all that takes long.

    Args:
        layers: To run.
        patterns: Their attention patterns.
        hidden_states: What enters the first of them, shape `(B, L, D)`.
        masks: Of each pattern.
        position_ids: Shape `(B, L)` or `(1, L)`.
        position_embeddings: Cosines and sines of each pattern.
        cache: Extended in place.
        layer_outputs: Gathers what each layer gives.
        **kwargs: Handed down.

    Returns:
        What leaves the last of them, shape `(B, L, D)`.
    """
    for layer, pattern in zip(layers, patterns, strict=True):
        hidden_states = layer(
            hidden_states,
            attention_mask=masks[pattern],
            position_ids=position_ids,
            position_embeddings=position_embeddings[pattern],
            **({CACHE: cache, "use_cache": cache is not None} | kwargs),
        )
        if layer_outputs is not None:
            layer_outputs.append(hidden_states)
    return hidden_states


def _flash_arguments(kwargs: dict, *arguments: Any) -> dict:
    """Where documents begin, but for continuous batching, which says itself what is to be attended to."""
    return {} if "cache" in kwargs else flash_arguments(*arguments)
