"""From a checked request to what the model reads, within bounds that hold for a request as a whole.

pictures are fetched -> their sizes are read -> the template is tried -> pictures are decoded -> template and tokenizer

Each kind of work has its own few threads, so that slow picture servers hold up nobody who sends text, and large
pictures are decoded one request after another.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
import jinja2
from anyio.to_thread import run_sync
from PIL import Image

from ..model.pictures import MayReach, load_picture, picture_bytes, picture_size
from ..model.processing_hovle import HoVLEProcessor
from .failures import RequestError
from .load import Share
from .requests import ChatRequest, Message, check_template_kwargs

MAX_PICTURES = 64
"""Pictures of one request."""

MAX_PICTURE_BYTES = 64 * 2**20
"""Bytes of all picture files of one request."""

MAX_PICTURE_PIXELS = 120_000_000
"""Pixels of all pictures of one request; decoded, they take three bytes each, and twice that for a moment."""

MAX_PICTURE_SECONDS = 20.0
"""Time in which all pictures of one request must have come."""

BYTES_PER_TOKEN = 128
"""Longest token that is reckoned with; text of more bytes per position is refused before it is cut into tokens."""

DETAIL_TILES = {"low": 1}
"""Tiles of pictures whose `detail` says how fine they are; "high" and "auto" are as fine as the model sees."""


@dataclass
class PromptBuilder:
    """Builds prompts for a model.

    Attributes:
        model: The model; its device and its number of positions count.
        processor: Its processor.
        template_kwargs: Arguments of `apply_chat_template` for requests that do not bring their own.
        may_reach: Says which addresses pictures may be fetched from.
    """

    model: Any
    processor: HoVLEProcessor
    template_kwargs: Mapping[str, Any]
    may_reach: MayReach
    _fetching: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(32))
    _encoding: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))

    @property
    def positions(self) -> int:
        """Tokens the model has room for, prompt and answer together."""
        return self.model.config.get_text_config().max_position_embeddings

    async def fetch(self, request: ChatRequest, share: Share) -> list[bytes]:
        """Return a request's picture files, got one after another.

        Args:
            request: The request.
            share: Takes what its pictures hold.

        Raises:
            RequestError: For pictures that cannot be had, and for too much of anything, text included.
        """
        self._refuse_long_text(request)
        return await self._fetch(request, share)

    async def encode(self, request: ChatRequest, files: list[bytes]) -> Mapping[str, Any]:
        """Return what `generate` reads.

        Args:
            request: The request.
            files: Its picture files.

        Raises:
            RequestError: For pictures that cannot be read, for too many pixels, and for messages the chat template
                does not show.
        """
        return await self._in_thread(self._encoding, self._encode, request, files)

    async def _in_thread(self, limiter: anyio.CapacityLimiter, work: Callable, *args) -> Any:
        # To its end even if the client hangs up: the bounds hold because no other work begins meanwhile.
        return await run_sync(_telling_the_client, work, *args, limiter=limiter)

    def _refuse_long_text(self, request: ChatRequest) -> None:
        num_bytes = sum(len(message.text.encode()) for message in request.messages)
        most = self.positions * BYTES_PER_TOKEN
        if num_bytes > most:
            raise RequestError(
                f"The messages hold {num_bytes} bytes of text; this model has {self.positions} positions, and no more "
                f"than {most} bytes are cut into tokens. Send less text.",
                param="messages",
                code="context_length_exceeded",
            )

    # --- pictures ----------------------------------------------------------------------------------------------------

    async def _fetch(self, request: ChatRequest, share: Share) -> list[bytes]:
        pictures = request.picture_urls
        if len(pictures) > MAX_PICTURES:
            raise RequestError(f"The request holds {len(pictures)} pictures; at most {MAX_PICTURES} are read.")
        deadline = time.monotonic() + MAX_PICTURE_SECONDS
        files: list[bytes] = []
        for number, picture in enumerate(pictures, start=1):
            name = f"picture {number} of the request"
            if time.monotonic() > deadline:
                raise RequestError(f"{name}: the pictures before it took longer than {MAX_PICTURE_SECONDS:g} seconds.")
            is_at_hand = picture.url[:32].lstrip()[:5].lower() == "data:"
            limiter = self._encoding if is_at_hand else self._fetching
            files.append(await self._in_thread(limiter, self._fetch_one, picture.url, name))
            share.take(len(files[-1]))
            if sum(map(len, files)) > MAX_PICTURE_BYTES:
                raise RequestError(f"{name}: with those before it, more than {MAX_PICTURE_BYTES >> 20} MiB of files.")
        return files

    def _fetch_one(self, url: str, name: str) -> bytes:
        return picture_bytes(url, name, self.may_reach)

    def _decode(self, files: list[bytes]) -> list[Image.Image]:
        """Decode pictures once it is known that all together are not too large."""
        num_pixels = 0
        for number, file in enumerate(files, start=1):
            height, width = _naming(number, picture_size, file)
            num_pixels += height * width
            if num_pixels > MAX_PICTURE_PIXELS:
                raise RequestError(
                    f"picture {number} of the request: with those before it {num_pixels / 1e6:.0f} megapixels; the "
                    f"limit of a request is {MAX_PICTURE_PIXELS / 1e6:.0f}. Send smaller pictures."
                )
        return [load_picture(file, f"picture {number} of the request") for number, file in enumerate(files, start=1)]

    # --- messages ----------------------------------------------------------------------------------------------------

    def _encode(self, request: ChatRequest, files: list[bytes]) -> Mapping[str, Any]:
        kwargs = self._kwargs_of(request)
        self._refuse_what_is_not_shown(request, kwargs)
        if any(picture.detail in DETAIL_TILES for picture in request.picture_urls):
            most = kwargs.get("max_tiles") or self.processor.image_processor.max_patches
            kwargs["tile_limits"] = [DETAIL_TILES.get(picture.detail, most) for picture in request.picture_urls]
        inputs = self.processor.apply_chat_template(
            _messages(request, self._decode(files)),
            add_generation_prompt=True,
            tools=request.shown_tools or None,
            return_tensors="pt",
            return_dict=True,
            tokenize=True,
            **kwargs,
        )
        return inputs.to(self.model.device)

    def _kwargs_of(self, request: ChatRequest) -> dict[str, Any]:
        """Arguments of the template: the server's, the request's own within them."""
        limits = {"max_tiles": self.processor.image_processor.max_patches}
        limits["min_tiles"] = limits["max_tiles"]
        if "max_image_tokens" in self.template_kwargs:
            limits["max_image_tokens"] = self.template_kwargs["max_image_tokens"]
        own = check_template_kwargs(request.chat_template_kwargs, self.processor, limits)
        return {**self.template_kwargs, **own}

    def _refuse_what_is_not_shown(self, request: ChatRequest, kwargs: Mapping[str, Any]) -> None:
        """Raise where the chat template leaves out a message, a call or the tools: the model would answer blind."""
        marks: dict[str, str] = {}

        def mark(param: str, what: str) -> str:
            marks[f"Zq{len(marks)}qZ"] = f"{param}: the model's chat template does not show {what}"
            return next(reversed(marks))

        messages = []
        for place, message in enumerate(request.messages):
            shown = _message(message)
            where = f"messages[{place}]"
            if message.text or message.pictures:
                shown["content"] = mark(f"{where}.content", f"this content of role {message.role}")
            if message.name and message.role != "tool":
                shown["name"] = mark(f"{where}.name", "names")
            for number, call in enumerate(shown.get("tool_calls", [])):
                call["function"] = {
                    **call["function"],
                    "name": mark(f"{where}.tool_calls[{number}]", "calls of tools"),
                }
            messages.append(shown)
        tools = request.shown_tools
        for number, tool in enumerate(tools):
            tool["function"]["name"] = mark(f"tools[{number}]", "tools; leave them out")
        words = {name: value for name, value in kwargs.items() if name not in ("label_images", "max_image_tokens")}
        prompt = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tools=tools or None, tokenize=False, **words
        )
        for word, fault in marks.items():
            if word not in prompt:
                raise RequestError(f"{fault}.", param=fault.partition(":")[0])


def _naming(number: int, work: Callable, file: bytes) -> Any:
    """Do something with a picture file; an error tells the picture's number."""
    try:
        return work(file)
    except ValueError as error:
        raise ValueError(str(error).replace("the picture", f"picture {number} of the request", 1)) from error


def _telling_the_client(work: Callable, *args) -> Any:
    """Do work whose `ValueError`s are about what the client sent."""
    try:
        return work(*args)
    except RequestError:
        raise
    except jinja2.TemplateError as error:
        raise RequestError(f"The model's chat template refuses the messages: {error}", param="messages") from error
    except RecursionError as error:
        raise RequestError("The request is nested too deeply.") from error
    except ValueError as error:
        raise RequestError(str(error)) from error


def _messages(request: ChatRequest, pictures: list[Image.Image]) -> list[dict]:
    """Messages as the processor reads them, with their pictures."""
    rest = iter(pictures)
    return [_message(message, rest) for message in request.messages]


def _message(message: Message, pictures: Any = None) -> dict:
    """A message as the processor reads it; without `pictures`, its pictures are left empty."""
    read: dict[str, Any] = {"role": message.role, "content": []}
    for item in message.content or []:
        picture = (
            {"type": "image"} if pictures is None else {"type": "image", "image": item.image_url and next(pictures)}
        )
        read["content"].append(picture if item.image_url else {"type": "text", "text": item.text})
    calls = [call.model_dump(exclude={"index"}, exclude_none=True) for call in message.tool_calls]
    extras = {"name": message.name, "tool_call_id": message.tool_call_id, "tool_calls": calls}
    return {**read, **{name: value for name, value in extras.items() if value}}
