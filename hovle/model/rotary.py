"""Rotary parameters of the holistic layers: the language model's, but for what `embedding_rope_parameters` says."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from .config_values import ADVICE, is_positive

ROPE_TYPES = sorted({"default", *ROPE_INIT_FUNCTIONS})
NAMES = sorted({"max_position_embeddings", *RopeParameters.__annotations__})
ORIGINAL_LENGTH = "original_max_position_embeddings"

POSITIVE = (
    *("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
    *("max_position_embeddings", "original_max_position_embeddings"),
)
"""Parameters that must be positive numbers."""


def embedding_rope_config(text_config: PreTrainedConfig, own: dict[str, Any] | None) -> Any:
    """Text config as the rotary table of the holistic layers reads it.

    Args:
        text_config: Config of the decoder; left as it is.
        own: `embedding_rope_parameters` of `HoVLEConfig`. What it does not say is the language model's; the scaling of
            another `rope_type` than `own`'s is not.

    Raises:
        ValueError: When a parameter is unknown, missing or no number that can work, with its name and value.
    """
    rope_config: Any = copy.deepcopy(text_config)
    if own is None:
        return rope_config
    language: dict[str, Any] = getattr(text_config, "rope_parameters", None) or {"rope_type": "default"}
    if any(isinstance(value, dict) for value in language.values()):
        raise ValueError(
            f"embedding_rope_parameters cannot be combined with {text_config.model_type}, which has a rotary table "
            "for each attention pattern: leave them out."
        )
    own = {name: value for name, value in own.items() if value is not None}
    check_own_rope(own)
    if own.get("rope_type", language["rope_type"]) != language["rope_type"]:
        language = {name: language[name] for name in ("rope_theta", "partial_rotary_factor") if name in language}
    rope_parameters = {**language, **own}
    rotated, expected = (part.get("partial_rotary_factor", 1.0) for part in (rope_parameters, language))
    if rotated != expected:
        raise ValueError(
            f"embedding_rope_parameters rotate {rotated} of each attention head, the language model {expected}; one "
            "decoder can do only one of them: leave partial_rotary_factor out."
        )
    if "max_position_embeddings" in rope_parameters:
        rope_config.max_position_embeddings = rope_parameters.pop("max_position_embeddings")
    rope_config.rope_parameters = rope_parameters
    if (
        hasattr(rope_config, ORIGINAL_LENGTH) and ORIGINAL_LENGTH in own
    ):  # Phi-3's own field comes before the parameters
        setattr(rope_config, ORIGINAL_LENGTH, own[ORIGINAL_LENGTH])
    try:
        rope_config.validate_rope()
    except KeyError as error:
        raise ValueError(f"embedding_rope_parameters are incomplete: {error.args[0]}.") from error
    return rope_config


def _patterns(rotary_emb: nn.Module) -> list[dict[str, Any]]:
    """Parameters of a table, and those of each attention pattern where it has several."""
    parameters = getattr(rotary_emb.config, "rope_parameters", None) or {}
    return [parameters, *(value for value in parameters.values() if isinstance(value, dict))]


def depends_on_length(rotary_emb: nn.Module) -> bool:
    """Whether a table rotates a token otherwise in a longer sequence."""
    types = [str(pattern.get("rope_type")) for pattern in _patterns(rotary_emb)]
    return any(rope_type == "longrope" or "dynamic" in rope_type for rope_type in types)


def rope_switch(rotary_emb: nn.Module) -> float:
    """Longest sequence that a longrope table rotates with its short factors; infinite for tables that never switch."""
    longropes = [pattern for pattern in _patterns(rotary_emb) if pattern.get("rope_type") == "longrope"]
    return min((pattern["original_max_position_embeddings"] for pattern in longropes), default=math.inf)


def same_rotation(config: PreTrainedConfig) -> float:
    """Longest sequence in which a token rotates as in a shorter one: longrope and dynamic scaling turn beyond it.

    Args:
        config: A table was made of it.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    ends = [math.inf]
    for pattern in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        if pattern.get("rope_type") == "longrope":
            ends.append(pattern[ORIGINAL_LENGTH])
        elif "dynamic" in str(pattern.get("rope_type")):
            ends.append(config.max_position_embeddings)
    return min(ends)


Table = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of positions, each of shape `(B, T, R)`."""


def rotary_table(
    rotary_emb: nn.Module, hidden_states: torch.Tensor, position_ids: torch.Tensor, pattern: str | None = None
) -> Table:
    """Cosines and sines in which every document of a batch rotates as it does alone.

    Longrope and dynamic scaling choose their frequencies by the longest sequence. transformers takes that of the whole
    batch, so that a document beyond their switch would change all those that are packed beside it.

    Args:
        rotary_emb: The table of a family.
        hidden_states: Gives device and number format.
        position_ids: Those of documents side by side rise by one within each, shape `(B, T)`.
        pattern: Attention pattern, where the family has a table for each.
    """

    def table(positions: torch.Tensor) -> Table:
        return rotary_emb(hidden_states, positions, *([] if pattern is None else [pattern]))

    parameters = getattr(rotary_emb.config, "rope_parameters", None) or {}
    parameters = parameters.get(pattern, parameters) if pattern else parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "longrope":
        switch = parameters[ORIGINAL_LENGTH]
        is_long = (_document_lengths(position_ids) > switch)[..., None]
        short, long = table(position_ids.clamp(max=switch - 1)), table(position_ids)
        return torch.where(is_long, long[0], short[0]), torch.where(is_long, long[1], short[1])
    switch = getattr(rotary_emb, "original_max_seq_len", math.inf)
    if "dynamic" not in rope_type or position_ids.max() < switch - 1:
        return table(position_ids)
    lengths = _document_lengths(position_ids)
    table(position_ids.clamp(max=0))  # else it keeps the frequencies of the longest sequence it has met
    cosines, sines = table(position_ids.clamp(max=switch - 1))
    for length in lengths[lengths > switch].unique().tolist():  # from the shortest on, each longer than all it has met
        is_own = lengths == length
        own = table(position_ids.where(is_own, 0))
        cosines, sines = (
            torch.where(is_own[..., None], new, old) for new, old in zip(own, (cosines, sines), strict=True)
        )
    return cosines, sines


def _document_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Of each token the length of its document, shape `(B, T)`."""
    begins = torch.ones_like(position_ids)
    begins[:, 1:] = (position_ids.diff(dim=1) != 1).to(begins.dtype)
    numbers = begins.cumsum(1) - 1
    last = torch.zeros_like(position_ids).scatter_reduce(1, numbers, position_ids, "amax")
    return last.gather(1, numbers) + 1


def check_own_rope(own: Mapping[str, Any]) -> None:
    """Raise unless `embedding_rope_parameters` of `HoVLEConfig` are known and their values can work."""
    for name in own:
        if name not in NAMES:
            raise ValueError(f"embedding_rope_parameters hold {name!r:.40}, which is none of {', '.join(NAMES)}.")
    check_rope_values(own, "embedding_rope_parameters", ROPE_TYPES)


def check_rope_values(parameters: Any, where: str, types: Sequence[str] | None = None) -> None:
    """Raise unless the values of a decoder's rotary parameters can work.

    Args:
        parameters: `rope_parameters` of a config, or `rope_scaling` of an old one; those of each attention pattern by
            its name where a family has several tables. What has no name here is the family's own, and left alone.
        where: What an error calls them.
        types: What `rope_type` may be, where that is settled.

    Raises:
        ValueError: With the parameter's name, what it is and what it must be.
    """
    if not isinstance(parameters, Mapping):
        return
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            check_rope_values(value, f"{where}.{name}", types)
            continue
        fits, expected = CHECKS.get(name, (None, ""))
        if name == "rope_type" and types is not None:
            fits, expected = types.__contains__, f"one of {', '.join(types)}"
        if fits is not None and value is not None and not fits(value):
            raise ValueError(f"{where}.{name} must be {expected}, got {value!r:.40}. {ADVICE}")
    low, high = (parameters.get(name) for name in ("low_freq_factor", "high_freq_factor"))
    if low is not None and high is not None and not low < high:
        raise ValueError(f"{where}.high_freq_factor ({high}) must be greater than low_freq_factor ({low}). {ADVICE}")


def _is_share(value: Any) -> bool:
    return is_positive(value) and value <= 1


def _is_weight(value: Any) -> bool:
    return value == 0 or is_positive(value)


def _are_positive(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(map(is_positive, values))


CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(POSITIVE, (is_positive, "a positive number")),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), (_is_weight, "a number, 0 or more")),
    "partial_rotary_factor": (_is_share, "a number above 0, at most 1"),
    **dict.fromkeys(("short_factor", "long_factor"), (_are_positive, "a list of positive numbers")),
    "truncate": (lambda value: isinstance(value, bool), "true or false"),
}
"""Rotary parameter -> what its value must fulfil, and that in words."""
