"""What `hovle serve` takes from a client: requests of OpenAI's chat API, looked through before anything reads them.

A client is a stranger. What it may name is listed here; the rest is refused with a `ValueError` that says what was
found and what is expected, which the server answers with status 400.
"""

import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

from ..model.processing_hovle import HoVLEProcessor, refuse_renamed

FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "messages": (list,),
    "tools": (list,),
    "stream": (bool,),
    "stop": (str, list),
    "max_tokens": (int,),
    "max_completion_tokens": (int,),
    "seed": (int,),
    "temperature": (int, float),
    "top_p": (int, float),
    "frequency_penalty": (int, float),
    "logit_bias": (dict,),
    "generation_config": (str,),
    "chat_template_kwargs": (dict,),
}
ONLY: dict[str, Any] = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
}
"""Fields of a request that would change the answer but are not done: the one value that asks for nothing."""

ONLY_GENERATION: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
"""The same for the JSON in `generation_config`."""

MAX_STOPS, MAX_STOP_LENGTH = 16, 200

RESERVED = {"messages", "tojson", "raise_exception", "strftime_now"}
"""Names a chat template gets from its renderer."""

PLAIN_WORDS = re.compile(r"[\w .,:/-]*")


def check_request(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request without its empty fields, its messages likewise.

    Raises:
        ValueError: For a field, message or item that is not of OpenAI's form, or asks for what is not done here.
    """
    request = _without_none(body)
    for name, types in FIELD_TYPES.items():
        if name in request:
            _expect(request[name], types, name)
    _refuse_unsupported(request, ONLY, "")
    _refuse_broken_characters(request)
    if not request.get("messages"):
        raise ValueError("messages is missing or empty: give at least one message.")
    request["messages"] = [_message(message, f"messages[{place}]") for place, message in enumerate(body["messages"])]
    for place, tool in enumerate(request.get("tools", [])):
        _expect(tool, (dict,), f"tools[{place}]")
    if "generation_config" in request:
        _check_generation_config(request["generation_config"])
    if "max_completion_tokens" in request:  # transformers 5.16 reads the older name only
        request["max_tokens"] = request.pop("max_completion_tokens")
    if "stop" in request:
        request["stop"] = _stops(request["stop"])
    return request


def check_template_kwargs(
    kwargs: Mapping[str, Any], processor: HoVLEProcessor, limits: Mapping[str, int]
) -> dict[str, Any]:
    """Return a request's `chat_template_kwargs`, of which each name is known and each size bounded.

    Args:
        kwargs: What the client wrote.
        processor: That of the model; its chat template may have variables.
        limits: Largest value of sizes, by name.

    Raises:
        ValueError: For another name, and for a value out of bounds. Pictures, paths and templates are no client's
            business.
    """
    refuse_renamed(kwargs, "chat_template_kwargs.")
    for name, value in kwargs.items():
        where = f"chat_template_kwargs.{name}"
        if name == "label_images":
            _expect(value, (bool,), where)
        elif name in ("max_image_tokens", "max_tiles", "min_tiles"):
            _expect(value, (int,), where)
            if not 1 <= value <= limits.get(name, value):
                most = f" and at most {limits[name]}" if name in limits else ""
                raise ValueError(f"{where}: expected at least 1{most}, found {value}.")
        elif name == "enable_thinking" or _is_free_variable(name, processor):
            _expect(value, (bool, int, float, str), where)
            if isinstance(value, str) and not PLAIN_WORDS.fullmatch(value):
                raise ValueError(f"{where}: expected plain words, found {value!r}.")
        else:
            raise ValueError(
                f"{where}: not taken from a request; known are label_images, max_image_tokens, max_tiles, min_tiles "
                "and variables of the model's chat template."
            )
    return dict(kwargs)


def picture_urls(messages: list[dict]) -> list[dict]:
    """The items with a picture in checked messages, in order; each holds it at `["image_url"]["url"]`."""
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return [item for content in contents for item in content if item["type"] == "image_url"]


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _expect(value: Any, types: tuple[type, ...], where: str) -> None:
    if type(value) not in types:  # exact: JSON's true is no number
        names = {
            "str": "a string",
            "list": "a list",
            "dict": "an object",
            "bool": "true or false",
            "int": "an integer",
        }
        expected = " or ".join(names.get(kind.__name__, "a number") for kind in types)
        raise ValueError(f"{where}: expected {expected}, found {_shown(value)}.")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_unsupported(values: Mapping[str, Any], only: Mapping[str, Any], prefix: str) -> None:
    for name, expected in only.items():
        if values.get(name) not in (None, expected):
            raise ValueError(
                f"{prefix}{name}: only {_shown(expected)} is supported, found {_shown(values[name])}; leave it out."
            )


def _refuse_broken_characters(request: dict) -> None:
    try:
        json.dumps(request, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        found = ascii(error.object[error.start])
        raise ValueError(
            f"The request holds half a character ({found}); expected text that is valid Unicode."
        ) from None


def _message(message: Any, where: str) -> dict:
    _expect(message, (dict,), where)
    message = _without_none(message)
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise ValueError(
            f"{where}.role: expected user, assistant, system or tool, found {_shown(message.get('role'))}."
        )
    if message.get("tool_calls"):
        _expect(message["tool_calls"], (list,), f"{where}.tool_calls")
        message["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls[{place}]") for place, call in enumerate(message["tool_calls"])
        ]
        if "content" not in message:
            return message
    elif "tool_calls" in message:
        del message["tool_calls"]
    content = message.get("content", "" if message["role"] == "assistant" else None)
    if isinstance(content, list):
        content = [_item(item, f"{where}.content[{place}]") for place, item in enumerate(content)]
    elif not isinstance(content, str):
        raise ValueError(f"{where}.content: expected a string or a list of items, found {_shown(content)}.")
    return {**message, "content": content}


def _item(item: Any, where: str) -> dict:
    _expect(item, (dict,), where)
    if item.get("type") == "text":
        _expect(item.get("text"), (str,), f"{where}.text")
        return item
    if item.get("type") == "image_url":
        url = item.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        _expect(url, (str,), f"{where}.image_url.url")
        return {"type": "image_url", "image_url": {"url": url}}
    raise ValueError(f"{where}.type: expected text or image_url, found {_shown(item.get('type'))}.")


def _tool_call(call: Any, where: str) -> dict:
    _expect(call, (dict,), where)
    function = call.get("function")
    _expect(function, (dict,), f"{where}.function")
    _expect(function.get("name"), (str,), f"{where}.function.name")
    arguments = function.get("arguments")
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}.function.arguments: expected JSON ({error}).") from None
    _expect(arguments, (dict,), f"{where}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def _check_generation_config(text: str) -> None:
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"generation_config: expected JSON ({error}).") from None
    _expect(settings, (dict,), "generation_config")
    if settings.get("stop_strings") is not None:
        raise ValueError("generation_config.stop_strings: give them as stop.")
    if settings.get("max_new_tokens") is not None:
        _expect(settings["max_new_tokens"], (int,), "generation_config.max_new_tokens")
    _refuse_unsupported(settings, ONLY_GENERATION, "generation_config.")


def _stops(stop: str | list) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    for found in stops:
        if not isinstance(found, str) or not 1 <= len(found) <= MAX_STOP_LENGTH:
            raise ValueError(f"stop: expected strings of 1 to {MAX_STOP_LENGTH} characters, found {_shown(found)}.")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"stop: expected at most {MAX_STOPS} strings, found {len(stops)}.")
    return stops


def _is_free_variable(name: str, processor: HoVLEProcessor) -> bool:
    """Whether the chat template speaks of this name, and nothing else gives it a value."""
    templates = processor.chat_template
    text = "\n".join(templates.values()) if isinstance(templates, dict) else templates or ""
    taken = {
        *RESERVED,
        *processor.tokenizer.SPECIAL_TOKENS_ATTRIBUTES,
        *inspect.signature(processor.apply_chat_template).parameters,
        *processor._known_kwargs,
    }
    return name not in taken and name.isidentifier() and re.search(rf"\b{re.escape(name)}\b", text) is not None
