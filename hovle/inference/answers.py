"""What `generate` gives for a batch, row by row."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig


def answer_lengths(generated: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """Count the tokens of each answer, shape `(B, T)`, up to its first end token, which counts; padding follows it.

    An answer that does not end has all T.
    """
    ends = config.eos_token_id
    ends = torch.as_tensor([] if ends is None else ends, device=generated.device, dtype=generated.dtype).flatten()
    is_end = torch.isin(generated, ends)
    return torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 1, generated.shape[1])


def ends_itself(ids: Sequence[int], config: GenerationConfig) -> bool:
    """Whether the last token of an answer is one that ends it; else it was cut."""
    ends = config.eos_token_id
    return bool(ids) and ids[-1] in (ends if isinstance(ends, list) else [ends])
