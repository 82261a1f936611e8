"""Answers that come piece by piece."""

import torch
from transformers import TextStreamer


class AnswerPrinter(TextStreamer):
    """Prints an answer as it comes, and keeps its ids for the case that it is interrupted."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, which is not printed, then token after token; shape `(1, T)` or `(1,)`."""
        if not self.next_tokens_are_prompt:
            self.ids += value.flatten().tolist()
        super().put(value)
