"""Run one benchmark through lmms-eval and read its score; what is missing is said, never passed over.

The harness's command line ends with 0 when a task is missing or raises. Here every such case is a `BenchmarkError`.
"""

import argparse
import functools
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from ...assets import load_manifest
from ..intervals import READINGS, UNREAD, Units
from ..results import digest, environment, harness_version, today
from .adaptations import ADAPTATIONS, WithPictures, parquet_files
from .judges import JudgeSilent, judge_must_answer
from .lmms_eval_plugin import HoVLEChat, generation_arguments
from .suites import TASKS_FOLDER, Benchmark
from .unread import unread_answers

TOLERANCE = 1e-4
"""The harness rounds some scores to four decimals."""

NOTHING_FOR_ZERO = ("llm_as_judge_eval",)
"""Metrics for which the harness says None when no answer is right (MathVista)."""


class BenchmarkError(RuntimeError):
    """One benchmark could not be run; the message says why and what to do."""


def task_manager():
    """The harness's own tasks and ours; from here on the harness logs warnings only, and to stderr."""
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    logger.remove()
    logger.add(_to_stderr, level="WARNING")
    return TaskManager("ERROR", include_path=str(TASKS_FOLDER), model_name="hovle")


def _to_stderr(text: str) -> None:
    sys.stderr.write(text)  # looked up anew each time: it may be replaced


def load_task(benchmark: Benchmark, manager: Any, data: Path | None = None):
    """Load a benchmark's documents and settings.

    Args:
        benchmark: What to load.
        manager: From `task_manager`.
        data: Folder with local copies, one folder per benchmark (`NAME/SPLIT-*.parquet`); for GQA also `gqa_images`.
            By default data come from where the task says, mostly the Hub.

    Raises:
        BenchmarkError: For a task the harness does not know, a missing key, and data that cannot be had.
    """
    if manager.task_index.get(benchmark.task, {}).get("type") not in ("task", "python_task"):
        raise BenchmarkError(f"lmms-eval {harness_version()} has no task {benchmark.task!r} (groups are not taken).")
    if benchmark.key and not os.environ.get(benchmark.key):
        raise BenchmarkError(
            f"the judge needs {benchmark.key} in the environment; without --judge, rules take its place."
        )
    try:
        changes = {"process_docs": ADAPTATIONS[benchmark.adapt]} if benchmark.adapt else {}
        changes |= {} if data is None else _local_data(benchmark.name, data)
        (task,) = manager.load_task_or_group([{"task": benchmark.task, **changes}], "chat").values()
    except Exception as error:  # whatever the harness, its tasks and data sets raise
        reason = reason_of(error) + ("" if data is None else _splits_found(benchmark.name, data))
        raise BenchmarkError(f"its task or data cannot be loaded: {reason}") from error
    if benchmark.generation:
        task.set_config("generation_kwargs", benchmark.generation, update=True)
    return task


def _local_data(name: str, data: Path) -> dict[str, Any]:
    """Changes of a task's configuration that point it at local files."""
    changes = {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": parquet_files(data / name)}
    pictures = data / f"{name}_images"
    return changes | ({"process_docs": WithPictures(pictures)} if pictures.is_dir() else {})


def _splits_found(name: str, data: Path) -> str:
    """Which splits local files are of, for a task that may want another one."""
    try:
        found = ", ".join(parquet_files(data / name)["data_files"])
    except ValueError:
        return ""
    return f"; the files in {data / name} are of the split {found}, as the beginnings of their names say"


def reason_of(error: BaseException) -> str:
    """The cause of an error in one line; the harness hides it behind its retries."""
    attempt = getattr(error, "last_attempt", None)
    if attempt is not None and attempt.exception() is not None:
        return reason_of(attempt.exception())
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def run_benchmark(
    benchmark: Benchmark, lm: HoVLEChat, manager: Any, folder: Path, limit: int | None, data: Path | None
) -> tuple[dict, list[dict]]:
    """Ask a benchmark's questions.

    Args:
        benchmark: What to run.
        lm: The model.
        manager: From `task_manager`.
        folder: Where the task writes files for submission and judges' grades; emptied first, as some tasks take what
            they find there for their own.
        limit: Questions to ask, or None for all.
        data: As in `load_task`.

    Returns:
        The result without identity, and one entry per question.

    Raises:
        BenchmarkError: When there is no score, whatever the cause.
    """
    task = load_task(benchmark, manager, data)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    lm.prompts_shown.clear()
    outcome = _evaluate(task, lm, manager, folder, limit)
    try:
        return _read(benchmark, task, outcome, lm, limit, data)
    except BenchmarkError:
        raise
    except Exception as error:  # the harness's results may lack anything
        raise BenchmarkError(f"its results cannot be read: {reason_of(error)}") from error


def _read(
    benchmark: Benchmark, task: Any, outcome: dict, lm: HoVLEChat, limit: int | None, data: Path | None
) -> tuple[dict, list[dict]]:
    """Result and answers from what the harness returned."""
    name = task.config.task
    samples, figures = outcome["samples"].get(name, []), outcome["results"][name]
    if not samples:
        raise BenchmarkError("the harness returned no answers.")
    score, interval = _score(benchmark, task, samples, figures)
    own = UNREAD.get(benchmark.units)
    score_alone = functools.partial(_score_alone, benchmark, task)
    unread = own(_values(benchmark, samples)) if own else unread_answers(samples, benchmark.metrics, score_alone)
    arguments, stops = generation_arguments(task.config.generation_kwargs or {}, lm.max_new_tokens)
    result = {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "task": benchmark.task,
        "score": score,
        "interval": interval,
        "num_questions": len(samples),
        "comparable": benchmark.comparable and limit is None and not unread,
        "note": "; ".join(part for part in (benchmark.note, unread) if part),
        "limit": limit,
        "figures": {key: value for key, value in figures.items() if isinstance(value, int | float)},
        "harness": {"lmms-eval": harness_version(), "task version": str(task.VERSION)},
        "prompt_hash": _prompt_hash(lm),
        "generation": {**arguments, "until": stops},
        "prompts": task.lmms_eval_specific_kwargs,
        "data": _data_facts(benchmark, task, data),
        "speed": outcome.get("throughput", {}),
        "environment": environment(lm.device),
        "date": today(),
    }
    return result, [_answer_entry(sample) for sample in samples]


def _evaluate(task: Any, lm: HoVLEChat, manager: Any, folder: Path, limit: int | None) -> dict:
    from lmms_eval.evaluator import simple_evaluate

    options = argparse.Namespace(
        output_path=str(folder), process_with_media=False, reasoning_tags=None, agentic_trace_mode="basic"
    )
    try:
        with judge_must_answer(task):
            return simple_evaluate(
                model=lm,
                tasks=[task],
                task_manager=manager,  # else it reads all tasks anew
                limit=limit,
                bootstrap_iters=0,  # the intervals are ours
                cli_args=options,
                process_docs_parallel=1,
                verbosity="ERROR",
            )
    except JudgeSilent as error:
        raise BenchmarkError(str(error)) from error
    except Exception as error:  # whatever a task raises
        raise BenchmarkError(f"it stopped: {reason_of(error)}") from error


def _score(
    benchmark: Benchmark, task: Any, samples: list[dict], figures: dict
) -> tuple[float, tuple[float, float] | None]:
    """The score in the published unit and its interval."""
    if not benchmark.metrics:
        return _first_figure(figures), None
    total = sum(_figure(figures, name) for name in benchmark.metrics)
    if benchmark.units == "none":
        return benchmark.scale * total, None
    units = READINGS[benchmark.units](_values(benchmark, samples), task.aggregation()[benchmark.metrics[0]])
    _compare_with_harness(units, total)
    low, high = units.interval()
    return benchmark.scale * units.score, (benchmark.scale * low, benchmark.scale * high)


def _score_alone(benchmark: Benchmark, task: Any, value: Any) -> float | None:
    """The score of one answer; None where it has none by itself, as one of MMBench's turned questions."""
    aggregate = task.aggregation().get(benchmark.metrics[0])
    try:
        return READINGS[benchmark.units]([value], aggregate).score
    except (KeyError, ValueError):
        return None


def _values(benchmark: Benchmark, samples: list[dict]) -> list[Any]:
    """What the harness made of each answer, for each metric."""
    return [sample[name] for sample in samples for name in benchmark.metrics if name in sample]


def _first_figure(figures: dict) -> float:
    for value in figures.values():
        if isinstance(value, int | float):
            return float(value)
    raise BenchmarkError(f"the harness gives no number; it gives {', '.join(figures) or 'nothing'}.")


def _figure(figures: dict, metric: str) -> float:
    """The harness's figure for a metric, whatever filter made it."""
    for key, value in figures.items():
        if key.partition(",")[0] != metric:
            continue
        if isinstance(value, int | float):
            return float(value)
        if metric in NOTHING_FOR_ZERO:
            return 0.0
        raise BenchmarkError(f"the harness's figure for {metric} is no number but {value!r}.")
    raise BenchmarkError(
        f"the harness gives no figure for {metric}, as no question asked counts for it; it gives {', '.join(figures)}."
    )


def _compare_with_harness(units: Units, theirs: float) -> None:
    ours = units.score * units.harness_factor
    if abs(ours - theirs) > max(TOLERANCE * max(1.0, abs(theirs)), units.harness_rounding):
        raise BenchmarkError(f"read from its answers the score is {ours:.6g}, the harness says {theirs:.6g}.")


def _prompt_hash(lm: HoVLEChat) -> str:
    """Of what was really shown (texts, places of pictures, settings), and of how the model's template wraps it.

    The order in which prompts were asked does not matter, as it depends on the batch size.
    """
    return digest(
        {
            "shown": sorted(lm.prompts_shown),
            "template": lm.processor.chat_template,
            "label_pictures": lm.label_pictures,
        }
    )


def _data_facts(benchmark: Benchmark, task: Any, data: Path | None) -> dict[str, Any]:
    """Where documents came from, the Hub's commit or the asset's pinned version, and a hash of all texts in them."""
    split = task.config.test_split or task.config.validation_split
    # `datasets` keeps what it made of a Hub data set in a folder named after the commit.
    files = [str(file["filename"]) for file in getattr(task.dataset[split], "cache_files", [])]
    commits = {found[1] for file in files if (found := re.search(r"[/\\]([0-9a-f]{40})[/\\]", file))}
    return {
        "name": benchmark.data or str(task.DATASET_PATH),
        "is_local_copy": data is not None,
        "split": split,
        "revision": commits.pop() if len(commits) == 1 else _pinned_version(benchmark.data),
        "text_hash": digest([_texts(doc) for doc in task.eval_docs_no_media]),
        "num_documents": len(task.eval_docs_no_media),
    }


def _pinned_version(name: str | None) -> str | None:
    """Version and hash of an asset of ours; None for other data."""
    asset = load_manifest().get(name or "")
    return None if asset is None else f"{asset.archive.version}, sha256 {asset.archive.sha256[:16]}"


def _texts(doc: dict) -> dict:
    """A document's columns without pictures."""
    return {name: value for name, value in doc.items() if isinstance(value, str | int | float | bool | list | None)}


def _answer_entry(sample: dict) -> dict:
    """What to keep of one question."""
    question = next((part for part in sample["arguments"] if isinstance(part, str)), "")
    entry = {"doc_id": sample["doc_id"], "question": question, "expected": sample["target"]}
    known = {
        "doc_id",
        "doc",
        "target",
        "arguments",
        "resps",
        "filtered_resps",
        "token_counts",
        "doc_hash",
        "input_media",
    }
    scores = {name: value for name, value in sample.items() if name not in known}
    return {**entry, "answer": sample["resps"][0][0] if sample["resps"] else "", "scores": scores}
