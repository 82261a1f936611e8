"""Rotary parameters of the holistic layers: the language model's, but for what `embedding_rope_parameters` says."""

import copy
import math
from typing import Any

from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

ROPE_TYPES = sorted({"default", *ROPE_INIT_FUNCTIONS})
NAMES = sorted({"max_position_embeddings", *RopeParameters.__annotations__})
ORIGINAL_LENGTH = "original_max_position_embeddings"
FREQUENCY_FACTORS = ("short_factor", "long_factor")
"""Parameters that hold one number for each frequency."""


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
    for name, value in own.items():
        _check(name, value)
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


def rope_switch(rotary_emb: nn.Module) -> float:
    """Longest sequence that a longrope table rotates with its short factors; infinite for tables that never switch."""
    parameters = getattr(rotary_emb.config, "rope_parameters", None) or {}
    patterns = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    longropes = [pattern for pattern in patterns if pattern.get("rope_type") == "longrope"]
    return min((pattern["original_max_position_embeddings"] for pattern in longropes), default=math.inf)


def _check(name: str, value: Any) -> None:
    """Raise unless a parameter is known and its value can be one."""
    if name not in NAMES:
        raise ValueError(f"embedding_rope_parameters hold {name!r}, which is none of {', '.join(NAMES)}.")
    if name == "rope_type":
        fits, expected = value in ROPE_TYPES, f"one of {', '.join(ROPE_TYPES)}"
    elif name == "truncate":
        fits, expected = isinstance(value, bool), "true or false"
    elif name in FREQUENCY_FACTORS:
        fits, expected = isinstance(value, list) and all(map(_is_positive, value)), "a list of positive numbers"
    else:
        fits, expected = _is_positive(value), "a positive number"
    if not fits:
        raise ValueError(f"embedding_rope_parameters: {name} must be {expected}, got {value!r}.")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
