"""Write the measured figures into the documents: `python eval/tables.py` (or `--check` to only compare).

A document marks a table with `<!-- table: NAME -->` and `<!-- end -->`, a figure in running text with
`<!-- value: NAME -->` and `<!-- end -->`; what stands between is generated from the result files below eval/results,
never typed.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hovle.assets import load_manifest
from hovle.assets.cache import megabytes
from hovle.assets.manifest import DEFAULT_GROUP, find_assets
from hovle.demo.questions import FOLDER, QUESTIONS
from hovle.eval.analyses import retention_report
from hovle.eval.benchmarks.report import notes, published_text, results_table
from hovle.eval.benchmarks.suites import load_suites
from hovle.eval.results import read_results
from hovle.files.documents import load_json

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "eval/README.md", "hovle/assets/README.md", "model_cards/demo.md")

SCORES = ("accuracy", "blank_pictures", "shuffled_pictures", "accuracy_unbalanced", "blank_pictures_unbalanced")


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a row of heads."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def demo_table(root: Path) -> str:
    """Scores of the demo, one row per stage."""
    report = _read(root, "eval/results/demo/report.json")
    trained = {
        "distillation": "stem, holistic layers",
        "alignment": "stem, holistic layers; LLM frozen",
        "instruction_tuning": "everything",
    }
    exact = f"exact match on {report['num_questions']} balanced questions"
    heads = ["stage", "trains", "steps", "duration", "tokens", "cosine to the teacher", exact, "blank", "shuffled"]
    rows = []
    for stage, what in trained.items():
        facts = report["stages"][stage]
        cosine = facts.get("teacher_cosine")
        rows.append(
            [
                stage.replace("_", " "),
                what,
                str(facts["steps"]),
                f"{facts['seconds'] / 60:.1f} min",
                f"{facts['tokens']:,}",
                f"{cosine['before']:.2f} → {cosine['after']:.2f}" if cosine else "",
                *(percent(facts.get(name)) for name in SCORES),
            ]
        )
    return markdown([*heads, "as they come", "blank"], rows)


def percent(share: float | None) -> str:
    """A share as a percentage, or nothing."""
    return "" if share is None else f"{share:.1%}"


def data_speed_table(root: Path) -> str:
    """Routes from picture file to tiles, one row each."""
    result = _read(root, "eval/results/speed/data.json")
    medians = result["median_pictures_per_second"]
    rows = [[route, f"{rate:.0f}", f"{medians[route]:.0f}"] for route, rate in result["pictures_per_second"].items()]
    return markdown(["route", "pictures/s on one thread", "median"], rows)


def train_speed_table(root: Path) -> str:
    """Variants of training on the same samples, one row each."""
    mixes = _read(root, "eval/results/speed/train.json")["mixes"]
    columns = ("supervised tokens/s", "x Trainer", "padding", "nats/token")
    rows = []
    for variants in zip(*(mix["variants"] for mix in mixes.values()), strict=True):
        cells = [variants[0]["name"]]
        for variant, mix in zip(variants, mixes.values(), strict=True):
            rate, base = (item["supervised_tokens_per_second"] for item in (variant, mix["variants"][-1]))
            cells += [f"{rate:.1f}", f"{rate / base:.2f}", percent(variant["padding_ratio"])]
            cells.append(f"{variant['nats_per_token']:.3f}")
        rows.append(cells)
    return markdown(["variant", *(f"{mix}: {column}" for mix in mixes for column in columns)], rows)


def step_table(root: Path) -> str:
    """What a training step of each stage takes, and what its matrix products alone would."""
    heads = ["stage", "seconds a step", "of them teacher", "its matrix products alone", "peak at their shapes"]
    rows = [
        [
            stage,
            f"{step['seconds']:.2f}",
            f"{step['teacher_seconds']:.2f}",
            f"{step['matrix_products_alone_seconds']:.2f}",
            f"{step['peak_tflops']:.2f} TFLOP/s",
            f"{step['mfu']:.0%}",
            f"{step['tokens_per_second']:.0f}",
        ]
        for stage, step in _read(root, "eval/results/speed/train.json")["steps"].items()
    ]
    return markdown([*heads, "MFU", "tokens/s"], rows)


def retention_table(root: Path) -> str:
    """The bare language model and each stage of the demo on text."""
    return retention_report.table(_read(root, RETENTION))


def retention_answers_table(root: Path) -> str:
    """What the bare language model and the demo's last stage answer to the same questions."""
    return retention_report.answers_table(_read(root, RETENTION))


RETENTION = "eval/results/analyses/retention/retention.json"


def kept_language(root: Path) -> str:
    """The worst of the last stage's perplexities over the bare language model's."""
    last = _read(root, RETENTION)["models"][-1]
    return f"{max(text['ratio'] for text in last['texts'].values()):.3f}"


def language_price_table(root: Path) -> str:
    """What a step takes that holds the language and one that does not."""
    rows = [
        [stage, f"{took['free']:.2f} s", f"{took['held']:.2f} s", f"{took['ratio']:.2f}"]
        for stage, took in _read(root, "eval/results/demo/language_price.json").items()
    ]
    return markdown(["stage", "a step on pictures alone", "with the language held", "ratio"], rows)


def _read(root: Path, name: str) -> dict:
    try:
        return json.loads((root / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be read ({error})") from error


def benchmarks_table(root: Path) -> str:
    """Results of every model below eval/results/benchmarks, beside the published scores."""
    suites = load_suites()
    parts = []
    for folder in sorted((root / "eval/results/benchmarks").glob("*/")):
        results, broken = read_results(folder)
        if broken:
            raise ValueError("; ".join(broken.values()))
        parts += [f"**{folder.name}**", results_table(results, suites), notes(results)]
    return "\n\n".join(parts) or "No result of a benchmark is kept here yet."


def paper_suite_table(_: Path) -> str:
    """What `hovle eval benchmarks --suite paper` runs, and what is published."""
    suites = load_suites()
    rows = []
    for name in suites.suite("paper").benchmarks:
        benchmark = suites.benchmark(name)
        published = [published_text(benchmark.published.get(model)) for model in suites.models]
        remark = benchmark.note if benchmark.comparable else f"not comparable: {benchmark.note}"
        rows.append([benchmark.title, f"`{benchmark.task}`", *published, remark])
    return markdown(["benchmark", "task of lmms-eval", *suites.models, ""], rows)


def assets_table(_: Path) -> str:
    """What `hovle fetch` brings."""
    rows = [
        [
            f"`{asset.name}`",
            asset.description,
            asset.licence,
            f"{asset.archive.registry}: `{asset.archive.package}` {asset.archive.version}",
            megabytes(asset.archive.size),
            ", ".join(asset.groups),
        ]
        for asset in load_manifest().values()
    ]
    return markdown(["name", "what", "licence", "from", "download", "groups"], rows)


def notice() -> str:
    """The file NOTICE: whose work pictures of the package show, and whose work `hovle fetch` brings."""
    parts = [NOTICE_HEAD, *map(picture_notice, load_json(FOLDER / QUESTIONS)["pictures"]), NOTICE_FETCHED]
    for asset in load_manifest().values():
        archive = asset.archive
        lines = [f"{asset.name}: {asset.description}", asset.attribution, f"Licence: {asset.licence}"]
        lines += [
            f"From: {archive.registry} package {archive.package} {archive.version}, {archive.url}",
            asset.homepage,
        ]
        parts.append("\n  ".join(lines))
    return "\n\n".join(parts) + "\n"


def picture_notice(row: dict) -> str:
    """Whose work a picture of `hovle demo` shows."""
    lines = [f"hovle/demo/pictures/{row['file']}"]
    for source in row["sources"]:
        lines += [source["attribution"], f"Licence: {source['license']}", source["homepage"]]
    return "\n  ".join(lines if row["sources"] else [*lines, "drawn by hovle alone"])


NOTICE_HEAD = """hovle
Licensed under the Apache License, Version 2.0 (see LICENSE).

Pictures of this package show works of others, scaled, turned, colored, lit or put on a ground. What their licences say
lies beside them (hovle/demo/pictures/LICENSES). These lists are made by `make tables`."""

NOTICE_FETCHED = """None of the works below is part of this package. `hovle fetch` downloads them from package
registries, each in the version and with the hash that hovle/assets/manifest.json pins; their licences lie beside the
unpacked files."""

GENERATED: dict[str, Callable[[], str]] = {"NOTICE": notice}
"""Files that are written as a whole."""

TABLES = {
    "assets": assets_table,
    "demo": demo_table,
    "data_speed": data_speed_table,
    "train_speed": train_speed_table,
    "steps": step_table,
    "retention": retention_table,
    "retention_answers": retention_answers_table,
    "language_price": language_price_table,
    "benchmarks": benchmarks_table,
    "paper_suite": paper_suite_table,
}


def _of_questions(name: str) -> Callable[[Path], float]:
    return lambda root: _read(root, "eval/results/demo/questions.json")[name]


def demo_minutes(root: Path) -> str:
    """How long training and scoring took."""
    report = _read(root, "eval/results/demo/report.json")
    seconds = sum(stage["seconds"] for stage in report["stages"].values()) + report["scoring_seconds"]
    return f"{seconds / 60:.0f}"


def demo_minutes_alone(root: Path) -> str:
    """What the demo's steps take where nothing else runs, as they were timed for the price of holding the language."""
    stages = _read(root, "eval/results/demo/report.json")["stages"]
    price = _read(root, "eval/results/demo/language_price.json")
    return f"{sum(facts['steps'] * price[stage]['held'] for stage, facts in stages.items()) / 60:.0f}"


def demo_processor(root: Path) -> str:
    """What the demo ran on."""
    stages = _read(root, "eval/results/demo/report.json")["stages"].values()
    (found,) = {(stage["environment"]["num_threads"], stage["environment"]["processor"]) for stage in stages}
    return f"{found[0]} threads of an {found[1]}"


VALUES: dict[str, Callable[[Path], str]] = {
    "demo_minutes": demo_minutes,
    "demo_minutes_alone": demo_minutes_alone,
    "demo_processor": demo_processor,
    "kept_language": kept_language,
    "yes_no_share": lambda root: f"{_of_questions('yes_no_share')(root):.0%}",
    "guessed_share": lambda root: f"{_of_questions('guessed_share')(root):.0%}",
    **{
        name: lambda root, name=name: f"{_of_questions(name)(root):,}"
        for name in ("train_pictures", "train_questions", "test_pictures")
    },
    "fetched_megabytes": lambda _: f"{sum(asset.archive.size for asset in find_assets([DEFAULT_GROUP])) / 1e6:.0f}",
}


def fill(text: str, root: Path) -> tuple[str, list[str]]:
    """Replace what stands between the markers of every table and figure.

    Returns:
        The text, and why which tables were left as they are.
    """
    errors = []

    def filled(match: re.Match) -> str:
        kind, name = match[2], match[3]
        try:
            made = f"\n{TABLES[name](root)}\n" if kind == "table" else VALUES[name](root)
            return f"{match[1]}{made}{match[4]}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"its result file lacks something: {error!r}"
            errors.append(f"{kind} {name}: {reason}")
            return match[0]

    marks = r"(<!-- (table|value): (\w+) -->).*?(<!-- end -->)"
    return re.sub(marks, filled, text, flags=re.DOTALL), errors


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Fill or check every document; return 1 when a checked one is stale, or a table cannot be made."""
    stale, errors = [], []
    for name in (*DOCUMENTS, *GENERATED):
        path = root / name
        text = path.read_text(encoding="utf-8")
        filled, found = (GENERATED[name](), []) if name in GENERATED else fill(text, root)
        errors += [f"{name}: {error}" for error in found]
        if filled == text:
            continue
        stale.append(name)
        if "--check" not in arguments:
            path.write_text(filled, encoding="utf-8")
    if stale:
        sys.stdout.write(f"{'stale' if '--check' in arguments else 'updated'}: {', '.join(stale)}\n")
    sys.stderr.write("".join(f"{error}\n" for error in errors))
    return 1 if errors or (stale and "--check" in arguments) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
