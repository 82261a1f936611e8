"""A conversation with a model about pictures."""

import copy
import math
import os
from collections.abc import Generator, Sequence
from typing import Any

import jinja2
import torch
from transformers import BatchFeature

from ..inference import PrefixCache
from ..inference.answers import ends_itself
from ..loading import load_processor
from ..model.pictures import load_picture
from .engines import load_in_engine, sampling
from .messages import message, refuse_hidden_system
from .saved import origin, write_messages
from .streaming import AnswerPrinter, stream_text


class Conversation:
    """A model, what was said so far, and pictures waiting for the next question.

    Args:
        model: Model folder or Hub id.
        max_new_tokens: Longest answer in tokens.
        max_tiles: Most tiles of a picture, or None for the model's own limit.
        max_image_tokens: Tokens all pictures shown so far may take together, or None for no limit.
        label_images: Number the pictures, so that questions can name them: Image-1, Image-2, ...
        images: Pictures for the first question, as `load_picture` reads them; before the model, which takes long to
            load.
        system: What the model is told before the conversation begins.
        temperature: 0 for the likeliest token each time, above it for a random choice by probability.
        engine: What runs the model: "torch"; "llama.cpp" for a folder that `hovle export --to gguf` wrote; "openvino"
            or "onnx" for one of that format.
        quantization: Which file llama.cpp reads, one of `hovle.export.gguf.QUANTIZATIONS`; None: f16.
        compiled: Whether torch runs the model compiled, as `hovle.optimize` makes it.

    Attributes:
        messages: What was said so far, without `system`.
        images: Items of pictures for the next question.
        answer_ids: Tokens of the last answer.
        stopped_by: What the last answer reached before the model said it was done; None where it said so.

    Raises:
        ValueError: For what is no model, a temperature that is none, and a `system` that the model is not shown.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        max_new_tokens: int = 256,
        max_tiles: int | None = None,
        max_image_tokens: int | None = None,
        label_images: bool = False,
        images: Sequence[Any] = (),
        system: str | None = None,
        temperature: float = 0.0,
        engine: str = "torch",
        quantization: str | None = None,
        compiled: bool = False,
    ):
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be 0 (no chance) or a finite number above it, got {temperature}.")
        self.restart()
        self.add_images(images)
        self.processor = load_processor(model)
        self.model = load_in_engine(model, engine, quantization, compiled)
        self.prefixes = PrefixCache(self.model) if engine == "torch" else None  # other engines keep their own
        self.max_new_tokens = max_new_tokens
        limits = {"max_tiles": max_tiles, "max_image_tokens": max_image_tokens}
        self.image_kwargs = {name: limit for name, limit in limits.items() if limit is not None}
        self.label_images = label_images
        self.system = [] if system is None else [message("system", system)]
        self.sampling = sampling(self.model, temperature)
        refuse_hidden_system(self.processor, system)

    def restart(self) -> None:
        """Forget what was said and shown."""
        self.messages: list[dict] = []
        self.images: list[dict] = []
        self.answer_ids: list[int] = []
        self.stopped_by: str | None = None

    def another(self, messages: Sequence[dict] = (), images: Sequence[dict] = ()) -> "Conversation":
        """A conversation of its own with the same model, which reads nothing again that it read in any of them.

        What was said in it so far and pictures for its next question are as in the attributes.
        """
        found = copy.copy(self)
        found.restart()
        found.messages, found.images = list(messages), list(images)
        return found

    def add_images(self, sources: Sequence[Any]) -> None:
        """Load pictures now, so that a broken one is refused at once and none is loaded again in a later turn.

        They are shown with the next question.
        """
        self.images += [{"type": "image", "image": load_picture(source), **origin(source)} for source in sources]

    def answer(self, question: str, stream: bool = False) -> str:
        """Ask a question after all that was said before; `stream` prints the answer as it comes.

        An interrupt (Ctrl+C) ends an answer that streams; as far as it came, it is part of the conversation.

        Raises:
            ValueError: When the model has no position left for an answer, or its template refuses the messages.
        """
        asked, inputs, num_new = self._prepare(question)
        streamer = AnswerPrinter(self.processor.tokenizer) if stream else None
        try:
            generated = self._generate(inputs, **self.sampling, max_new_tokens=num_new, streamer=streamer)
        except KeyboardInterrupt:
            if streamer is not None and streamer.ids:
                streamer.end()  # prints what waits for the end of a word
                self._keep(asked, streamer.ids)
            raise
        return self._finish(asked, inputs, generated, num_new)

    def stream(self, question: str) -> Generator[str, None, None]:
        """Ask as `answer` does, and yield the answer piece by piece as it comes.

        Who closes the iterator early ends the answer; as far as it came, it is part of the conversation.
        """
        asked, inputs, num_new = self._prepare(question)
        found: list[torch.Tensor] = []

        def generate(**options: Any) -> None:
            found.append(self._generate(inputs, **self.sampling, max_new_tokens=num_new, **options))

        try:
            yield from stream_text(generate, self.processor.tokenizer)
        finally:
            if found:
                self._finish(asked, inputs, found[0], num_new)

    def _prepare(self, question: str) -> tuple[dict, BatchFeature, int]:
        """The message that asks, what the model reads up to its end, and how many tokens the answer may take."""
        self.stopped_by = None
        asked = message("user", question, self.images)
        inputs = self.encode([*self.messages, asked])
        return asked, inputs, self._count_new(inputs["input_ids"].shape[1])

    def _finish(self, asked: dict, inputs: BatchFeature, generated: torch.Tensor, num_new: int) -> str:
        """Say what cut the answer, if anything did, and keep it."""
        ids = generated[0, inputs["input_ids"].shape[1] :].tolist()
        if len(ids) == num_new and not ends_itself(ids, self.model.generation_config):
            is_wanted = num_new == self.max_new_tokens
            self.stopped_by = f"{'max_new_tokens' if is_wanted else 'the end of its positions'} ({num_new:,} tokens)"
        return self._keep(asked, ids)

    def _generate(self, inputs: BatchFeature, **options: Any) -> torch.Tensor:
        if self.prefixes is None:
            return self.model.generate(**inputs, **options)
        return self.prefixes.generate(inputs, **options)

    def save(self, path: str | os.PathLike) -> None:
        """Write what was said as JSON, a list of messages that `apply_chat_template` reads.

        A picture stands there by its path or URL; one that was given otherwise stands there itself, in base64.

        Raises:
            ValueError: When nothing was said, or there is such a file.
        """
        if not self.messages:
            raise ValueError("Nothing was said yet; there is nothing to save.")
        write_messages([*self.system, *self.messages], path)

    def encode(self, messages: Sequence[dict]) -> BatchFeature:
        """What the model reads before it answers to messages; ValueError when its template refuses them."""
        try:
            return self.processor.apply_chat_template(
                [*self.system, *messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=self.image_kwargs,
                label_images=self.label_images,
            ).to(self.model.device, self.model.dtype)
        except jinja2.TemplateError as error:
            raise ValueError(f"The model's chat template refuses the messages: {error}") from error

    def _count_new(self, num_said: int) -> int:
        """Tokens the answer may take after a prompt of `num_said`: beyond its positions, a model writes nonsense."""
        positions = self.model.config.get_text_config().max_position_embeddings
        if num_said >= positions:
            raise ValueError(
                f"The conversation takes {num_said:,} tokens with this question; the model has {positions:,} "
                "positions for all that is said. Start over (/new), or show fewer or smaller pictures "
                "(--max-image-tokens, --max-tiles)."
            )
        return min(self.max_new_tokens, positions - num_said)

    def _keep(self, asked: dict, ids: list[int]) -> str:
        """Add a question and its answer to what was said; return the answer."""
        reply = self.processor.decode(ids, skip_special_tokens=True).strip()
        self.images, self.answer_ids = [], ids
        self.messages = [*self.messages, asked, message("assistant", reply)]
        return reply
