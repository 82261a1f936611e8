"""What the bare language model answers by itself to fifty questions, and what another model says to some of them.

The questions are our own (`chat_prompts.json`, Apache-2.0). Answers are greedy; how likely a trained model finds those
of the bare one says how much of its chat it kept, also where its own answer begins with another word.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ...language.likelihood import Row
from ...language.replay import listed, until_end
from ...model.processing_hovle import HoVLEProcessor

DATA = Path(__file__).with_name("chat_prompts.json")

MAX_NEW_TOKENS = 64
"""Longest answer."""

NUM_SHOWN = 12
"""Questions, the first ones, whose answers of every model are kept side by side."""


def load_prompts() -> list[str]:
    """The fifty questions."""
    return json.loads(DATA.read_text(encoding="utf-8"))["prompts"]


def encode_prompts(processor: HoVLEProcessor, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of each question as the chat template shows it, up to where the answer begins."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return processor.encode_chats(chats, [], add_generation_prompt=True)


@torch.inference_mode()
def greedy_answers(
    model: nn.Module, prompts: Sequence[list[int]], unwanted: Sequence[int] = (), max_new_tokens: int = MAX_NEW_TOKENS
) -> list[list[int]]:
    """Ids a model answers each prompt with, the likeliest one each time, through the token that ends the answer.

    Args:
        model: A causal language model in evaluation mode; its generation config says what ends an answer.
        prompts: Ids of each; all are answered at once.
        unwanted: Ids that are no words, such as those of pictures.
        max_new_tokens: Longest answer.
    """
    ends = [end for end in listed(model.generation_config.eos_token_id) if end is not None]  # type: ignore[union-attr]
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
    shown = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    generated = model.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=shown,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        suppress_tokens=list(unwanted) or None,
        pad_token_id=ends[0] if ends else 0,
    )
    return [ids[: len(until_end(ids, ends)) + 1] for ids in generated[:, longest:].tolist()]


def answer_rows(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[Row]:
    """Rows in which the answers are scored."""
    return [Row(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]
