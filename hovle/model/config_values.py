"""Values of a decoder's config that can work, by the names transformers gives its fields.

Types are checked by transformers; a value of the right type can still divide by zero, build a million layers or give
NaN for every logit. A config.json comes from anyone, so what cannot work is refused before anything is built.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.activations import ACT2FN

MOST_LAYERS = 1024
"""Ten times the deepest published language models; so many layers are described in seconds."""

MOST_SIZE = 2**24
"""Of a width, a vocabulary, a count: sixteen million. The product of two still fits into a tensor's count."""

MOST_POSITIONS = 2**31

ESSENTIAL = {
    "num_hidden_layers": MOST_LAYERS,
    "vocab_size": MOST_SIZE,
    "hidden_size": MOST_SIZE,
    "intermediate_size": MOST_SIZE,
    "num_attention_heads": MOST_SIZE,
    "num_key_value_heads": MOST_SIZE,
    "head_dim": MOST_SIZE,
    "max_position_embeddings": MOST_POSITIONS,
    "sliding_window": MOST_POSITIONS,
}
"""Whole numbers that must be at least 1 where they are said at all -> the most that makes sense."""

ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")

DIVISORS = (
    "logits_scaling",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "rope_theta",
)
"""Numbers that something is divided by, or that are raised to a negative power."""

COUNT = re.compile(r"(num|n)_.*|.*_size|.*_per_tok")
EPSILON = re.compile(r"(.*_)?(eps|epsilon)")
SHARE = re.compile(r".*dropout|.*_pdrop|initializer_range")

ADVICE = "Set what the model was made with, or take its files from where they came from anew."


def check_decoder_values(config: Any, where: str = "") -> None:
    """Raise unless the values of a decoder's config can work; those of another type than a number's are left alone.

    Args:
        config: Fields by name, as config.json has them, or a config.
        where: What an error puts before a field's name, such as `text_config.`.

    Raises:
        ValueError: With the field's name, what it is, what it must be and what to do.
    """
    fields = config
    if not isinstance(config, Mapping):  # names that a family has others for lead to the same values
        fields = vars(config) | {name: getattr(config, name) for name in ESSENTIAL if hasattr(config, name)}
    for name, value in fields.items():
        if name in ACTIVATIONS:
            _check_activation(where + name, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(where, name, value)
    heads, groups = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if type(heads) is int and type(groups) is int and heads % groups:
        raise ValueError(
            f"{where}num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({groups}). {ADVICE}"
        )
    pad, vocab_size = fields.get("pad_token_id"), fields.get("vocab_size")
    if type(pad) is int and type(vocab_size) is int and not -vocab_size <= pad < vocab_size:
        raise ValueError(f"{where}pad_token_id ({pad}) must lie below vocab_size ({vocab_size}). {ADVICE}")


def check_whole_number(name: str, value: int, lowest: int, highest: int) -> None:
    """Raise unless a number lies between two, both included."""
    if not lowest <= value <= highest:
        raise ValueError(f"{name} must lie between {lowest} and {highest}, got {value!r:.40}. {ADVICE}")


def check_statistics(image_mean: Sequence[float], image_std: Sequence[float]) -> None:
    """Raise unless there are a finite mean and a positive deviation for each channel, the same number of both."""
    fits = all(is_positive(number) for number in image_std) and all(map(math.isfinite, image_mean))
    if not fits or len(image_mean) != len(image_std):
        raise ValueError(
            "image_mean and image_std must hold a finite number and a positive one for each channel, got "
            f"{image_mean!r:.80} and {image_std!r:.80}. {ADVICE}"
        )


def is_positive(value: Any) -> bool:
    """Whether a value is a number above zero, and finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _check_number(where: str, name: str, value: float) -> None:
    if name in ESSENTIAL:
        check_whole_number(where + name, value, 1, ESSENTIAL[name])  # type: ignore[arg-type]
        return
    if EPSILON.fullmatch(name):
        fits, expected = 0 < value < 1, "be a number between 0 and 1, neither included"
    elif SHARE.fullmatch(name):
        fits, expected = 0 <= value <= 1, "lie between 0 and 1"
    elif name in DIVISORS:
        fits, expected = is_positive(value), "be a positive number"
    elif COUNT.fullmatch(name) and isinstance(value, int):
        fits, expected = 0 <= value <= MOST_SIZE, f"lie between 0 and {MOST_SIZE}"
    else:
        fits, expected = isinstance(value, int) or math.isfinite(value), "be a finite number"
    if not fits:
        raise ValueError(f"{where}{name} must {expected}, got {value!r:.40}. {ADVICE}")


def _check_activation(name: str, value: Any) -> None:
    if not isinstance(value, str) or value in ACT2FN:
        return
    near = difflib.get_close_matches(value, ACT2FN, n=3, cutoff=0.5) or ["silu", "gelu"]
    raise ValueError(
        f"{name} must be an activation that transformers has, such as {', '.join(near)}; got {value!r:.40}. {ADVICE}"
    )
