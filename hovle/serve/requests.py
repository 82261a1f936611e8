"""What `hovle serve` takes from a client: requests of OpenAI's chat API, looked through before anything reads them.

A client is a stranger. What it may name is listed here, with types and ranges; a field that is null is absent; all
else is refused with a `RequestError` that names the field the client sent, what was found and what is expected.
"""

import inspect
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from transformers import GenerationConfig

from ..model.processing_hovle import HoVLEProcessor, refuse_renamed
from .failures import RequestError

MAX_STOPS, MAX_STOP_LENGTH = 16, 200
MAX_MESSAGES, MAX_ITEMS, MAX_TOOLS, MAX_BIASES = 4096, 1024, 128, 4096

RESERVED = {"messages", "tojson", "raise_exception", "strftime_now"}
"""Names a chat template gets from its renderer."""

PLAIN_WORDS = re.compile(r"[\w .,:/-]*")

EXPECTED = {
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "too_long": "at most {max_length} of them",
    "too_short": "at least {min_length} of them",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} character",
}
"""pydantic's kinds of errors, in our words."""

PICTURE_FORM = '{"type": "image_url", "image_url": {"url": ...}}'


class Part(BaseModel):
    """An object of a request: its fields are listed, types are exact, and null is absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return {name: value for name, value in values.items() if value is not None} if type(values) is dict else values


def _fault(message: str, field: str = "") -> PydanticCustomError:
    """An error of a validator; `field` is the one of the object that it is about."""
    return PydanticCustomError("fault", "{message}", {"message": message, "field": field})


def _as_url_object(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


def _as_items(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ImageUrl(Part):
    """Where a picture is, and how finely it is to be seen."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class Item(Part):
    """A text or a picture of a message."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: Annotated[ImageUrl | None, BeforeValidator(_as_url_object)] = None

    @model_validator(mode="after")
    def _has_what_it_says(self) -> "Item":
        for name in ("text", "image_url"):
            if (getattr(self, name) is None) == (self.type == name):
                raise _fault(
                    f"{'missing from' if self.type == name else 'no key of'} an item of type {self.type}", name
                )
        return self


def _read_arguments(value: Any) -> Any:
    """Arguments of a call as an object; clients send it as JSON, and nothing at all where there are none."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else {}
    except (ValueError, RecursionError) as error:
        raise _fault(f"expected JSON ({error})") from None


class CalledFunction(Part):
    """The function of a call."""

    name: str = Field(min_length=1)
    arguments: Annotated[dict[str, Any], BeforeValidator(_read_arguments)] = {}


class Call(Part):
    """A call of a function in an assistant message."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None  # clients that put a stream's pieces together keep it
    function: CalledFunction


class Message(Part):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[Item] | None, BeforeValidator(_as_items), Field(max_length=MAX_ITEMS)] = None
    name: str | None = None
    tool_calls: list[Call] = Field(default=[], max_length=MAX_TOOLS)
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise _fault(f"missing; a message of role {self.role} needs a string or a list of items", "content")
        if self.tool_calls and self.role != "assistant":
            raise _fault("only assistant messages call tools", "tool_calls")
        if self.tool_call_id is not None and self.role != "tool":
            raise _fault("only tool messages answer calls", "tool_call_id")
        return self

    @property
    def text(self) -> str:
        """All its words."""
        return "".join(item.text or "" for item in self.content or [])

    @property
    def pictures(self) -> list[ImageUrl]:
        """All its pictures."""
        return [item.image_url for item in self.content or [] if item.image_url]


class FunctionSchema(Part):
    """What a model is told of a function."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] = {}
    strict: Literal[False] = False


class Tool(Part):
    """A function the model may call."""

    type: Literal["function"]
    function: FunctionSchema


class StreamOptions(Part):
    """How a stream ends."""

    include_usage: bool = False


class ResponseFormat(Part):
    """Answers are free text."""

    type: Literal["text"]


class GenerationSettings(Part):
    """What the JSON text in `generation_config` may say; `transformers chat` sends its settings this way."""

    do_sample: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    max_new_tokens: int | None = Field(None, ge=1)
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, values: Any) -> Any:
        """Drop fields with the value that they have anyway, as configurations that are sent whole hold them."""
        if type(values) is not dict:
            return values
        usual = {**vars(GenerationConfig()), **GenerationConfig._get_default_generation_params()}
        notes = {"transformers_version", "_from_model_config"}
        return {
            name: value
            for name, value in values.items()
            if name in cls.model_fields
            or not (name in notes or (name in usual and type(value) is type(usual[name]) and value == usual[name]))
        }


def _read_settings(value: Any) -> Any:
    if not isinstance(value, str):
        raise _fault("expected a string that holds JSON")
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise _fault(f"expected JSON ({error})") from None


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class ChatRequest(Part):
    """A request to `/v1/chat/completions`. Fields with a single value would change the answer but are not built."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    frequency_penalty: float = Field(0, ge=-2, le=2)
    presence_penalty: float = Field(0, ge=-2, le=2)
    logit_bias: dict[str, Bias] = Field({}, max_length=MAX_BIASES)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[list[Stop], BeforeValidator(_as_list), Field(max_length=MAX_STOPS)] = []
    generation_config: Annotated[GenerationSettings | None, BeforeValidator(_read_settings)] = None
    chat_template_kwargs: dict[str, Any] = {}
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none"] = "auto"
    user: str | None = None  # for the client's own books
    n: Literal[1] = 1
    logprobs: Literal[False] = False
    top_logprobs: Literal[0] = 0
    response_format: ResponseFormat | None = None
    parallel_tool_calls: Literal[True] = True
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"
    modalities: list[Literal["text"]] = ["text"]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise _fault(
                f"is {self.max_tokens} but max_completion_tokens is {self.max_completion_tokens}", "max_tokens"
            )
        if self.stream_options and not self.stream:
            raise _fault("of use with stream only", "stream_options")
        return self

    @property
    def longest_answer(self) -> int | None:
        """Tokens the answer may take, whatever the field that says so is called."""
        own = self.generation_config.max_new_tokens if self.generation_config else None
        return self.max_completion_tokens or self.max_tokens or own

    @property
    def picture_urls(self) -> list[ImageUrl]:
        """The pictures of all messages, in order."""
        return [picture for message in self.messages for picture in message.pictures]

    @property
    def shown_tools(self) -> list[dict]:
        """The tools the model is told of, as templates read them."""
        tools = self.tools if self.tool_choice == "auto" else []
        return [tool.model_dump(exclude_unset=True) for tool in tools]


def read_request(body: bytes) -> ChatRequest:
    """Read a request from its JSON.

    Raises:
        RequestError: For text that is no JSON, and as `check_request`.
    """
    try:
        return check_request(json.loads(body))
    except RequestError:
        raise
    except RecursionError:
        raise RequestError("The request is nested too deeply.") from None
    except ValueError as error:
        raise RequestError(f"The request is not JSON ({error}).") from None


def check_request(body: Any) -> ChatRequest:
    """Check a request.

    Raises:
        RequestError: For a field, message or item that is not of OpenAI's form, or asks for what is not done here.
    """
    if type(body) is not dict:
        raise RequestError(f"The request: expected an object, found {_shown(body)}.")
    _refuse_broken_characters(body)
    try:
        request = ChatRequest.model_validate(body)
    except ValidationError as error:
        _refuse(error.errors(include_url=False)[0])
    for message in request.messages:
        if message.role == "developer":  # OpenAI's newer word for it, which templates do not know
            message.role = "system"
    return request


def _refuse(error: ErrorDetails) -> NoReturn:
    """Raise what pydantic found, in our words."""
    context = error.get("ctx", {})
    where = _path(error["loc"], context.get("field", ""))
    kind, found = error["type"], error["input"]
    if kind == "fault":
        message = context["message"]
    elif kind == "missing":
        message = "missing"
    elif kind == "extra_forbidden":
        message = "not read by this server; leave it out"
        if len(error["loc"]) > 1 and error["loc"][0] == "messages":
            message += f", and send pictures as items of content: {PICTURE_FORM}"
    elif kind == "literal_error":
        values = context["expected"].replace("'", "").replace("False", "false").replace("True", "true")
        only = "expected {}" if " or " in values else "only {} is supported"
        message = f"{only.format(values)}, found {_shown(found)}"
    else:
        expected = EXPECTED[kind].format(**context) if kind in EXPECTED else error["msg"]
        found = context.get("actual_length") if kind in ("too_long", "too_short") else found
        message = f"expected {expected}, found {_shown(found)}"
    raise RequestError(f"{where}: {message}.", param=where)


def _path(places: tuple[int | str, ...], field: str) -> str:
    """`messages[0].content` of `("messages", 0, "content")`."""
    whole = [*places, *([field] if field else [])]
    return "".join(f"[{place}]" if isinstance(place, int) else f".{place}" for place in whole).lstrip(".")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_broken_characters(request: dict) -> None:
    try:
        json.dumps(request, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        found = ascii(error.object[error.start])
        raise RequestError(
            f"The request holds half a character ({found}); expected text that is valid Unicode."
        ) from None


def check_template_kwargs(
    kwargs: Mapping[str, Any], processor: HoVLEProcessor, limits: Mapping[str, int]
) -> dict[str, Any]:
    """Return a request's `chat_template_kwargs`, of which each name is known and each size bounded.

    Args:
        kwargs: What the client wrote.
        processor: That of the model; its chat template may have variables.
        limits: Largest value of sizes, by name.

    Raises:
        RequestError: For another name, and for a value out of bounds. Pictures, paths and templates are no client's
            business.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    try:
        refuse_renamed(given, "chat_template_kwargs.")
    except ValueError as error:
        raise RequestError(str(error), param="chat_template_kwargs") from None
    for name, value in given.items():
        where = f"chat_template_kwargs.{name}"
        if name == "label_images":
            _expect(value, (bool,), where, "true or false")
        elif name in ("max_image_tokens", "max_tiles", "min_tiles"):
            _expect(value, (int,), where, "an integer")
            if not 1 <= value <= limits.get(name, value):
                most = f" and at most {limits[name]}" if name in limits else ""
                raise RequestError(f"{where}: expected at least 1{most}, found {_shown(value)}.", param=where)
        elif name == "enable_thinking" or _is_free_variable(name, processor):
            _expect(value, (bool, int, float, str), where, "true, false, a number or a string")
            if isinstance(value, str) and not PLAIN_WORDS.fullmatch(value):
                raise RequestError(f"{where}: expected plain words, found {_shown(value)}.", param=where)
        else:
            raise RequestError(
                f"{where}: not taken from a request; known are label_images, max_image_tokens, max_tiles, min_tiles "
                "and variables of the model's chat template.",
                param=where,
            )
    return given


def _expect(value: Any, types: tuple[type, ...], where: str, expected: str) -> None:
    if type(value) not in types:  # exact: JSON's true is no number
        raise RequestError(f"{where}: expected {expected}, found {_shown(value)}.", param=where)


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
