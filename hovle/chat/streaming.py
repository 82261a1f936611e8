"""Answers that come piece by piece."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria, TextIteratorStreamer, TextStreamer

from ..model.processing_hovle import HoVLEProcessor


def stream_answer(model: PreTrainedModel, processor: HoVLEProcessor, **kwargs: Any) -> Iterator[str]:
    """Generate an answer in a thread and yield its text as it comes.

    Args:
        model: Generates.
        processor: The model's own; its tokenizer makes text of ids.
        **kwargs: What the processor made of one prompt, and arguments of `generate`.

    Raises:
        Exception: Whatever `generate` raises, once the text before it was yielded; where transformers'
            `TextIteratorStreamer` is read by itself, its reader then waits for ever.

    Who leaves the loop early, or closes the iterator, ends generation with the next token.
    """
    own = list(kwargs.pop("stopping_criteria", None) or [])

    def generate(stopping_criteria: list[StoppingCriteria], **more: Any) -> None:
        model.generate(**kwargs, **more, stopping_criteria=[*own, *stopping_criteria])

    return stream_text(generate, processor.tokenizer)


def stream_text(generate: Callable[..., Any], tokenizer: Any) -> Iterator[str]:
    """Call something that generates in a thread, and yield its text as it comes; errors and early ends as above.

    Args:
        generate: Takes `streamer` and `stopping_criteria`. It has returned, or raised, once the iterator has ended.
        tokenizer: Makes text of ids.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    nobody_reads = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            generate(streamer=streamer, stopping_criteria=[_WhenSet(nobody_reads)])
        except BaseException as error:  # the reader's thread raises it
            errors.append(error)
        finally:
            streamer.text_queue.put(streamer.stop_signal)

    thread = threading.Thread(target=work, name="hovle-answer", daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        nobody_reads.set()
        thread.join()
    if errors:
        raise errors[0]


class _WhenSet(StoppingCriteria):
    """Ends generation once an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


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
