"""Judges that do not answer: a benchmark that asks one must not score 0 because its key is wrong.

lmms-eval's judged tasks swallow whatever their judge raises and go on with an empty grade, one question after the
other. While an evaluation runs, their functions that ask the judge are wrapped here, so that the first question that
stays without a reply ends it.

`OPENAI_API_URL` may name another service with OpenAI's chat API. Half of lmms-eval's tasks take it for the base of
addresses (`.../v1`), half for the whole one (`.../v1/chat/completions`); here both forms do for all tasks.
"""

import contextlib
import copy
import functools
import importlib
import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from ..results import digest

HALLUSION_BENCH = "lmms_eval.tasks.hallusion_bench.utils"
"""Posts its requests itself; what it writes into grades after a failure is the same as an honest "unclear"."""

PATIENCE, PAUSE_SECONDS = 3, 5.0
"""How often HallusionBench's judge is asked the same and how long it is left alone in between, as in the task."""


MOST_ASKS = 20
"""How often MM-Vet's judge is asked the same in a row; the task asks on for ever while grades are not from 0 to 1."""

Swap = tuple[dict[str, Any], str, Any]
"""A namespace, a name in it, and what stands there while the benchmark runs."""


class JudgeSilent(BaseException):
    """The judge gave no reply that can be used. No `Exception`, as the tasks catch every one of them."""


@contextlib.contextmanager
def judge_must_answer(task: Any) -> Iterator[None]:
    """Raise `JudgeSilent` out of a judged task whose judge gives no reply; other tasks are left alone.

    Args:
        task: As lmms-eval loaded it.
    """
    watch = _WATCHES.get(task.config.task)
    missing = object()
    before: list[Swap] = []
    try:
        for names, name, value in watch(task) if watch is not None else []:
            before.append((names, name, names.get(name, missing)))
            names[name] = value
        yield
    finally:
        for names, name, value in before:
            if value is missing:
                del names[name]
            else:
                names[name] = value


def judge_facts() -> dict[str, str]:
    """Which judge the environment names; another one's grades are other scores. Addresses are not written down."""
    base = _base_url()
    return {
        "model": os.environ.get("MODEL_VERSION", "the harness's"),
        "service": "the harness's" if base is None else f"another one, {digest(base)}",
    }


def _base_url() -> str | None:
    """What `/chat/completions` is added to, where the environment names a service."""
    url = os.environ.get("OPENAI_API_URL")
    return url.rstrip("/").removesuffix("/chat/completions") if url else None


def _chat_urls(names: dict[str, Any]) -> list[Swap]:
    base = _base_url()
    return [] if base is None else [(names, "API_URL", f"{base}/chat/completions")]


def _at_base_url(server: Any) -> Any:
    """One of lmms-eval's judge servers, for the address in the environment; other services' are left alone."""
    base = _base_url()
    if base is None or not hasattr(server, "base_url"):
        return server
    server = copy.copy(server)
    server.base_url = base
    if server.use_client:
        server.client = server.client.with_options(base_url=base)
    return server


def _replied(ask: Callable[..., Any], is_reply: Callable[[Any], bool]) -> Callable[..., Any]:
    """`ask`, which makes the harness's own attempts, with an exception where they all failed."""

    @functools.wraps(ask)
    def asks(*args: Any, **kwargs: Any) -> Any:
        reply = ask(*args, **kwargs)
        if not is_reply(reply):
            raise JudgeSilent("the judge gave no reply: check its key, its address, its quota and the network.")
        return reply

    return asks


def _mmbench(task: Any) -> list[Swap]:
    evaluator = task.aggregation()["gpt_eval_score"].__globals__["mmbench_evaluator"]
    asks = _replied(evaluator.get_chat_response, lambda reply: "Failed to obtain answer via API" not in reply)
    return [(vars(evaluator), "get_chat_response", asks), *_chat_urls(vars(evaluator))]


def _mathvista(task: Any) -> list[Swap]:
    evaluator = task.config.process_results.__globals__["mathvista_evaluator"]
    asks = _replied(evaluator.get_chat_response, bool)
    return [(vars(evaluator), "get_chat_response", asks), (vars(evaluator), "server", _at_base_url(evaluator.server))]


def _mmvet(task: Any) -> list[Swap]:
    names = task.config.process_results.__globals__
    asks = _with_an_end(_replied(names["get_chat_response"], lambda reply: bool(reply[0])))
    return [(names, "get_chat_response", asks), (names, "server", _at_base_url(names["server"]))]


def _with_an_end(ask: Callable[..., Any]) -> Callable[..., Any]:
    """`ask` for the same prompt `MOST_ASKS` times in a row at most."""
    latest, times = "", 0

    def asks(prompt: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal latest, times
        latest, times = prompt, times + 1 if prompt == latest else 1
        reply = ask(prompt, *args, **kwargs)
        if times >= MOST_ASKS:
            raise JudgeSilent(f"the judge gave no grade from 0 to 1 in {times} replies, the last one {reply[0]!r}.")
        return reply

    return asks


def _hallusion(task: Any) -> list[Swap]:
    names = vars(importlib.import_module(HALLUSION_BENCH))
    post = functools.partial(_post_until_it_replies, names["requests"].post)
    return [(names, "requests", SimpleNamespace(post=post)), *_chat_urls(names)]


def _post_until_it_replies(post: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A response with a grade in it; the task itself would go on with the grade of the question before."""
    reason = ""
    for attempt in range(PATIENCE):
        if attempt:
            time.sleep(PAUSE_SECONDS)
        try:
            response = post(*args, **kwargs)
            response.raise_for_status()
            if response.json()["choices"][0]["message"]["content"].strip():
                return response
            reason = "an empty reply"
        except Exception as error:  # whatever the network, the service and its JSON bring
            reason = f"{type(error).__name__}: {error}"
    raise JudgeSilent(f"the judge gave no reply ({reason}): check its key, its address, its quota and the network.")


_WATCHES: dict[str, Callable[[Any], list[Swap]]] = {
    "mmbench_en_dev": _mmbench,
    "mathvista_testmini_format": _mathvista,
    "mmvet": _mmvet,
    "hallusion_bench_image": _hallusion,
}
"""Judged task -> what has to change in it for the time it runs."""
