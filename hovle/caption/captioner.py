"""One question about many pictures: threads decode them while the model answers, in batches of like length."""

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from typing import Any

import jinja2
import torch

from ..inference.answers import answer_lengths, ends_itself
from ..model.modeling_hovle import HoVLEForConditionalGeneration
from ..model.pictures import load_pixels, picture_size
from ..model.processing_hovle import HoVLEProcessor
from .sources import Item

WINDOW = 64
"""Batches whose pictures' sizes are looked at together, so that prompts of like length share a batch."""

AHEAD = 2
"""Batches that are decoded while the model answers another; so much memory their tiles take."""

UNUSABLE = (ValueError, OSError)
"""What is wrong with one picture and no reason to stop."""


@dataclass(frozen=True)
class Answer:
    """What the model said."""

    caption: str
    num_tokens: int
    is_cut: bool
    """Whether it ended at its longest and not by itself."""


class Captioner:
    """Asks a model one question about pictures.

    Args:
        model: In evaluation mode.
        processor: Of the model; its image processor's settings say how pictures are cut.
        prompt: The question.
        max_new_tokens: Longest answer in tokens.

    Raises:
        ValueError: When the chat template does not take the prompt, or leaves no room for an answer about any picture.
    """

    def __init__(
        self, model: HoVLEForConditionalGeneration, processor: HoVLEProcessor, prompt: str, max_new_tokens: int
    ):
        self.model, self.processor, self.prompt, self.max_new_tokens = model, processor, prompt, max_new_tokens
        self._prompts: dict[tuple[int, ...], list[int]] = {}
        try:
            self.prompt_ids([1])
        except jinja2.TemplateError as error:
            raise ValueError(f"The model's chat template refuses the prompt: {error}") from error

    def count_tiles(self, item: Item) -> int:
        """Tiles of an item by its pictures' headers; 0 where they cannot be read, which `read` will say."""
        try:
            sizes = [picture_size(source) for source in item.load()]
        except UNUSABLE:
            return 0
        return sum(self.processor.image_processor.get_number_of_image_patches(*size) for size in sizes)

    def read(self, item: Item) -> list[torch.Tensor]:
        """Tiles of each of an item's pictures, shape `(N, 3, s, s)`; may run in any thread.

        Raises:
            ValueError: For pictures that cannot be read.
        """
        return [
            self.processor.image_processor(load_pixels(source), return_tensors="pt")["pixel_values"]
            for source in item.load()
        ]

    def prompt_ids(self, num_tiles: Sequence[int]) -> list[int]:
        """The prompt that shows pictures of so many tiles each.

        Raises:
            ValueError: Where it leaves no room for the longest answer.
        """
        key = tuple(num_tiles)
        if key not in self._prompts:
            content = [*({"type": "image"} for _ in key), {"type": "text", "text": self.prompt}]
            chats = [[{"role": "user", "content": content}]]
            [self._prompts[key]] = self.processor.encode_chats(chats, key, add_generation_prompt=True)
        length, positions = len(self._prompts[key]), self.model.config.get_text_config().max_position_embeddings
        if length + self.max_new_tokens > positions:
            raise ValueError(
                f"its prompt takes {length:,} tokens and the answer up to {self.max_new_tokens:,}; the model has "
                f"{positions:,} positions. Give it fewer tiles (--max-tiles), or lower --max-new-tokens."
            )
        return self._prompts[key]

    @torch.inference_mode()
    def answer(self, prompts: Sequence[list[int]], tiles: Iterable[torch.Tensor]) -> list[Answer]:
        """Answer prompts of a batch together.

        Args:
            prompts: Their ids.
            tiles: Of all their pictures in order.
        """
        width, pad = max(map(len, prompts)), self.processor.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts])
        num_padded = torch.tensor([[width - len(ids)] for ids in prompts])
        pixel_values = torch.cat(list(tiles))
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(width) >= num_padded).long(),
            "pixel_values": pixel_values.to(self.model.dtype) if pixel_values.is_floating_point() else pixel_values,
        }
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1, "pad_token_id": pad}
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        generated = self.model.generate(**inputs, **options)[:, width:]
        lengths = answer_lengths(generated, self.model.generation_config).tolist()
        return [self._as_answer(row[:length].tolist()) for row, length in zip(generated, lengths, strict=True)]

    def _as_answer(self, ids: list[int]) -> Answer:
        is_cut = not ends_itself(ids, self.model.generation_config)
        return Answer(self.processor.decode(ids, skip_special_tokens=True).strip(), len(ids), is_cut)


def caption(items: Sequence[Item], captioner: Captioner, pool: Executor, batch_size: int) -> Iterator[list[dict]]:
    """Caption items, batch by batch, the longest prompts of a window first.

    Yields:
        A line for each item of a batch: `name` and `caption`, `num_tokens`, `is_cut`; or `name` and `error`.
    """
    for batch in _read_ahead(_batches(items, captioner, pool, batch_size), captioner, pool):
        lines: list[dict] = []
        shown, prompts = [], []
        for item, future in batch:
            try:
                tiles = future.result()
                prompts.append(captioner.prompt_ids([len(part) for part in tiles]))
                shown.append((item, tiles))
            except UNUSABLE as error:
                lines.append({"name": item.name, "error": str(error).removeprefix(f"{item.name}: ")})
        if shown:
            answers = captioner.answer(prompts, (part for _, tiles in shown for part in tiles))
            lines += [{"name": item.name, **asdict(answer)} for (item, _), answer in zip(shown, answers, strict=True)]
        yield lines


def _batches(items: Sequence[Item], captioner: Captioner, pool: Executor, batch_size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), WINDOW * batch_size):
        window = items[start : start + WINDOW * batch_size]
        num_tiles = list(pool.map(captioner.count_tiles, window))
        order = sorted(range(len(window)), key=num_tiles.__getitem__, reverse=True)
        for begin in range(0, len(order), batch_size):
            yield [window[place] for place in order[begin : begin + batch_size]]


def _read_ahead(
    batches: Iterable[Sequence[Item]], captioner: Captioner, pool: Executor
) -> Iterator[list[tuple[Item, Future[list[torch.Tensor]]]]]:
    """Batches whose pictures are being read, a few before they are wanted."""
    waiting: deque = deque()
    for batch in batches:
        waiting.append([(item, pool.submit(functools.partial(captioner.read, item))) for item in batch])
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting
