"""Score a model on benchmarks with lmms-eval, beside the paper's published scores.

examples:
  hovle eval benchmarks DIR --suite offline                 easy-VQA, no network; what CI runs
  hovle eval benchmarks DIR --suite paper --batch-size 8    the paper's benchmarks; data come from the Hub
  hovle eval benchmarks DIR --tasks pope mmstar --limit 100
  hovle eval benchmarks DIR --resume                        go on; what is done with the same model is kept
  hovle eval benchmarks DIR --batch-size 1 --output one --compare eval_results/DIR     count answers that differ
  hovle eval benchmarks --list                              suites, benchmarks and what is special about them

The output folder gets one JSON file per benchmark with score, 95 % interval and everything needed to repeat it, the
answers beside it, a results page (README.md), a model card's table and `.eval_results` for the Hub. A benchmark that
cannot be run (no data, no key, no such task) is reported with the reason, the others go on, and the exit code is 1.

Benchmarks that need a judge are read by rules and marked as not comparable; --judge uses the harness's judge instead.
In float32 scores do not depend on the batch size; --compare counts what differs in other number formats. Questions
about the same picture are asked side by side and the picture is read once; results say how many tokens that saved.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ...errors import printable
from ...version import __version__
from .suites import Benchmark, Suites, load_suites

UNSAID = -1
"""Default of --max-tiles: the suite decides."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle eval benchmarks`."""
    parser.add_argument("model", nargs="?", help="model folder or Hub id")
    parser.add_argument("--suite", default="paper", help="paper (default), ocr, quick or offline")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="only these benchmarks, or tasks of lmms-eval")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once (default: 8)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: eval_results/NAME-OF-MODEL")
    parser.add_argument("--resume", action="store_true", help="keep results of the same model and settings")
    parser.add_argument("--judge", action="store_true", help="use the harness's judge (needs OPENAI_API_KEY)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="local copies: NAME/*.parquet for each benchmark")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto, as the checkpoint (default)")
    parser.add_argument("--device", help="such as cuda:1 (default: the first GPU, or the CPU)")
    parser.add_argument(
        "--max-tiles", type=int, default=UNSAID, metavar="N", help="most tiles of a picture (default: the suite's)"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="DIR", help="also count answers that differ from results there"
    )
    parser.add_argument("--list", action="store_true", help="show suites and benchmarks and exit")


def run(args: argparse.Namespace) -> int:
    """Run the benchmarks asked for; exit code 1 when one of them has no result."""
    suites = load_suites()
    if args.list:
        from .report import benchmark_list

        _say(benchmark_list(suites))
        return 0
    plan = Plan(args, suites)
    failures = plan.run()
    return 1 if failures else 0


class Plan:
    """One call of the command.

    Args:
        args: Its options.
        suites: From `load_suites`.

    Raises:
        ValueError: For options that make no sense, before anything is loaded.
    """

    def __init__(self, args: argparse.Namespace, suites: Suites):
        if args.model is None:
            raise ValueError("name a model folder or Hub id (or --list).")
        if args.limit is not None and args.limit < 1:
            raise ValueError(f"--limit ({args.limit}) must be at least 1.")
        if args.max_tiles != UNSAID and args.max_tiles < 1:
            raise ValueError(f"--max-tiles ({args.max_tiles}) must be at least 1; without it the suite decides.")
        if args.data is not None and not args.data.is_dir():
            raise ValueError(f"--data {args.data} is no folder.")
        if args.compare is not None and not args.compare.is_dir():
            raise ValueError(f"--compare {args.compare} is no folder.")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("this command runs in one process; in several, use `lmms-eval --model hovle`.")
        suite = suites.suite(args.suite)
        self.suites, self.args = suites, args
        chosen = suites.chosen(args.suite, args.tasks)
        self.benchmarks = [benchmark.judged() if args.judge else benchmark for benchmark in chosen]
        self.limit = args.limit if args.limit is not None or args.tasks else suite.limit
        self.max_tiles = suite.max_tiles if args.max_tiles == UNSAID else args.max_tiles
        self.output = args.output or Path("eval_results") / model_name(args.model)
        if self.output.resolve() == Path(args.model).resolve():
            raise ValueError(
                f"--output {self.output} is the model's own folder: choose another, its files are hashed."
            )
        self.failures: dict[str, str] = {}
        self._model: Any = None

    def run(self) -> dict[str, str]:
        """Run what has no result yet, write pages, and return the failures: benchmark -> reason."""
        from ...files.model_folder import refuse_missing_folder
        from ..results import hash_model, read_results
        from .harness import task_manager
        from .report import results_table, write_pages

        refuse_missing_folder(self.args.model)
        self.model_hash = hash_model(self.args.model)
        manager = task_manager()
        for benchmark in self.benchmarks:
            self._run_one(benchmark, manager)
        found, broken = read_results(self.output)
        for name, reason in broken.items():
            _say(f"{name}: {reason}")
        self.failures = {**broken, **self.failures}
        results = {name: result for name, result in found.items() if result["model"]["hash"] == self.model_hash}
        if others := sorted(found.keys() - results.keys()):
            _say(f"left out, as they are another model's: the results of {', '.join(others)} in {self.output}.")
        for name in self.failures:
            results.pop(name, None)
        asked = {benchmark.name for benchmark in self.benchmarks}
        not_compared = {} if self.args.compare is None else self._compare(asked & results.keys(), results)
        write_pages(self.output, results, self.suites, self.failures)
        shown = {name: result for name, result in results.items() if name in asked}
        _say(results_table(shown, self.suites, self.failures))
        _say(f"{len(shown)} of {len(asked)} benchmarks have a result; details in {self.output / 'README.md'}.")
        return {**self.failures, **not_compared}

    def _compare(self, names: Iterable[str], results: dict[str, dict]) -> dict[str, str]:
        """Note how many answers differ from those of another run, for instance with another batch size."""
        from ..results import compare_answers, replace_result

        failures = {}
        for name in sorted(names):
            try:
                compared = compare_answers(self.output, self.args.compare, name)
            except ValueError as error:
                failures[name] = str(error)
                _say(f"{name}: {error}")
                continue
            results[name]["compared"] = compared
            replace_result(self.output, results[name])
            counts = "{num_different} of {num_answers} answers differ".format(**compared)
            _say(f"{name}: {counts} ({self.args.compare})")
        return failures

    def _run_one(self, benchmark: Benchmark, manager: Any) -> None:
        from ..results import digest, write_result
        from .harness import BenchmarkError, run_benchmark
        from .judges import judge_facts
        from .scoring import benchmark_facts

        judge = judge_facts() if benchmark.key else None
        settings = self._settings() | ({"judge": judge} if judge else {})
        identity = digest({"model": self.model_hash, "settings": settings, "task": benchmark_facts(benchmark)})
        if self.args.resume and self._is_done(benchmark.name, identity):
            return
        self.output.mkdir(parents=True, exist_ok=True)
        trace = self.output / f"{benchmark.name}.error.txt"
        trace.unlink(missing_ok=True)
        try:
            folder = self.output / "submissions" / benchmark.name
            result, answers = run_benchmark(benchmark, self.model, manager, folder, self.limit, self.args.data)
        except BenchmarkError as error:
            self.failures[benchmark.name] = str(error)
            trace.write_text(traceback.format_exc(), encoding="utf-8")
            _say(f"{benchmark.name}: {error} (details in {trace})")
            return
        reasons = self.suites.departures(benchmark.name, self.max_tiles, self.args.data is not None, judge)
        result["comparable"] = result["comparable"] and not reasons
        result["note"] = "; ".join(part for part in (result["note"], *reasons) if part)
        facts = {"name": model_name(self.args.model), "hash": self.model_hash}
        settings = {**settings, "dtype": str(self.model.model.dtype).removeprefix("torch.")}
        settings["batch_size"] = self.args.batch_size
        write_result(self.output, {**result, "identity": identity, "model": facts, "settings": settings}, answers)
        _say(f"{benchmark.name}: {result['score']:.4g}")

    def _is_done(self, name: str, identity: str) -> bool:
        """Whether an earlier run left this very result; a file that is none is named, and the benchmark run again."""
        from ..results import read_result

        try:
            found = read_result(self.output / f"{name}.json")
        except ValueError as error:
            _say(f"{name}: run again. {error}")
            return False
        if found is None or found["identity"] != identity:
            return False
        _say(f"{name}: kept, {found['score']:.4g} from {found['date']}.")
        return True

    def _settings(self) -> dict[str, Any]:
        """What scores may depend on; in float32 the batch size is not among it."""
        from ...files.fingerprints import fingerprint_files
        from ..results import harness_version
        from .scoring import code_fingerprint

        data = self.args.data
        if data is not None:
            files = sorted(path for path in data.rglob("*") if path.is_file())
            data = f"local copy {fingerprint_files(files, data)}"
        batch_size = {} if self._dtype() == "float32" else {"batch_size": self.args.batch_size}
        return {
            **batch_size,
            "limit": self.limit,
            "max_tiles": "the model's own" if self.max_tiles is None else self.max_tiles,
            "dtype": self.args.dtype,
            "data": data,
            "harness": harness_version(),
            "hovle": __version__,
            "code": code_fingerprint(),
        }

    def _dtype(self) -> str:
        """Number format the model runs in."""
        if self.args.dtype != "auto":
            return self.args.dtype
        content, _ = PreTrainedConfig.get_config_dict(self.args.model)
        return content.get("dtype") or content.get("torch_dtype") or "float32"

    @property
    def model(self):
        """The model, loaded when the first benchmark needs it."""
        from .lmms_eval_plugin import HoVLEChat

        if self._model is None:
            self._model = HoVLEChat(
                self.args.model,
                device=self.args.device,
                dtype=self.args.dtype,
                batch_size=self.args.batch_size,
                max_tiles=self.max_tiles,
                keep_loaded=True,
            )
        return self._model


def model_name(model: str) -> str:
    """A short name for a folder or Hub id; folders called `model` are named by what holds them."""
    parts: Sequence[str] = [part for part in Path(model).absolute().parts if part not in ("model", "/")]
    if Path(model).exists():
        return "-".join(parts[-2:]) if Path(model).absolute().name == "model" else parts[-1]
    return model.replace("/", "--")


def _say(text: str) -> None:
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()
