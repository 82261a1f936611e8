"""Write the measured figures into the documents: `python eval/tables.py` (or `--check` to only compare).

A document marks a table with `<!-- table: NAME -->` and `<!-- end -->`; what stands between is generated from the
result files below eval/results, never typed.
"""

import json
import re
import sys
from pathlib import Path

from hovle.eval.benchmark_report import notes, published_text, results_table
from hovle.eval.results import read_results
from hovle.eval.suites import load_suites

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "eval/README.md", "model_cards/demo.md")

SCORES = ("accuracy", "blank_pictures", "shuffled_pictures", "accuracy_unbalanced", "blank_pictures_unbalanced")


def demo_table(root: Path) -> str:
    """Scores of the demo, one row per stage."""
    report = json.loads((root / "eval/results/demo/report.json").read_text())
    stages = report["stages"]
    trained = {
        "distillation": "stem, holistic layers",
        "alignment": "stem, holistic layers; LLM frozen",
        "instruction_tuning": "everything",
    }
    lines = [
        f"| stage | trains | duration | tokens | cosine to the teacher | exact match on {report['num_questions']} "
        "balanced questions | blank | shuffled | as they come | blank |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for stage, what in trained.items():
        facts = stages[stage]
        cosine = facts.get("teacher_cosine")
        lines.append(
            f"| {stage.replace('_', ' ')} | {what} | {facts['seconds'] / 60:.1f} min | {facts['tokens']:,} | "
            + (f"{cosine['before']:.2f} → {cosine['after']:.2f}" if cosine else "")
            + " | "
            + " | ".join(percent(facts.get(name)) for name in SCORES)
            + " |"
        )
    return "\n".join(lines)


def percent(share: float | None) -> str:
    """A share as a percentage, or nothing."""
    return "" if share is None else f"{share:.1%}"


def data_speed_table(root: Path) -> str:
    """Routes from picture file to tiles, one row each."""
    result = json.loads((root / "eval/results/speed/data.json").read_text())
    lines = ["| route | pictures/s on one thread | median |", "|---|---|---|"]
    lines += [
        f"| {route} | {rate:.0f} | {result['median_pictures_per_second'][route]:.0f} |"
        for route, rate in result["pictures_per_second"].items()
    ]
    return "\n".join(lines)


def benchmarks_table(root: Path) -> str:
    """Results of every model below eval/results/benchmarks, beside the published scores."""
    suites = load_suites()
    parts = []
    for folder in sorted((root / "eval/results/benchmarks").glob("*/")):
        results = read_results(folder)
        parts += [f"**{folder.name}**", results_table(results, suites), notes(results)]
    return "\n\n".join(parts) or "No result of a benchmark is kept here yet."


def paper_suite_table(_: Path) -> str:
    """What `hovle eval benchmarks --suite paper` runs, and what is published."""
    suites = load_suites()
    lines = [
        f"| benchmark | task of lmms-eval | {' | '.join(suites.models)} | |",
        "|---|---|" + "---|" * (len(suites.models) + 1),
    ]
    for name in suites.suite("paper").benchmarks:
        benchmark = suites.benchmark(name)
        published = [published_text(benchmark.published.get(model)) for model in suites.models]
        remark = benchmark.note if benchmark.comparable else f"not comparable: {benchmark.note}"
        lines.append(f"| {benchmark.title} | `{benchmark.task}` | {' | '.join(published)} | {remark} |")
    return "\n".join(lines)


TABLES = {
    "demo": demo_table,
    "data_speed": data_speed_table,
    "benchmarks": benchmarks_table,
    "paper_suite": paper_suite_table,
}


def fill(text: str, root: Path) -> str:
    """Replace what stands between the markers of every table."""

    def table(match: re.Match) -> str:
        return f"{match[1]}\n{TABLES[match[2]](root)}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->).*?(<!-- end -->)", table, text, flags=re.DOTALL)


def main(arguments: list[str]) -> int:
    """Fill or check every document; return 1 when a checked one is stale."""
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text()
        filled = fill(text, ROOT)
        if filled == text:
            continue
        stale.append(name)
        if "--check" not in arguments:
            path.write_text(filled)
    if stale:
        sys.stdout.write(f"{'stale' if '--check' in arguments else 'updated'}: {', '.join(stale)}\n")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
