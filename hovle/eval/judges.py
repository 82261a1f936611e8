"""Judges that do not answer: a benchmark that asks one must not score 0 because its key is wrong.

lmms-eval's judged tasks swallow whatever their judge raises and go on with an empty grade, one question after the
other. While an evaluation runs, their functions that ask the judge are wrapped here, so that the first question that
stays without a reply ends it.
"""

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

HALLUSION_BENCH = "lmms_eval.tasks.hallusion_bench.utils"
"""Posts its requests itself; what it writes into grades after a failure is the same as an honest "unclear"."""

PATIENCE, PAUSE_SECONDS = 3, 5.0
"""How often HallusionBench's judge is asked the same and how long it is left alone in between, as in the task."""


class JudgeSilent(BaseException):
    """The judge gave no reply. No `Exception`, as the tasks catch every one of them."""


@contextlib.contextmanager
def judge_must_answer(task: Any) -> Iterator[None]:
    """Raise `JudgeSilent` out of a judged task whose judge gives no reply; other tasks are left alone.

    Args:
        task: As lmms-eval loaded it.
    """
    watch = _WATCHES.get(task.config.task)
    if watch is None:
        yield
        return
    names, name, asks = watch(task)
    missing = object()
    before = names.get(name, missing)
    names[name] = asks
    try:
        yield
    finally:
        if before is missing:
            del names[name]
        else:
            names[name] = before


def _replied(ask: Callable[..., Any], is_reply: Callable[[Any], bool]) -> Callable[..., Any]:
    """`ask`, which makes the harness's own attempts, with an exception where they all failed."""

    @functools.wraps(ask)
    def asks(*args: Any, **kwargs: Any) -> Any:
        reply = ask(*args, **kwargs)
        if not is_reply(reply):
            raise JudgeSilent("the judge gave no reply: check its key, its address, its quota and the network.")
        return reply

    return asks


def _mmbench(task: Any) -> tuple[dict, str, Callable]:
    evaluator = task.aggregation()["gpt_eval_score"].__globals__["mmbench_evaluator"]
    asks = _replied(evaluator.get_chat_response, lambda reply: "Failed to obtain answer via API" not in reply)
    return vars(evaluator), "get_chat_response", asks


def _mathvista(task: Any) -> tuple[dict, str, Callable]:
    evaluator = task.config.process_results.__globals__["mathvista_evaluator"]
    return vars(evaluator), "get_chat_response", _replied(evaluator.get_chat_response, bool)


def _mmvet(task: Any) -> tuple[dict, str, Callable]:
    names = task.config.process_results.__globals__
    return names, "get_chat_response", _replied(names["get_chat_response"], lambda reply: bool(reply[0]))


def _hallusion(task: Any) -> tuple[dict, str, Any]:
    names = vars(importlib.import_module(HALLUSION_BENCH))
    post = functools.partial(_post_until_it_replies, names["requests"].post)
    return names, "requests", SimpleNamespace(post=post)


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


_WATCHES: dict[str, Callable[[Any], tuple[dict, str, Any]]] = {
    "mmbench_en_dev": _mmbench,
    "mathvista_testmini_format": _mathvista,
    "mmvet": _mmvet,
    "hallusion_bench_image": _hallusion,
}
"""Judged task -> where its function that asks the judge is: a namespace, the name in it, and what to put there."""
