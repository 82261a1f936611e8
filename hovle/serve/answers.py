"""What a client gets back: whole answers, and streams of their pieces that end with `[DONE]`."""

import json
import logging
import time
import types
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from transformers.cli.serving import utils as serving

from .failures import error_event
from .generation import Answer, before_stop
from .requests import ChatRequest

log = logging.getLogger("uvicorn.error")

DONE = "data: [DONE]\n\n"

Parser = Callable[[Answer], tuple[str, list[dict]]]
"""Takes an answer apart: its text, and the calls of tools in OpenAI's form."""


def parser_of(tokenizer, model) -> Parser | None:
    """How calls of tools are read from the answers of this model; None where that is not known.

    A tokenizer may say so in its `response_template`; transformers knows the language models of some families.
    """
    find = getattr(serving, "get_response_template", None)  # older versions have another kind of template
    language_model = types.SimpleNamespace(config=model.config.get_text_config())
    template = find(tokenizer, language_model) if find else None
    if template is None:
        return None

    def parse(answer: Answer) -> tuple[str, list[dict]]:
        text = tokenizer.decode(answer.ids, skip_special_tokens=True)
        calls = []
        try:
            parsed = tokenizer.parse_response(answer.ids, template, prefix=tokenizer.decode(answer.prompt_ids))
            calls = [_call(call["function"]) for call in parsed.get("tool_calls") or []]
            text = parsed.get("content") or ""
        except (ValueError, KeyError, TypeError) as error:  # the model wrote something else: told as it stands
            log.warning("An answer could not be taken apart: %s", error)
        return before_stop(text, answer.settings.stops), calls

    return parse


def _call(function: dict) -> dict:
    arguments = function["arguments"]
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


class EventStream(StreamingResponse):
    """A stream of events; `when_over` is called however it ends, also where it never begins."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], when_over: Callable[[], None]):
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self._when_over = when_over

    async def __call__(self, *args) -> None:
        """Send the events."""
        try:
            await super().__call__(*args)
        finally:
            self._when_over()


class Reply:
    """Tells one answer in OpenAI's form.

    Args:
        model: What the model is called.
        request: The request.
        num_prompt_tokens: Length of the prompt.
        parser: Reads calls of tools from answers.
    """

    def __init__(self, model: str, request: ChatRequest, num_prompt_tokens: int, parser: Parser | None):
        self._request, self._num_prompt_tokens = request, num_prompt_tokens
        self._parser = parser if request.shown_tools else None
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def whole(self, answer: Answer) -> dict:
        """The answer once it is complete."""
        text = "".join([piece async for piece in answer])
        text, calls = self._parser(answer) if self._parser else (text, [])
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(answer, calls)}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self._usage(answer)}

    async def events(self, answer: Answer) -> AsyncIterator[str]:
        """The answer as it grows; with tools, when it is complete, as only then calls can be told from text."""
        try:
            yield self._event({"role": "assistant", "content": ""})
            calls: list[dict] = []
            if self._parser:
                async for _ in answer:
                    pass
                text, calls = self._parser(answer)
                if text:
                    yield self._event({"content": text})
                for index, call in enumerate(calls):
                    yield self._event({"tool_calls": [{"index": index, **call}]})
            else:
                async for piece in answer:
                    yield self._event({"content": piece})
            yield self._event({}, _finish_reason(answer, calls))
            if self._request.stream_options and self._request.stream_options.include_usage:
                yield self._chunk([], usage=self._usage(answer))
        except Exception as error:
            yield error_event(error)
        yield DONE

    def _event(self, delta: dict, finish_reason: str | None = None) -> str:
        return self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])

    def _chunk(self, choices: list[dict], **fields) -> str:
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices, **fields}
        return f"data: {json.dumps(chunk)}\n\n"

    def _usage(self, answer: Answer) -> dict[str, int]:
        prompt, completion = self._num_prompt_tokens, len(answer.ids)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _finish_reason(answer: Answer, calls: list[dict]) -> str:
    if calls:
        return "tool_calls"
    return "length" if answer.is_cut else "stop"
