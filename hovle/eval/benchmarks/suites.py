"""The benchmarks and suites of `suites.yaml`, read and checked."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ...files.documents import load_yaml
from ..intervals import READINGS
from .adaptations import ADAPTATIONS

SUITES_FILE = Path(__file__).with_name("suites.yaml")
TASKS_FOLDER = Path(__file__).with_name("tasks")
"""Tasks of ours in lmms-eval's format: `lmms-eval --include_path` takes this folder."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How one benchmark is run and read; the fields are explained in suites.yaml."""

    name: str
    title: str
    task: str
    metrics: tuple[str, ...] = ()
    """Empty for tasks outside suites.yaml: their first figure is the score then."""
    scale: float = 1.0
    data: str = ""
    units: str = "documents"
    generation: dict[str, Any] = field(default_factory=dict)
    adapt: str | None = None
    judge: dict[str, Any] = field(default_factory=dict)
    key: str | None = None
    """Environment variable that must hold the judge's key."""
    comparable: bool = True
    note: str = ""
    published: dict[str, float] = field(default_factory=dict)

    def judged(self) -> "Benchmark":
        """The variant with the harness's judge, as `judge` says it, or itself where there is none."""
        if not self.judge:
            return self
        changes: dict[str, Any] = {
            name: tuple(value) if name == "metrics" else value for name, value in self.judge.items()
        }
        return replace(self, **{"comparable": True, "judge": {}, **changes})


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Benchmarks that are run together."""

    name: str
    about: str
    benchmarks: tuple[str, ...]
    limit: int | None = None
    """Questions asked of each benchmark; None for all."""
    max_tiles: int | None = None
    """Most tiles of a picture; None for the model's own limit."""


@dataclass(frozen=True)
class Suites:
    """Everything suites.yaml says."""

    models: tuple[str, ...]
    """Models with published scores, in the order of the tables."""
    suites: dict[str, Suite]
    benchmarks: dict[str, Benchmark]

    def suite(self, name: str) -> Suite:
        """Find a suite by name."""
        if name not in self.suites:
            raise ValueError(f"There is no suite named {name!r}; there are {', '.join(self.suites)}.")
        return self.suites[name]

    def benchmark(self, name: str) -> Benchmark:
        """Find a benchmark by name; another name is taken for a task of lmms-eval's, with its own settings."""
        if name in self.benchmarks:
            return self.benchmarks[name]
        note = "no benchmark of ours: the task's first figure, as the harness gives it"
        return Benchmark(name=name, title=name, task=name, units="none", comparable=False, note=note)

    def departures(
        self, name: str, max_tiles: int | None, is_local_copy: bool, judge: dict[str, str] | None = None
    ) -> list[str]:
        """Why a score cannot be laid beside others of the same benchmark.

        Args:
            name: The benchmark; one that is in no suite has nothing to depart from.
            max_tiles: Most tiles of a picture; None for the model's own limit.
            is_local_copy: Whether the data were read from files given by hand.
            judge: Model and service that graded, as `judges.judge_facts` has them; None where nobody does.
        """
        home = next((suite for suite in self.suites.values() if name in suite.benchmarks), None)
        if home is None:
            return []
        is_papers = home.name == "paper"
        reasons = []
        if max_tiles != home.max_tiles:
            whose = "the published scores have" if is_papers else f"the suite {home.name} has"
            usual = "the model's own" if home.max_tiles is None else home.max_tiles
            found = "the model's own limit of tiles" if max_tiles is None else f"at most {max_tiles} tiles"
            reasons.append(f"{found}, {whose} {usual}")
        if is_papers and is_local_copy:
            reasons.append("a local copy of the data, which nobody has compared with the published ones")
        if judge is not None and set(judge.values()) != {"the harness's"}:
            reasons.append("the judge is not the harness's: model {model}, service {service}".format(**judge))
        return reasons

    def chosen(self, suite: str, names: Sequence[str] | None) -> list[Benchmark]:
        """The benchmarks of a suite, or those named."""
        return [self.benchmark(name) for name in (names or self.suite(suite).benchmarks)]


def load_suites(path: Path = SUITES_FILE) -> Suites:
    """Read suites.yaml.

    Raises:
        ValueError: For unknown fields, and for names that mean nothing.
    """
    content = load_yaml(path)
    benchmarks = {name: _benchmark(name, entry, content["models"]) for name, entry in content["benchmarks"].items()}
    suites = {}
    for name, entry in content["suites"].items():
        entry = {**content["settings"], **entry, "benchmarks": tuple(entry["benchmarks"])}
        _refuse_unknown(f"suite {name}", entry, Suite)
        suites[name] = Suite(name=name, **entry)
        if unknown := [one for one in entry["benchmarks"] if one not in benchmarks]:
            raise ValueError(f"suite {name} names {', '.join(unknown)}, which {path.name} does not describe.")
    return Suites(tuple(content["models"]), suites, benchmarks)


def _benchmark(name: str, entry: dict, models: Sequence[str]) -> Benchmark:
    _refuse_unknown(f"benchmark {name}", entry, Benchmark)
    _refuse_unknown(f"judge of {name}", entry.get("judge", {}), Benchmark)
    benchmark = Benchmark(name=name, **{**entry, "metrics": tuple(entry["metrics"])})
    for variant in (benchmark, benchmark.judged()):
        if variant.units not in (*READINGS, "none"):
            raise ValueError(f"benchmark {name}: units ({variant.units}) must be none or of {', '.join(READINGS)}.")
        if variant.adapt not in (None, *ADAPTATIONS):
            raise ValueError(f"benchmark {name}: adapt ({variant.adapt}) must be of {', '.join(ADAPTATIONS)}.")
    if unknown := set(benchmark.published) - set(models):
        raise ValueError(
            f"benchmark {name}: published scores of {', '.join(sorted(unknown))}, unknown under `models`."
        )
    return benchmark


def _refuse_unknown(what: str, entry: dict, kind: type) -> None:
    known = {each.name for each in fields(kind)}
    if unknown := sorted(set(entry) - known):
        raise ValueError(f"{what}: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
