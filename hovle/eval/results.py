"""Result files: one JSON per benchmark with everything needed to judge and to repeat it.

`NAME.json` holds the score, `NAME.answers.jsonl` what was asked and answered. A result whose identity (model,
settings, task, harness) is that of the run asked for need not be made again.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..files.checkpoint_files import local_folder
from ..files.documents import load_json, parse_json
from ..files.model_folder import short_name
from ..machine.facts import processor_name
from ..requirements import installed_version
from ..version import __version__

HASHED = ("*.safetensors", "*.json", "*.jinja", "*.model")
"""Files of a model folder that decide its answers."""

PACKAGES = ("lmms-eval", "torch", "transformers", "datasets", "numpy", "pillow")


def digest(content: Any) -> str:
    """The first 16 hexadecimal digits of the sha256 of something JSON can hold."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def hash_model(model: str) -> str:
    """Hash weights, configuration, tokenizer and template of a model folder or Hub id."""
    folder = local_folder(model)
    paths = sorted({path for pattern in HASHED for path in folder.glob(pattern)})
    if not paths:
        raise ValueError(f"{folder} holds no model files ({', '.join(HASHED)}).")
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, as far as answers and speed may depend on them."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    versions = {name: installed_version(name) or "not installed" for name in PACKAGES}
    return {"hovle": __version__, "python": platform.python_version(), "device": hardware, **versions}


def provenance(models: Iterable[str | os.PathLike], device: torch.device) -> dict[str, Any]:
    """What numbers of an analysis were made with: models in order, versions, hardware, date."""
    hashed = [{"name": short_name(str(model)), "hash": hash_model(str(model))} for model in models]
    return {"models": hashed, "environment": environment(device), "date": today()}


def harness_version() -> str:
    """Version of lmms-eval."""
    return importlib.metadata.version("lmms-eval")


def write_result(folder: Path, result: dict, answers: Iterable[dict]) -> None:
    """Write answers, then the result; a result in place means both are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    name = result["benchmark"]
    lines = (json.dumps(answer, ensure_ascii=False, default=str) + "\n" for answer in answers)
    _replace(folder / f"{name}.answers.jsonl", "".join(lines))
    replace_result(folder, result)


def replace_result(folder: Path, result: dict) -> None:
    """Write a result whose answers are in place."""
    text = json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n"
    _replace(folder / f"{result['benchmark']}.json", text)


def _replace(path: Path, text: str) -> None:
    """A file is never seen half-written."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


_NUMBER, _TEXT = (int, float), (str,)
SHAPE: dict[str, Any] = {
    "benchmark": _TEXT,
    "title": _TEXT,
    "task": _TEXT,
    "score": _NUMBER,
    "interval": (list, type(None)),
    "num_questions": (int,),
    "comparable": (bool,),
    "note": _TEXT,
    "limit": (int, type(None)),
    "harness": {"lmms-eval": _TEXT},
    "prompt_hash": _TEXT,
    "data": {"name": _TEXT, "is_local_copy": (bool,), "revision": (str, type(None)), "text_hash": _TEXT},
    "environment": {"hovle": _TEXT, "torch": _TEXT, "transformers": _TEXT, "device": _TEXT},
    "date": _TEXT,
    "identity": _TEXT,
    "model": {"name": _TEXT, "hash": _TEXT},
    "settings": {"max_tiles": (int, str), "dtype": _TEXT, "batch_size": (int,)},
}
"""What tables and resumed runs read of a result, and its types."""


def read_result(path: Path) -> dict | None:
    """Read one result; None where there is none.

    Raises:
        ValueError: When the file is no result, or that of another benchmark than its name says.
    """
    if not path.is_file():
        return None
    try:
        result = load_json(path)
        _check_shape(result, SHAPE, "")
        if result["benchmark"] != path.stem:
            raise ValueError(f"it holds the result of {result['benchmark']}")
    except ValueError as error:  # broken JSON and text among them
        raise ValueError(
            f"{path} is no result of `hovle eval benchmarks` ({error}): delete it, or run that benchmark again."
        ) from error
    return result


def _check_shape(content: Any, shape: dict[str, Any], place: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{place or 'the file'} is no table of names and values")
    for name, kinds in shape.items():
        where = f"{place}.{name}" if place else name
        if name not in content:
            raise ValueError(f"it lacks {where}")
        if isinstance(kinds, dict):
            _check_shape(content[name], kinds, where)
        elif not isinstance(content[name], kinds):
            raise ValueError(f"{where} is {content[name]!r}")


def read_results(folder: Path) -> tuple[dict[str, dict], dict[str, str]]:
    """All results of a folder by benchmark, and by name of file what is wrong with the files that are none."""
    results: dict[str, dict] = {}
    broken: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("."):  # half-written when a run was stopped
            continue
        try:
            result = read_result(path)
        except ValueError as error:
            broken[path.stem] = str(error)
        else:
            results |= {} if result is None else {path.stem: result}
    return results, broken


def compare_answers(folder: Path, other: Path, name: str) -> dict:
    """Compare the answers to a benchmark in two result folders, question by question.

    Returns:
        How many differ, how many questions both answered, and how the other run was made.

    Raises:
        ValueError: When a folder lacks result or answers, or they are broken.
    """
    paths = [each / f"{name}.answers.jsonl" for each in (folder, other)]
    theirs = read_result(other / f"{name}.json")
    lacking = [str(path) for path in paths if not path.is_file()]
    if theirs is None or lacking:
        missing = lacking[0] if lacking else f"{other / name}.json"
        raise ValueError(f"there is no {missing}: both runs must have answered {name}.")
    our_answers, their_answers = map(_answers, paths)
    shared = our_answers.keys() & their_answers.keys()
    return {
        "num_different": sum(our_answers[place] != their_answers[place] for place in shared),
        "num_answers": len(shared),
        "model": theirs["model"]["hash"],
        "dtype": theirs["settings"]["dtype"],
        "batch_size": theirs["settings"]["batch_size"],
        "score": theirs["score"],
    }


def _answers(path: Path) -> dict[Any, str]:
    """Question -> answer from a file of answers."""
    try:
        entries = [parse_json(line, path) for line in path.read_text(encoding="utf-8").splitlines()]
        return {entry["doc_id"]: entry["answer"] for entry in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no whole answers of `hovle eval benchmarks` ({error}): run that benchmark again."
        ) from error


def today() -> str:
    """Date for results, in UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime())
