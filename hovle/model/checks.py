"""Guards of the forward pass: what callers could get wrong without noticing is refused, with what to do instead.

Guards that read values back step aside while torch.compile traces, whose graph they would break.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import nn
from transformers.cache_utils import Cache

from .backbones import attention_types
from .configuration_hovle import HoVLEConfig

Arguments = ParamSpec("Arguments")


def may_read_values() -> bool:
    """Whether values of tensors may be read back: not while torch.compile traces."""
    return not torch.compiler.is_compiling()


def unless_compiling(function: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Let a function without a result do nothing while torch.compile traces."""

    @functools.wraps(function)
    def stepping_aside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        if may_read_values():
            function(*args, **kwargs)

    return stepping_aside


# ---------------------------------------------------------------------------------------------- engines

ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
"""What the attention is called that an engine puts into the decoder's layers -> that engine."""


def check_engine(config: HoVLEConfig) -> None:
    """Raise ValueError, with each reason, for a model that an engine's attention over its own cache would misread.

    Such an engine keeps one causal sequence for a prompt: it would run these models and answer wrongly.
    """
    attention = config.text_config._attn_implementation or ""
    engine = next((name for prefix, name in ENGINES.items() if attention.startswith(prefix)), None)
    reasons = []
    if config.pixel_shuffle_loc == "post":
        reasons.append("it is a HoVLE-HD, whose holistic layers see a longer sequence than the language model")
    if config.image_attention != "causal":
        reasons.append(f"image_attention is {config.image_attention!r}: tokens of a picture see later ones")
    if engine is not None and reasons:
        raise ValueError(
            f"{engine} cannot run this model: {'; '.join(reasons)}. It runs in hovle (`hovle serve`) and in "
            "transformers."
        )


# ---------------------------------------------------------------------------------------------- images


def check_pixel_values(pixel_values: torch.Tensor, config: HoVLEConfig) -> None:
    """Raise ValueError unless these are square tiles, `(N, C, s, s)`, that divide into whole tokens.

    They are normalised floating-point numbers, or bytes that the model can normalise.
    """
    if pixel_values.dim() != 4 or pixel_values.shape[1] != config.num_channels:
        raise ValueError(
            f"pixel_values must have shape (tiles, {config.num_channels}, size, size), "
            f"got {tuple(pixel_values.shape)}."
        )
    if pixel_values.dtype != torch.uint8 and not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values must be normalised floating-point numbers or bytes (uint8), got {pixel_values.dtype}."
        )
    if pixel_values.dtype == torch.uint8 and len(config.image_mean) != config.num_channels:
        raise ValueError(
            f"Tiles of bytes have {config.num_channels} channels, but the config's image_mean and image_std have "
            f"{len(config.image_mean)}: set them, or give normalised tiles."
        )
    if pixel_values.shape[2] != pixel_values.shape[3]:
        raise ValueError(f"Tiles must be square, got {pixel_values.shape[2]} x {pixel_values.shape[3]} pixels.")
    config.tokens_per_tile(pixel_values.shape[-1])


def check_one_of(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, *images: object) -> None:
    """Raise ValueError unless there are ids or embeddings, and ids where there are images."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    if input_ids is None and any(image is not None for image in images):
        raise ValueError("Pictures need input_ids, which say where they stand; inputs_embeds do not.")


def check_image_source(pixel_values: torch.Tensor | None, image_outputs: object | None) -> None:
    """Raise ValueError where images are given twice."""
    if pixel_values is not None and image_outputs is not None:
        raise ValueError("Give pixel_values or mm_encoder_outputs, not both.")


@unless_compiling
def check_image_tokens(image_mask: torch.Tensor, num_tiles: int, tokens_per_tile: int) -> None:
    """Raise ValueError unless the prompts hold exactly the placeholders that the tiles fill.

    Args:
        image_mask: True at placeholders, shape `(B, T)`, bool.
        num_tiles: Tiles in `pixel_values`.
        tokens_per_tile: Placeholders one tile fills.
    """
    num_placeholders = int(image_mask.sum())
    if num_placeholders != num_tiles * tokens_per_tile:
        raise ValueError(
            f"The prompts hold {num_placeholders} image tokens but the {num_tiles} tiles fill "
            f"{num_tiles * tokens_per_tile} ({tokens_per_tile} each). Build both with the same HoVLEProcessor."
        )


def check_images(
    image_mask: torch.Tensor,
    image_features: torch.Tensor | None,
    is_encoded: bool,
    cache: Cache | None,
    config: HoVLEConfig,
) -> None:
    """Raise ValueError unless placeholders and tiles match, none torn apart.

    Args:
        image_mask: True at placeholders, shape `(B, T)`, bool.
        image_features: Output of the stem, shape `(N, S, D)` or longer for HD; None without images.
        is_encoded: Whether the caller gave features instead of pixels: `generate` may cut these into chunks.
        cache: Of earlier tokens.
        config: Of the model.
    """
    if image_features is None:
        _check_no_image_tokens(image_mask, cache, config)
        return
    tokens_per_tile = image_features.shape[1] // config.slots_per_placeholder
    check_image_tokens(image_mask, len(image_features), tokens_per_tile)
    if not is_encoded:
        check_whole_tiles(image_mask, tokens_per_tile)


@unless_compiling  # a static cache tells its length as a tensor
def _check_no_image_tokens(image_mask: torch.Tensor, cache: Cache | None, config: HoVLEConfig) -> None:
    # A single token after a cache is one the model itself has generated, even if it is the placeholder.
    if cache is None or cache.get_seq_length() == 0 or image_mask.shape[1] > 1:
        check_image_tokens(image_mask, 0, config.image_seq_length)


@unless_compiling
def check_whole_tiles(image_mask: torch.Tensor, tokens_per_tile: int) -> None:
    """Raise ValueError unless whole tiles fill each unbroken run of placeholders: a tile belongs to one prompt.

    Args:
        image_mask: True at placeholders, shape `(B, T)`, bool.
        tokens_per_tile: Placeholders one tile fills.
    """
    is_last = image_mask & ~nn.functional.pad(image_mask, (-1, 1))
    counts = image_mask.flatten().cumsum(0).view_as(image_mask)
    rows = (is_last & (counts % tokens_per_tile != 0)).any(dim=1).nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"Row {rows[0]} of the prompts holds image tokens that are no whole number of tiles ({tokens_per_tile} "
            "tokens each), so a tile would be torn apart. Build prompts with HoVLEProcessor."
        )


# ---------------------------------------------------------------------------------------------- masks, positions


def check_sequence(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    config: HoVLEConfig,
) -> None:
    """Raise ValueError where mask, positions or cache of the language model's sequence would do something else.

    Args:
        inputs_embeds: Shape `(B, T, D)`.
        attention_mask: The caller's.
        position_ids: The caller's, shape `(B, T)`.
        cache: Of earlier tokens.
        config: Of the model.
    """
    check_cache_kind(cache, config)
    _check_padding_mask(attention_mask, inputs_embeds.shape[0], inputs_embeds.shape[1], cache)
    if position_ids is not None:
        _check_positions(position_ids, attention_mask, cache, config)


@unless_compiling
def _check_padding_mask(
    attention_mask: torch.Tensor | dict | None, batch_size: int, num_new: int, cache: Cache | None
) -> None:
    """Raise ValueError unless a 2-D mask covers the rows of a batch with all tokens, cached and new.

    Args:
        attention_mask: The caller's; others than 2-D ones pass.
        batch_size: B.
        num_new: T.
        cache: Of earlier tokens.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return
    if cache is not None and cache.is_compileable and num_new == 1:
        return  # a static cache tells its length as a tensor, which each step would wait for
    num_cached = 0 if cache is None else int(cache.get_seq_length())
    if attention_mask.shape != (batch_size, num_cached + num_new):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but {batch_size} rows of {num_cached} cached "
            f"and {num_new} new tokens need {(batch_size, num_cached + num_new)}: it covers what the cache holds too."
        )


def check_cache_kind(cache: Cache | None, config: HoVLEConfig) -> None:
    """Raise ValueError for a kind of cache that the attention would misread."""
    if cache is not None and cache.is_compileable and "flex" in config.text_config._attn_implementation:
        raise ValueError(
            "flex_attention with a static cache reads a wrong length in transformers' masks: take a dynamic "
            "cache, or sdpa or eager attention."
        )


def check_own_mask(config: HoVLEConfig) -> None:
    """Raise ValueError where a caller's 4-D mask cannot be used."""
    if "sliding_attention" in attention_types(config.text_config):
        raise ValueError("A 4-D attention_mask cannot be combined with sliding attention; give a 2-D one.")
    attention = config.text_config._attn_implementation
    if "sdpa" not in attention and attention != "eager":
        raise ValueError(f"A 4-D attention_mask needs sdpa or eager attention, not {attention}.")


def check_bidirectional_attention(config: HoVLEConfig) -> None:
    """Raise ValueError where tokens of one image cannot see each other in both directions."""
    if "flash" in config.text_config._attn_implementation:
        raise ValueError("Flash attention is causal; bidirectional pictures need sdpa, eager or flex_attention.")


@unless_compiling
def _check_positions(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | dict | None, cache: Cache | None, config: HoVLEConfig
) -> None:
    """Raise ValueError for position ids of several tokens that the masks or HD's long sequence would not follow."""
    length = position_ids.shape[1]
    if length == 1:
        return
    steps = position_ids.diff(dim=1)
    if attention_mask is None and cache is not None and (cache.is_compileable or cache.get_seq_length()):
        if bool((steps != 1).any()):
            raise ValueError(
                "position_ids restart or jump, as those of packed documents do, but with a static cache, or one "
                "that holds tokens, the documents would see each other: use an empty dynamic cache, or none."
            )
    elif config.pixel_shuffle_loc == "post":
        is_fine = (steps == 1) | (position_ids[:, 1:] == 0)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            is_token = attention_mask[:, -length:].bool()
            is_fine = is_fine | ~(is_token[:, 1:] & is_token[:, :-1])
        if not bool(is_fine.all()):
            raise ValueError(
                "HoVLE-HD counts the positions of its long sequence by itself: position_ids must go on by 1, or "
                "restart at 0 where a document begins."
            )


# ---------------------------------------------------------------------------------------------- HoVLE-HD


def check_mask_of_hd(attention_mask: torch.Tensor | dict | None) -> None:
    """Raise ValueError for masks of which HD cannot make one of its long sequence."""
    if attention_mask is not None and (isinstance(attention_mask, dict) or attention_mask.dim() != 2):
        raise ValueError(
            "HoVLE-HD builds its own masks for two sequences: give a 2-D attention_mask (batch, tokens), or none."
        )


def check_rows_of_hd(position_ids: torch.Tensor) -> None:
    """Raise ValueError where documents are packed into several rows of different long lengths, which need a mask."""
    if not may_read_values():
        raise ValueError(
            "HoVLE-HD compiled as one graph cannot tell whether a batch without attention_mask is packed: "
            "give one, of ones where nothing is padded, or pack into one row."
        )
    if bool((position_ids == 0).sum(dim=1).max() > 1):
        raise ValueError(
            "Packed rows of HoVLE-HD must hold the same number of image tokens each: rows of different long "
            "lengths need a padding mask, which would let documents see each other. Pack into one row."
        )


def check_windows_of_hd(is_token: torch.Tensor, cache: Cache | None, config: HoVLEConfig) -> None:
    """Raise ValueError where HD's own padding would come to lie between cached tokens and a sliding window's end.

    Windows count slots, so that padding would push tokens out of them.

    Args:
        is_token: False at the padding that HD adds, shape `(B, L)`.
        cache: Of earlier tokens.
        config: Of the model.
    """
    if cache is None or len(is_token) == 1 or "sliding_attention" not in attention_types(config.text_config):
        return
    if may_read_values():
        is_wrong = bool(cache.get_seq_length() > 0) and not bool(is_token.all())
    else:  # a static cache tells its length as a tensor
        is_wrong = cache.is_compileable or cache.get_seq_length() > 0
    if is_wrong:
        raise ValueError(
            "HoVLE-HD with a sliding window cannot continue a cache with rows that gain different numbers of "
            "image tokens: give the whole conversation at once, or one row at a time."
        )


def check_layers_of_hd(config: HoVLEConfig) -> None:
    """Raise ValueError for a decoder whose layers mix attention patterns, which HD's two sequences do not allow."""
    patterns = sorted(set(attention_types(config.text_config)))
    if len(patterns) > 1:
        raise ValueError(
            f"HoVLE-HD needs one attention pattern in all layers, but {config.text_config.model_type} mixes "
            f"{' and '.join(patterns)}."
        )


# ---------------------------------------------------------------------------------------------- saved weights


def check_loaded_weights(name: Any, missing: list[str]) -> None:
    """Raise ValueError where weights are missing, whose place random ones would take."""
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights, among them {sorted(missing)[0]}; random ones would take their "
            "place. Save the model anew, or load it all the same with output_loading_info=True."
        )


def check_new_vocabulary(num_tokens: int | None, config: HoVLEConfig) -> None:
    """Raise ValueError when the placeholder would lose its row."""
    if num_tokens is not None and num_tokens <= config.image_token_id:
        raise ValueError(
            f"A vocabulary of {num_tokens} tokens leaves no row for image_token_id {config.image_token_id}: keep at "
            f"least {config.image_token_id + 1}."
        )
