"""The one thread in which the model answers: what waits joins the answers in work, one between any two steps.

Compiled graphs must stay in their thread, and nobody else may use the model meanwhile.
"""

import abc
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache

from ..inference import Batch, PrefixCache, Row
from ..inference.batch import ROOM
from ..model.modeling_hovle import HoVLEForConditionalGeneration
from ..model.rotary import rope_switch
from .failures import RequestError
from .generation import Answer, ScoreChanges, Settings
from .limits import BatchLimits
from .metrics import Metrics

log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True, eq=False)
class _Waiting:
    inputs: Mapping[str, Any]
    answer: Answer
    since: float = field(default_factory=time.monotonic)

    @property
    def num_tokens(self) -> int:
        """Tokens that memory is taken for: prompt and answer at their longest, and room that is not used."""
        return len(self.answer.prompt_ids) + (self.answer.settings.config.max_new_tokens or 0) + ROOM


@dataclass(frozen=True)
class _InWork:
    answer: Answer
    num_bytes: int
    """Of keys and values at the answer's longest."""


class Engine(abc.ABC):
    """A thread that owns a model, and a queue before it.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        metrics: Counts what is done.
    """

    def __init__(self, model, tokenizer, metrics: Metrics):
        self._model, self._tokenizer, self._metrics = model, tokenizer, metrics
        self._waiting: deque[_Waiting] = deque()
        self._in_work: dict[Row, _InWork] = {}
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="hovle-generation", daemon=True)
        self._thread.start()
        metrics.watch("hovle_prompts_waiting", "Prompts that are ready and wait", lambda: self.num_waiting)
        metrics.watch("hovle_answers_in_work", "Answers that grow", lambda: self.num_in_work)

    @property
    def is_alive(self) -> bool:
        """Whether the model answers."""
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Prompts that are not yet read."""
        return len(self._waiting)

    @property
    def num_in_work(self) -> int:
        """Answers that grow."""
        return len(self._in_work)

    def most_new_tokens(self, input_ids: torch.Tensor) -> float:
        """Tokens that may follow a prompt of shape `(1, T)`, whatever the model's positions."""
        return math.inf

    def start(self, inputs: Mapping[str, Any], settings: Settings) -> Answer:
        """Let the model answer to `inputs`, a prompt of one row; `Answer.begun` says when they are taken up.

        Raises:
            RequestError: Status 503, once the engine is closed.
        """
        answer = Answer(self._tokenizer, settings, inputs["input_ids"][0].tolist())
        with self._changed:
            if self._is_closed:
                raise RequestError("The server is shutting down.", code="overloaded", status=503)
            self._waiting.append(_Waiting(inputs, answer))
            self._changed.notify()
        return answer

    def close(self) -> None:
        """End all answers and the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._has_work():
                self._work(self._next())
        finally:
            with self._changed:
                self._is_closed = True
                left = [waiting.answer for waiting in self._waiting] + [work.answer for work in self._in_work.values()]
            for answer in left:
                answer.fail(RequestError("The server was shut down.", code="overloaded", status=503))

    def _has_work(self) -> bool:
        """Wait for something to do; False once the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._waiting or self._in_work)
            return not self._is_closed

    def _next(self) -> _Waiting | None:
        """The first that waits, where there is room for it; answers nobody waits for leave their places."""
        with self._changed:
            for waiting in [waiting for waiting in self._waiting if waiting.answer.is_abandoned]:
                self._waiting.remove(waiting)
                waiting.answer.finish()
            return self._waiting.popleft() if self._waiting and self._has_room(self._waiting[0]) else None

    def _has_room(self, waiting: _Waiting) -> bool:
        """Whether the model can take up an answer now."""
        return True

    @abc.abstractmethod
    def _work(self, waiting: _Waiting | None) -> None:
        """Take up an answer, where one waits, and do a piece of what is in work."""

    def _told_begun(self, waiting: _Waiting) -> list[LogitsProcessor]:
        """Say that a prompt is taken up; return what changes the scores of its answer."""
        answer = waiting.answer
        answer.tell_begun()
        self._metrics.prompt_tokens.inc(len(answer.prompt_ids))
        return [ScoreChanges(answer.settings, len(answer.prompt_ids))] if answer.settings.changes_scores else []

    def _fail(self, answers: Iterable[Answer], error: Exception) -> None:
        log.error("An answer ended in an error.", exc_info=error)
        for answer in answers:
            answer.fail(error)


class BatchingEngine(Engine):
    """All answers in work grow together.

    Args:
        model: A HoVLE in torch, in evaluation mode.
        tokenizer: Its tokenizer.
        metrics: Counts what is done.
        limits: What all answers may hold.
    """

    def __init__(self, model, tokenizer, metrics: Metrics, limits: BatchLimits):
        self._limits = limits
        self._batch = Batch(PrefixCache(model, limits.prefix_bytes))
        self._bytes_per_token = 0.0  # the most of any row so far
        super().__init__(model, tokenizer, metrics)

    def most_new_tokens(self, input_ids: torch.Tensor) -> float:
        """Tokens that may follow a prompt of shape `(1, T)`: from longrope's switch on, keys in a cache would turn."""
        config, num_tokens = self._model.config, input_ids.shape[-1]
        num_more = int((input_ids == config.image_token_id).sum()) * (config.slots_per_placeholder - 1)
        lengths = (num_tokens + num_more, num_tokens)  # in the holistic layers, in the language model
        switches = map(rope_switch, self._model.model.rotary_embs)
        rooms = [switch - length + 1 for switch, length in zip(switches, lengths, strict=True) if length <= switch]
        return min(rooms, default=math.inf)

    def _has_room(self, waiting: _Waiting) -> bool:
        if not self._in_work:
            return True
        held = sum(work.num_bytes for work in self._in_work.values())
        needed = waiting.num_tokens * self._bytes_per_token
        return len(self._in_work) < self._limits.num_rows and held + needed <= self._limits.cache_bytes

    def _work(self, waiting: _Waiting | None) -> None:
        if waiting is not None:
            self._join(waiting)
        if self._in_work:
            self._step()

    def _join(self, waiting: _Waiting) -> None:
        answer, settings = waiting.answer, waiting.answer.settings
        changes = self._told_begun(waiting)
        # Ways to the same tokens that need a cache of their own, or none; here is a faster one.
        settings.config.update(use_cache=True, cache_implementation=None, prompt_lookup_num_tokens=None)
        try:
            row = self._batch.join(waiting.inputs, settings.config, [answer], changes, settings.seed)
        except Exception as error:
            self._fail([answer], error)
            return
        self._metrics.first_token_seconds.observe(time.monotonic() - waiting.since)
        self._metrics.reused_tokens.inc(row.begun.num_reused)
        self._metrics.answer_tokens.inc()
        if row.is_done:
            answer.finish()
            return
        bytes_per_token = _num_bytes(row.cache) / row.cache.get_seq_length()
        self._bytes_per_token = max(self._bytes_per_token, bytes_per_token)
        self._in_work[row] = _InWork(answer, int(waiting.num_tokens * bytes_per_token))

    def _step(self) -> None:
        try:
            done = self._batch.step()
        except Exception as error:
            self._fail([work.answer for work in self._in_work.values()], error)
            self._in_work.clear()
            self._batch.rows.clear()
            return
        self._metrics.steps.inc()
        self._metrics.answer_tokens.inc(len(self._in_work))
        for row in done:
            answer = self._in_work.pop(row).answer
            if row.error is None:
                answer.finish()
            else:
                self._fail([answer], row.error)


class SerialEngine(Engine):
    """One answer after another, by the model's own `generate`: for models that hold one sequence at a time."""

    def _work(self, waiting: _Waiting | None) -> None:
        if waiting is None:
            return
        answer, settings = waiting.answer, waiting.answer.settings
        processors = LogitsProcessorList(self._told_begun(waiting))
        try:
            with _seeded(settings.seed):
                self._model.generate(
                    **waiting.inputs,
                    generation_config=settings.config,
                    stopping_criteria=StoppingCriteriaList([answer]),
                    logits_processor=processors,
                )
        except Exception as error:
            self._fail([answer], error)
            return
        finally:
            self._metrics.answer_tokens.inc(len(answer.ids))
        answer.finish()


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from this seed, and afterwards go on as if nothing had been: no client learns another's numbers."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        yield


def engine_of(model, tokenizer, metrics: Metrics, limits: BatchLimits) -> Engine:
    """The engine a model needs: torch gives several answers a token at a time."""
    if isinstance(model, HoVLEForConditionalGeneration):
        return BatchingEngine(model, tokenizer, metrics, limits)
    return SerialEngine(model, tokenizer, metrics)


def _num_bytes(cache: Cache) -> int:
    return sum(item.nbytes for layer in cache.layers for item in (layer.keys, layer.values))
