"""How an answer is generated, and how it is told, piece by piece as it grows.

`Answer` is an asynchronous iterator of text. The sum of its pieces is what decoding the whole answer gives, up to the
first stop string.
"""

import asyncio
import contextlib
import copy
import re
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from ..inference.answers import ends_itself
from .failures import RequestError
from .requests import ChatRequest

DEFAULT_NEW_TOKENS = 1024
"""Longest answer where neither the request nor the model's generation config says one; also transformers' number."""

COLDEST = 1e-4
"""Temperatures below are 0: the division by them would leave the range of 32-bit numbers."""

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""Tokens of single bytes; what a run of them says is known at its end, as one broken byte spoils the run."""

WINDOW, OVERLAP = 64, 8
"""Tokens decoded anew for each piece, at most so many; and those of them that the next window begins with."""


@dataclass(frozen=True)
class Settings:
    """How an answer is generated."""

    config: GenerationConfig
    """Without `stop_strings`, for which transformers would walk through the whole vocabulary."""
    stops: Sequence[str] = ()
    seed: int | None = None
    frequency_penalty: float = 0
    presence_penalty: float = 0
    logit_bias: Mapping[int, float] | None = None

    @classmethod
    def of(cls, request: ChatRequest, defaults: GenerationConfig, room: int, vocab_size: int) -> "Settings":
        """Take what a request says; what it leaves open is as in the model's generation config.

        Args:
            request: The request.
            defaults: The model's generation config.
            room: Tokens the answer may take at most.
            vocab_size: Number of tokens of the model.

        Raises:
            RequestError: For numbers of tokens that do not exist, and settings that do not go together.
        """
        config = copy.deepcopy(defaults)
        own = request.generation_config
        for name, value in (own.model_dump(exclude_none=True) if own else {}).items():
            setattr(config, name, value)
        sent = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        for name in sent:
            if getattr(request, name) is not None:
                setattr(config, name, getattr(request, name))
        config.do_sample = _samples(request, config.do_sample)
        if not config.do_sample:  # nothing of these is of use
            config.temperature = config.top_p = config.top_k = config.min_p = None
        elif config.top_k is None:
            config.top_k = 0  # `generate` takes 50 where nothing is said
        stops = [*request.stop, *(config.stop_strings or [])]
        config.stop_strings = None
        config.max_new_tokens = min(request.longest_answer or config.max_new_tokens or DEFAULT_NEW_TOKENS, room)
        config.max_length = None
        config.num_return_sequences = config.num_beams = 1
        config.return_dict_in_generate = False
        try:
            config.validate()
        except ValueError as error:
            raise RequestError(f"The settings do not go together: {error}") from error
        bias = _token_biases(request.logit_bias, vocab_size)
        return cls(config, stops, request.seed, request.frequency_penalty, request.presence_penalty, bias)

    @property
    def changes_scores(self) -> bool:
        """Whether `ScoreChanges` has something to do."""
        return bool(self.frequency_penalty or self.presence_penalty or self.logit_bias)


def _samples(request: ChatRequest, default: bool | None) -> bool:
    """Whether the next token is drawn: where a temperature above 0 is asked for, or a share of the likeliest."""
    own = request.generation_config
    if request.temperature is not None:
        return request.temperature >= COLDEST
    if own and own.do_sample is not None:
        return own.do_sample and (own.temperature is None or own.temperature >= COLDEST)
    if own and own.temperature is not None:
        return own.temperature >= COLDEST
    shares = (request.top_p not in (None, 1), bool(request.top_k), bool(request.min_p))
    return bool(default) or any(shares)


def _token_biases(bias: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    biases = {}
    for name, value in bias.items():
        if not (name.isascii() and name.isdigit() and len(name) < 12 and int(name) < vocab_size):
            raise RequestError(
                f"logit_bias: expected numbers of tokens from 0 to {vocab_size - 1}, found {name[:40]!r}.",
                param="logit_bias",
            )
        biases[int(name)] = value
    return biases


class ScoreChanges(LogitsProcessor):
    """Adds to the scores of tokens: biases, and penalties for those that the answer holds already."""

    def __init__(self, settings: Settings, prompt_length: int):
        self.settings, self.prompt_length = settings, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Change scores of shape `(1, vocabulary)`."""
        answer = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        scores = scores - self.settings.frequency_penalty * counts - self.settings.presence_penalty * (counts > 0)
        if self.settings.logit_bias:
            ids = torch.tensor(list(self.settings.logit_bias), device=scores.device)
            scores[:, ids] += torch.tensor(
                list(self.settings.logit_bias.values()), device=scores.device, dtype=scores.dtype
            )
        return scores


class GrowingText:
    """Turns tokens into text as they come; the pieces together are the text of all tokens at once.

    Characters may be spread over several tokens, and bytes that make no character may come at any time: what the next
    token could still change waits for it.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_told = 0  # characters of the window's text

    def feed(self, token: int) -> str:
        """The piece that is certain with this token, often nothing."""
        self._window.append(token)
        if BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or ""):
            return ""
        text = self._decode(self._window)
        if text.endswith("\ufffd"):
            return ""
        piece = text[self._num_told :]
        self._num_told = len(text)
        if len(self._window) >= WINDOW:
            recent = self._window[-OVERLAP:]
            shown = self._decode(recent)
            if shown.strip() and text.endswith(shown):
                self._window, self._num_told = recent, len(shown)
        return piece

    def rest(self) -> str:
        """What waited for a token that did not come."""
        return self._decode(self._window)[self._num_told :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


class UntilStop:
    """Lets text through up to the first stop string; the end of a piece that may begin one waits for the next."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.is_stopped = False

    def feed(self, piece: str) -> str:
        """The part of all text so far that is certain to stand before a stop string, and was not told yet."""
        if self.is_stopped:
            return ""
        text = self._held + piece
        answer = before_stop(text, self._stops)
        self.is_stopped = answer != text
        num_held = 0 if self.is_stopped else _num_held_back(text, self._stops)
        self._held = answer[len(answer) - num_held :]
        return answer[: len(answer) - num_held]

    def rest(self) -> str:
        """What waited, where nothing follows."""
        return "" if self.is_stopped else self._held


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def _num_held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of the text that is the start of a stop string."""
    return max((length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length])), default=0)


class Answer(StoppingCriteria):
    """An answer that grows in the generating thread and is read in the event loop.

    Attributes:
        prompt_ids: Tokens of the prompt.
        ids: Its tokens so far.
        is_cut: Whether it ended at its longest and not by itself, once it has ended.
        begun: Set when its prompt is read, or never will be.
    """

    def __init__(self, tokenizer, settings: Settings, prompt_ids: list[int]):
        self.settings, self.prompt_ids = settings, prompt_ids
        self.ids: list[int] = []
        self.is_cut = False
        self.begun = asyncio.Event()
        self._nobody_waits = threading.Event()
        self._text, self._until_stop = GrowingText(tokenizer), UntilStop(settings.stops)
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[str | BaseException | None] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[str]:
        """Pieces of text; raises what generation raised. Who stops reading ends generation."""
        try:
            while (item := await self._queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.abandon()

    def abandon(self) -> None:
        """End generation: nobody waits for more."""
        self._nobody_waits.set()

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody waits for more."""
        return self._nobody_waits.is_set()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs) -> torch.Tensor:
        """Take over new tokens of `input_ids`, shape `(1, T)`, and say whether the answer is at its end."""
        for token in input_ids[0, len(self.prompt_ids) + len(self.ids) :].tolist():
            self.ids.append(token)
            self._tell(self._until_stop.feed(self._text.feed(token)))
        is_done = self.is_abandoned or self._until_stop.is_stopped
        return torch.full((len(input_ids),), is_done, dtype=torch.bool, device=input_ids.device)

    def tell_begun(self) -> None:
        """Say that the prompt is taken up; called in the generating thread."""
        self._call(self.begun.set)

    def finish(self) -> None:
        """Tell what waited, and the end; called in the generating thread."""
        self._tell(self._until_stop.feed(self._text.rest()))
        self._tell(self._until_stop.rest())
        at_end = self._until_stop.is_stopped or ends_itself(self.ids, self.settings.config)
        self.is_cut = not at_end and len(self.ids) >= (self.settings.config.max_new_tokens or 0)
        self._put(None)

    def fail(self, error: BaseException) -> None:
        """Tell an error; called in the generating thread."""
        self._put(error)

    def _tell(self, piece: str) -> None:
        if piece:
            self._put(piece)

    def _put(self, item: str | BaseException | None) -> None:
        if not isinstance(item, str):  # it is over, perhaps before it began
            self.tell_begun()
        self._call(self._queue.put_nowait, item)

    def _call(self, function: Callable, *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self._loop.call_soon_threadsafe(function, *args)
