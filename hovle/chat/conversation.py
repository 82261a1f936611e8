"""A conversation with a model about pictures."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import TextStreamer

from ..files.model_folder import refuse_missing_folder, refuse_missing_processor
from ..model.modeling_hovle import HoVLEForConditionalGeneration
from ..model.pictures import load_picture
from ..model.processing_hovle import HoVLEProcessor


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
    """

    def __init__(
        self,
        model: str | os.PathLike,
        max_new_tokens: int = 256,
        max_tiles: int | None = None,
        max_image_tokens: int | None = None,
        label_images: bool = False,
        images: Sequence[Any] = (),
    ):
        self.restart()
        self.add_images(images)
        refuse_missing_folder(model)
        refuse_missing_processor(model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor = HoVLEProcessor.from_pretrained(model)
        self.model = HoVLEForConditionalGeneration.from_pretrained(model).to(device).eval()
        self.max_new_tokens = max_new_tokens
        limits = {"max_tiles": max_tiles, "max_image_tokens": max_image_tokens}
        self.image_kwargs = {name: limit for name, limit in limits.items() if limit is not None}
        self.label_images = label_images

    def restart(self) -> None:
        """Forget what was said and shown."""
        self.messages: list[dict] = []
        self.images: list[Image.Image] = []

    def add_images(self, sources: Sequence[Any]) -> None:
        """Load pictures now, so that a broken one is refused at once and none is loaded again in a later turn.

        They are shown with the next question.
        """
        self.images += [load_picture(source) for source in sources]

    def answer(self, question: str, stream: bool = False) -> str:
        """Ask a question after all that was said before; `stream` prints the answer as it comes."""
        content = [{"type": "image", "image": image} for image in self.images]
        messages = [*self.messages, {"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=self.image_kwargs,
            label_images=self.label_images,
        ).to(self.model.device, self.model.dtype)
        streamer = None
        if stream:
            streamer = TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        generated = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, streamer=streamer
        )
        reply = self.processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.images = []
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": reply}]}]
        return reply
