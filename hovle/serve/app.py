"""The web application of `hovle serve`: OpenAI's chat API for one model.

body -> `read_request` -> `PromptBuilder` -> `Settings.of` -> `Engine.start` -> `answers`

All that can be wrong with a request is found before its answer begins, streams included.
"""

import asyncio
import dataclasses
import hmac
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import torch
from anyio.to_thread import run_sync
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from ..model.pictures import Address, is_public
from .answers import EventStream, Reply, parser_of
from .engine import engine_of
from .failures import RequestError, error_response
from .generation import Answer, Settings
from .limits import MAX_REQUESTS, BatchLimits
from .load import Load, Share
from .metrics import Metrics
from .prompts import PromptBuilder
from .requests import ChatRequest, read_request

log = logging.getLogger("uvicorn.error")

MAX_BODY_BYTES = 96 * 2**20
"""Largest request: pictures of 64 MiB in base64, and text."""

MAX_SECONDS_FOR_BODY = 60.0
"""Time in which a request must have come."""

READY_PROMPTS = 4
"""Prompts made ready before the model has room for them: tiles take far more memory than files."""


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """What is up to whoever starts the server.

    Attributes:
        model: Folder or Hub id of the model.
        served_name: What the model is called instead.
        template_kwargs: Arguments of `apply_chat_template` for requests that do not bring their own.
        picture_hosts: Hosts pictures are fetched from although their addresses are not public.
        origins: Origins whose web pages may use the server; "*" for all.
        limits: What all answers in work may hold.
        max_requests: Requests in work or waiting; those beyond are told to come again.
        api_key: What clients must bring; None for all who reach the server.
    """

    model: str
    served_name: str | None = None
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    picture_hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    limits: BatchLimits = dataclasses.field(default_factory=BatchLimits)
    max_requests: int = MAX_REQUESTS
    api_key: str | None = dataclasses.field(default=None, repr=False)

    @property
    def name(self) -> str:
        """What the model is called in lists and answers."""
        return self.served_name or self.model

    def is_name(self, name: str) -> bool:
        """Whether a client that says this name means the model."""
        if name in (self.name, self.model):
            return True
        folder = os.path.abspath(self.model)
        return name == os.path.basename(folder) or os.path.abspath(name) == folder

    def check_key(self, request: Request) -> None:
        """Raise for a request without the key."""
        if self.api_key is None:
            return
        given = request.headers.get("authorization")
        expected = f"Bearer {self.api_key}".encode()
        if given is None or not hmac.compare_digest(given.encode("latin-1"), expected):
            found = "none" if given is None else "another one"
            raise RequestError(
                f"The server asks for its API key, as 'Authorization: Bearer KEY'; found {found}.",
                code="invalid_api_key",
                status=401,
            )

    def may_reach(self, host: str, address: Address) -> bool:
        """Whether a picture may be fetched from there."""
        return is_public(address) or host.lower() in {allowed.lower() for allowed in self.picture_hosts}


def build_app(model, processor, options: ServerOptions) -> FastAPI:
    """Build the application for a model, in torch or another engine that has `generate`."""
    service = ChatService(model, processor, options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    async def tell(_: Request, error: Exception) -> JSONResponse:
        return error_response(error, getattr(error, "headers", None))

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for kind in (RequestError, HTTPException, Exception):
        app.add_exception_handler(kind, tell)
    if options.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=options.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )

    with_key = [Depends(options.check_key)]

    @app.post("/v1/chat/completions", dependencies=with_key)
    async def chat_completions(request: Request) -> Response:
        request_id = request.headers.get("x-request-id") or str(uuid.uuid4())
        try:
            response = await service.answer(request)
        except (RequestError, HTTPException) as error:
            response = error_response(error)
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception as error:
            log.exception("A request ended in an error.")
            response = error_response(error)
        if not isinstance(response, EventStream):  # which counts itself when it is over
            service.metrics.requests.labels(response.status_code).inc()
        response.headers["x-request-id"] = request_id
        return response

    @app.get("/v1/models", dependencies=with_key)
    async def list_models() -> dict:
        return {"object": "list", "data": [service.entry]}

    @app.get("/v1/models/{name:path}", dependencies=with_key)
    async def show_model(name: str) -> dict:
        service.refuse_other_model(name, 404)
        return service.entry

    @app.post("/load_model", dependencies=with_key)
    async def load_model(request: Request) -> Response:
        """Say that the model is there; `transformers chat` asks before its first message."""
        name = _model_name(await service.read(request))
        service.refuse_other_model(name)
        event = json.dumps({"status": "ready", "model": name, "cached": True})
        return Response(f"data: {event}\n\n", media_type="text/event-stream")

    @app.get("/metrics", dependencies=with_key)
    async def tell_metrics() -> Response:
        text, media_type = service.metrics.text()
        return Response(text, headers={"Content-Type": media_type})

    @app.get("/health")
    async def health() -> Response:
        is_well = service.is_alive
        return JSONResponse({"status": "ok" if is_well else "the model has stopped"}, 200 if is_well else 503)

    return app


class ChatService:
    """Answers requests with one model.

    Args:
        model: The model.
        processor: Its processor.
        options: What is up to whoever starts the server.
    """

    def __init__(self, model, processor, options: ServerOptions):
        self._model, self._processor, self._options = model, processor, options
        self._prompts = PromptBuilder(model, processor, options.template_kwargs, options.may_reach)
        self.metrics = Metrics()
        self._engine = engine_of(model, processor.tokenizer, self.metrics, options.limits)
        self._parser = parser_of(processor.tokenizer, model)
        self._load = Load(options.max_requests)
        self.metrics.watch("hovle_requests_in_work", "Requests in work or waiting", lambda: self._load.num_requests)
        self._reading = anyio.CapacityLimiter(2)
        self._ready = asyncio.Semaphore(READY_PROMPTS)
        self.entry = {"id": options.name, "object": "model", "created": 0, "owned_by": "hovle"}

    @property
    def is_alive(self) -> bool:
        """Whether the model answers."""
        return self._engine.is_alive

    def close(self) -> None:
        """End all answers."""
        self._engine.close()

    def refuse_other_model(self, name: str | None, status: int = 400) -> None:
        """Raise for the name of another model."""
        if name is not None and not self._options.is_name(name):
            raise RequestError(
                f"model: the server is pinned to '{self._options.name}'; requested '{name:.200}'.",
                param="model",
                code="model_not_found",
                status=status,
            )

    async def read(self, http_request: Request) -> bytes:
        """The body of a request that is answered at once."""
        share = Share(self._load)
        try:
            return await _read_body(http_request, share)
        finally:
            share.give_back()

    async def answer(self, http_request: Request) -> Response:
        """Answer a request; a stream of events if it asks for one.

        Raises:
            RequestError: For a request that is not answered.
        """
        began, share = time.monotonic(), Share(self._load)

        def when_over() -> None:
            share.give_back()
            self.metrics.request_seconds.observe(time.monotonic() - began)

        try:
            body = await _read_body(http_request, share)
            work = self._respond(body, share, when_over)
            del body
            response = await _while_connected(http_request, work)
        except BaseException:
            when_over()
            raise
        if not isinstance(response, EventStream):
            when_over()
        return response

    async def _respond(self, body: bytes, share: Share, when_over: Callable[[], None]) -> Response:
        request = await run_sync(read_request, body, limiter=self._reading)
        del body
        self.refuse_other_model(request.model)
        self._refuse_unreadable_calls(request)
        files = await self._prompts.fetch(request, share)
        answer = await self._begin(request, files)
        del files
        reply = Reply(self._options.name, request, len(answer.prompt_ids), self._parser)
        if request.stream:

            def when_sent() -> None:
                answer.abandon()
                when_over()
                self.metrics.requests.labels(200).inc()

            return EventStream(reply.events(answer), when_sent)
        try:
            return JSONResponse(await reply.whole(answer))
        finally:
            answer.abandon()

    async def _begin(self, request: ChatRequest, files: list[bytes]) -> Answer:
        """Make a prompt ready and wait until the model takes it up."""
        async with self._ready:
            inputs = await self._prompts.encode(request, files)
            room = self._room(inputs["input_ids"])
            vocab_size = self._model.config.get_text_config().vocab_size
            settings = Settings.of(request, self._model.generation_config, room, vocab_size)
            answer = self._engine.start(inputs, settings)
            del inputs
            try:
                await answer.begun.wait()
            except BaseException:
                answer.abandon()
                raise
        return answer

    def _refuse_unreadable_calls(self, request: ChatRequest) -> None:
        if request.shown_tools and self._parser is None:
            raise RequestError(
                "tools: calls of tools cannot be told from text in this model's answers, as its tokenizer has no "
                'response_template; leave tools out, or set tool_choice to "none".',
                param="tools",
            )

    def _room(self, input_ids: torch.Tensor) -> int:
        """Count the tokens an answer may take after a prompt of shape `(1, T)`."""
        num_tokens, positions = input_ids.shape[-1], self._prompts.positions
        if num_tokens >= positions:
            raise RequestError(
                f"The prompt takes {num_tokens} tokens; this model has {positions} positions for prompt and answer. "
                "Send less text, or fewer or smaller pictures (chat_template_kwargs: max_tiles, max_image_tokens).",
                param="messages",
                code="context_length_exceeded",
            )
        return int(min(positions - num_tokens, self._engine.most_new_tokens(input_ids)))


async def _read_body(request: Request, share: Share) -> bytes:
    """Read a request's body within bounds of size and time."""
    too_large = RequestError(
        f"The request is larger than the limit of {MAX_BODY_BYTES >> 20} MiB.", None, "request_too_large", 413
    )
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(MAX_SECONDS_FOR_BODY):
            async for chunk in request.stream():
                share.take(len(chunk))
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise RequestError(
            f"The request did not come within {MAX_SECONDS_FOR_BODY:g} seconds.", None, "timeout", 408
        ) from None
    return bytes(body)


def _model_name(body: bytes) -> str | None:
    """The model that a body names."""
    try:
        name = json.loads(body)["model"]
    except (ValueError, KeyError, TypeError, RecursionError):
        name = None
    if not isinstance(name, str):
        raise RequestError("model: missing; expected a string.", param="model")
    return name


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
