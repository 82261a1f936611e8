"""What decides a score besides the model and a run's options: our own files, and what suites.yaml says."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...files.fingerprints import fingerprint_files
from .suites import SUITES_FILE, Benchmark

PACKAGE = Path(__file__).parents[2]

NO_PART = ("train", "bench", "recipes")
"""Rooms of the package that no score depends on; a new room is taken to matter."""

SHOWN = ("title", "note", "published", "comparable", "data", "judge", "key")
"""Fields of a benchmark that are only shown."""


def code_fingerprint(package: Path = PACKAGE) -> str:
    """Short hash of names and contents of all files that have a part in scores.

    suites.yaml is none of them, for most of it is only shown: `benchmark_facts` gives what decides.

    Args:
        package: The folder of `hovle`, or of a copy.
    """
    left_out = {package / name for name in NO_PART} | {package / SUITES_FILE.relative_to(PACKAGE)}
    files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return fingerprint_files(sorted(path for path in files if left_out.isdisjoint([path, *path.parents])), package)


def benchmark_facts(benchmark: Benchmark) -> dict[str, Any]:
    """What suites.yaml says of a benchmark, without what is only shown."""
    return {name: value for name, value in asdict(benchmark).items() if name not in SHOWN}
