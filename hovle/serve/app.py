"""The web application of `hovle serve`: transformers' chat handler, and what keeps clients out of each other's way.

request -> `check_request` -> pictures are loaded -> template and tokenizer -> one thread that generates -> answer

All before generation happens in threads, so that a slow picture server holds up nobody else; the template and the
tokenizer, which one thread at a time may use, are guarded by a lock.
"""

import asyncio
import inspect
import threading
import uuid
from collections import deque
from collections.abc import Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import jinja2
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState

from ..model.pictures import load_picture
from .requests import check_request, check_template_kwargs, picture_urls

DEFAULT_NEW_TOKENS = 1024
"""Longest answer where neither the request nor the model's generation config says one; also transformers' number."""


def build_app(models: ModelManager, template_kwargs: dict) -> FastAPI:
    """Build the application for the model that `models` is pinned to.

    Args:
        models: Holds the model.
        template_kwargs: Arguments of `apply_chat_template` for requests that do not bring their own.
    """
    handler = ChatHandler(models, GenerationThread.only(), template_kwargs)

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        yield
        models.shutdown()

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

    app = FastAPI(lifespan=lifespan)
    app.add_exception_handler(ValueError, refuse)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: dict) -> Response:
        request_id = request.headers.get("x-request-id") or str(uuid.uuid4())
        response = await _while_connected(request, handler.handle_request(body, request_id))
        response.headers["x-request-id"] = request_id
        return response

    @app.get("/v1/models")
    async def list_models() -> dict:
        entry = {"id": models.force_model, "object": "model", "created": 0, "owned_by": "hovle"}
        return {"object": "list", "data": [entry]}

    @app.post("/load_model")
    async def load_model(body: dict) -> Response:
        """Say that the model is there; `transformers chat` asks before its first message."""
        if body.get("model") != models.force_model:
            raise ValueError(f"Server is pinned to '{models.force_model}'; requested '{body.get('model')}'.")
        events = models.load_model_streaming(models.process_model_name(models.force_model))
        return StreamingResponse(events, media_type="text/event-stream")

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    return app


async def _while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Await a response, but give it up when the client hangs up."""
    task = asyncio.ensure_future(work)
    hang_up = asyncio.ensure_future(request.receive())  # the body was read: no other message is left to come
    try:
        await asyncio.wait({task, hang_up}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else Response(status_code=499)
    finally:
        task.cancel()
        hang_up.cancel()


class ChatHandler(ChatCompletionHandler):
    """Answer `/v1/chat/completions` as transformers does, from requests that were checked and prepared in a thread."""

    def __init__(self, models: ModelManager, generation_state: GenerationState, template_kwargs: dict):
        super().__init__(models, generation_state, chat_template_kwargs=template_kwargs)
        self._template_lock = threading.Lock()

    async def handle_request(self, body: dict, request_id: str) -> Response:
        """Answer a request; a stream of events if it asks for one.

        Raises:
            ValueError: For a request that is not answered, with the reason.
        """
        self._validate_request(body)
        model_id, model, processor = self._resolve_model(body)
        request, inputs = await run_in_threadpool(self._prepare, body, model, processor)
        config = self._build_generation_config(request, model.generation_config)
        room = _room_for_answer(model, inputs["input_ids"].shape[-1])
        wanted = DEFAULT_NEW_TOKENS if config.max_new_tokens is None else config.max_new_tokens
        config.max_new_tokens = min(wanted, room)
        config.validate()
        respond = self._streaming if request.get("stream") else self._non_streaming
        tools = {"tools": request.get("tools")} if "tools" in inspect.signature(respond).parameters else {}
        manager = self.generation_state.get_manager(model_id)
        response = respond(request_id, model, processor, model_id, inputs, config, gen_manager=manager, **tools)
        return await response if inspect.isawaitable(response) else response

    def _prepare(self, body: dict, model, processor) -> tuple[dict, dict]:
        """Check a request, load its pictures and encode its prompt."""
        request = check_request(body)
        limits = {"max_tiles": processor.image_processor.max_patches}
        limits["min_tiles"] = limits["max_tiles"]
        if "max_image_tokens" in self.chat_template_kwargs:
            limits["max_image_tokens"] = self.chat_template_kwargs["max_image_tokens"]
        own = check_template_kwargs(request.get("chat_template_kwargs", {}), processor, limits)
        for number, item in enumerate(picture_urls(request["messages"]), start=1):
            url = item["image_url"]["url"]
            item["image_url"] = {"url": load_picture(url, f"picture {number} of the request", kind="url")}
        modality = self.model_manager.get_model_modality(model, processor=processor)
        messages = self.get_processor_inputs_from_messages(request["messages"], modality)
        try:
            with self._template_lock:
                inputs = processor.apply_chat_template(
                    messages,
                    add_generation_prompt=True,
                    tools=request.get("tools"),
                    return_tensors="pt",
                    return_dict=True,
                    tokenize=True,
                    **{**self.chat_template_kwargs, **own},
                )
        except jinja2.TemplateError as error:
            raise ValueError(f"The model's chat template refuses the messages: {error}") from error
        return request, inputs.to(model.device)


def _room_for_answer(model, prompt_length: int) -> int:
    """Count the tokens an answer may take."""
    positions = model.config.get_text_config().max_position_embeddings
    if prompt_length >= positions:
        raise ValueError(
            f"The prompt takes {prompt_length} tokens; this model has {positions} positions for prompt and answer. "
            "Send less text, or fewer or smaller pictures (chat_template_kwargs: max_tiles, max_image_tokens)."
        )
    return positions - prompt_length


class GenerationThread(GenerateManager):
    """Transformers' generating thread, which also ends answers at `stop` strings, and when nobody waits for them."""

    @classmethod
    def only(cls) -> GenerationState:
        """A state in which every model has such a thread."""
        state = GenerationState()
        managers: dict[str, GenerateManager] = {}
        state.get_manager = lambda model_id, use_cb=False: managers.setdefault(model_id, cls())
        return state

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        """Start generation; the queue that is returned gets the answer up to the first stop string."""
        end = AnswerEnd.take_from(gen_config, processor, inputs)
        queue, streamer = super().generate_streaming(
            model, processor, _ending(inputs, end), gen_config, request_id, response_parser
        )
        return (UntilStop(queue, end.stops) if end.stops else queue), streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        """Return the answer up to the first stop string, the length of the prompt, and all generated ids."""
        end = AnswerEnd.take_from(gen_config, processor, inputs)
        work = asyncio.ensure_future(
            super().generate_non_streaming(model, processor, _ending(inputs, end), gen_config, request_id)
        )
        try:
            text, prompt_length, ids = await asyncio.shield(work)
        except asyncio.CancelledError:
            end.nobody_waits.set()
            raise
        return before_stop(text, end.stops), prompt_length, ids


class AnswerEnd(StoppingCriteria):
    """Ends an answer that holds a stop string, or that nobody waits for.

    Transformers' own criterion walks through the whole vocabulary for each new set of strings.
    """

    def __init__(self, tokenizer, stops: Sequence[str], prompt_length: int):
        self.tokenizer = tokenizer
        self.stops = stops
        self.prompt_length = prompt_length
        self.nobody_waits = threading.Event()
        self.window = 8 + max((len(stop.encode()) for stop in stops), default=0)  # a token is a byte or more

    @classmethod
    def take_from(cls, gen_config, processor, inputs) -> "AnswerEnd":
        """Take over what a generation config says of stop strings; `generate` itself then has none to look for."""
        stops, gen_config.stop_strings = gen_config.stop_strings or [], None
        return cls(processor.tokenizer, stops, inputs["input_ids"].shape[-1])

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs) -> torch.Tensor:
        """Say of each row whether it is at its end."""
        is_done = self.nobody_waits.is_set()
        if self.stops and not is_done:
            recent = input_ids[0, self.prompt_length :][-self.window :]
            text = self.tokenizer.decode(recent, skip_special_tokens=True)
            is_done = any(stop in text for stop in self.stops)
        return torch.full((len(input_ids),), is_done, dtype=torch.bool, device=input_ids.device)


class UntilStop:
    """The pieces of a streamed answer up to the first stop string.

    The end of a piece that may be the start of a stop string waits for the next one. Reads like the queue it wraps.
    """

    def __init__(self, queue: asyncio.Queue, stops: Sequence[str]):
        self._queue, self._stops = queue, stops
        self._ready: deque = deque()
        self._held = ""
        self._is_stopped = False

    async def get(self) -> Any:
        """The next piece, or whatever else the queue holds: its end, an error, a tool call."""
        while not self._ready:
            self._take(await self._queue.get())
        return self._ready.popleft()

    def get_nowait(self) -> Any:
        """The same, where something is there; else `asyncio.QueueEmpty`."""
        while not self._ready:
            self._take(self._queue.get_nowait())
        return self._ready.popleft()

    def _take(self, item: Any) -> None:
        if type(item) is not str:
            self._ready += [self._held, item] if self._held else [item]
            self._held = ""
        elif not self._is_stopped:
            text = self._held + item
            answer = before_stop(text, self._stops)
            self._is_stopped = answer != text
            num_held = 0 if self._is_stopped else _num_held_back(text, self._stops)
            piece, self._held = answer[: len(answer) - num_held], answer[len(answer) - num_held :]
            self._ready += [piece] if piece else []


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def _num_held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of the text that is the start of a stop string."""
    return max((length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length])), default=0)


def _ending(inputs, end: AnswerEnd) -> dict:
    return {**inputs, "stopping_criteria": StoppingCriteriaList([end])}
