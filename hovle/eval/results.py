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

from .. import __version__
from ..checkpoint_files import local_folder
from ..machine import processor_name
from ..requirements import installed_version

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


def harness_version() -> str:
    """Version of lmms-eval."""
    return importlib.metadata.version("lmms-eval")


def write_result(folder: Path, result: dict, answers: Iterable[dict]) -> None:
    """Write answers, then the result; a result in place means both are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    name = result["benchmark"]
    lines = (json.dumps(answer, ensure_ascii=False, default=str) + "\n" for answer in answers)
    _replace(folder / f"{name}.answers.jsonl", "".join(lines))
    _replace(folder / f"{name}.json", json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n")


def _replace(path: Path, text: str) -> None:
    """A file is never seen half-written."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_result(path: Path) -> dict | None:
    """Read one result; None where there is none.

    Raises:
        ValueError: When the file is no result.
    """
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        result["benchmark"], result["score"], result["identity"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of `hovle eval benchmarks` ({error}); delete or move it.") from error
    return result


def read_results(folder: Path) -> dict[str, dict]:
    """All results of a folder by benchmark."""
    found = [read_result(path) for path in sorted(folder.glob("*.json")) if not path.name.startswith(".")]
    return {result["benchmark"]: result for result in found if result is not None}


def disagreements(folder: Path, other: Path, name: str) -> tuple[int, int] | None:
    """Compare the answers to a benchmark in two result folders, question by question.

    Returns:
        How many differ, and how many questions both answered; None when one of them has none.
    """
    paths = [each / f"{name}.answers.jsonl" for each in (folder, other)]
    if not all(path.is_file() for path in paths):
        return None
    ours, theirs = (
        {entry["doc_id"]: entry["answer"] for entry in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
        for path in paths
    )
    shared = ours.keys() & theirs.keys()
    return sum(ours[place] != theirs[place] for place in shared), len(shared)


def today() -> str:
    """Date for results, in UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime())
