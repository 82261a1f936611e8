"""Pages made from result files: a results page, the table of a model card, `.eval_results` for the Hub."""

from collections.abc import Mapping
from pathlib import Path

from .suites import Benchmark, Suites

NOT_PUBLISHED = "not published"


def number(value: float) -> str:
    """One decimal below a thousand, none above, where scores are points."""
    return f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def score_text(result: dict) -> str:
    """Score, 95 % interval, and a mark where it must not be laid beside published ones."""
    interval = result["interval"]
    spread = "" if interval is None else f" ({number(interval[0])} to {number(interval[1])})"
    return f"{number(result['score'])}{spread}{'' if result['comparable'] else ' *'}"


def results_table(results: Mapping[str, dict], suites: Suites, failures: Mapping[str, str] | None = None) -> str:
    """Ours beside the published scores, one row per benchmark that was run or failed.

    Args:
        results: By benchmark, as written by `hovle eval benchmarks`.
        suites: Gives order and published scores.
        failures: By benchmark, why it has no result.
    """
    failures = failures or {}
    order = [*suites.benchmarks, *results, *failures]
    names = [name for name in dict.fromkeys(order) if name in results or name in failures]
    published_by = [model for model in suites.models if any(_published(suites, name) for name in names)]
    lines = [
        "| " + " | ".join(["benchmark", "questions", "this model (95 % interval)", *published_by]) + " |",
        "|" + "---|" * (3 + len(published_by)),
    ]
    for name in names:
        benchmark = suites.benchmark(name)
        ours = ["", f"not run: {failures[name]}"] if name in failures else _own_cells(results[name])
        theirs = [published_text(benchmark.published.get(model)) for model in published_by]
        lines.append("| " + " | ".join([benchmark.title, *ours, *theirs]) + " |")
    return "\n".join(lines)


def _published(suites: Suites, name: str) -> dict:
    return suites.benchmark(name).published


def _own_cells(result: dict) -> list[str]:
    return [f"{result['num_questions']:,}", score_text(result)]


def published_text(value: float | None) -> str:
    """A published score as papers print it: points of 1000 whole, percentages with one decimal."""
    if value is None:
        return NOT_PUBLISHED
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def notes(results: Mapping[str, dict]) -> str:
    """One line per benchmark that has something to say, and what the star means."""
    lines = [f"- {result['title']}: {'; '.join(_remarks(result))}." for result in results.values() if _remarks(result)]
    if any(not result["comparable"] for result in results.values()):
        lines.insert(0, "\\* not comparable with published scores, for the reason given here.\n")
    return "\n".join(lines)


def _remarks(result: dict) -> list[str]:
    remarks = [result["note"]] if result["note"] else []
    if result["limit"] is not None:
        remarks.append(f"only the first {result['num_questions']} questions")
    if "compared" in result:
        remarks.append(_comparison(result["compared"], result))
    return remarks


def _comparison(other: dict, result: dict) -> str:
    """How the answers differ from another run's."""
    ways = [f"in {each['dtype']}, {each['batch_size']} at once" for each in (result["settings"], other)]
    model = "" if other["model"] == result["model"]["hash"] else " by another model"
    return (
        f"{other['num_different']:,} of {other['num_answers']:,} answers {ways[0]} differ from those {ways[1]}{model} "
        f"(score {other['score']:.1f})"
    )


def results_page(results: Mapping[str, dict], suites: Suites, failures: Mapping[str, str]) -> str:
    """A page in Markdown with the table, its remarks, and how to repeat it."""
    parts = ["# Results", results_table(results, suites, failures), notes(results)]
    if results:
        facts = list(results.values())
        parts.append("\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in _facts(facts))]))
    if failures:
        parts.append("Not run:\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in failures.items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(results: list[dict]) -> list[tuple[str, str]]:
    """What all results share, and what differs between them."""

    def seen(*keys: str) -> str:
        values = []
        for result in results:
            value: object = result
            for key in keys:
                value = value[key]  # type: ignore[index]
            values.append(str(value))
        return ", ".join(dict.fromkeys(values))

    return [
        ("model", f"{seen('model', 'name')} (hash {seen('model', 'hash')})"),
        ("number format", seen("settings", "dtype")),
        ("most tiles of a picture", seen("settings", "max_tiles")),
        ("harness", f"lmms-eval {seen('harness', 'lmms-eval')}"),
        (
            "hovle, torch, transformers",
            ", ".join(seen("environment", name) for name in ("hovle", "torch", "transformers")),
        ),
        ("device", seen("environment", "device")),
        ("date", seen("date")),
    ]


def eval_result_files(results: Mapping[str, dict]) -> dict[str, str]:
    """Files for the folder `.eval_results` of a Hub repository: name -> YAML, one per data set.

    Scores that are not comparable, and those of data that are no data set of the Hub, are left out.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries: dict[str, list[EvalResultEntry]] = {}
    for result in results.values():
        data = result["data"]
        if not result["comparable"] or data["is_local_copy"] or data["name"].count("/") != 1:
            continue
        entry = EvalResultEntry(
            dataset_id=data["name"],
            task_id=result["task"],
            value=round(result["score"], 2),
            dataset_revision=data["revision"],
            date=result["date"],
            notes=entry_notes(result),
        )
        entries.setdefault(data["name"].replace("/", "--"), []).append(entry)
    return {f"{name}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(each)) for name, each in entries.items()}


def entry_notes(result: dict) -> str:
    """What a reader of one score needs: harness, prompts, data, number format, interval."""
    interval = result["interval"]
    parts = [
        f"lmms-eval {result['harness']['lmms-eval']} task {result['task']}",
        f"prompts {result['prompt_hash']}",
        f"data texts {result['data']['text_hash']}",
        f"model {result['model']['hash']}",
        result["settings"]["dtype"],
        f"max tiles {result['settings']['max_tiles']}",
        f"{result['num_questions']} questions",
        "" if interval is None else f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}",
        result["note"],
    ]
    return "; ".join(part for part in parts if part)


def model_card(results: Mapping[str, dict], suites: Suites) -> str:
    """The start of a Hub model card: its header and the results; what the model is for is for people to write."""
    from huggingface_hub import ModelCardData

    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["hovle", "vision", "monolithic", "encoder-free", "custom_code"],
    )
    name = next(iter(results.values()))["model"]["name"]
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {name}",
        "## Results",
        results_table(results, suites),
        notes(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_pages(folder: Path, results: Mapping[str, dict], suites: Suites, failures: Mapping[str, str]) -> None:
    """Write `README.md`, and where there are results `model_card.md` and `.eval_results/*.yaml`, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # What an earlier run wrote may be of results that are gone.
    for stale in (folder / "model_card.md", *(folder / ".eval_results").glob("*.yaml")):
        stale.unlink(missing_ok=True)
    (folder / "README.md").write_text(results_page(results, suites, failures), encoding="utf-8")
    if results:
        (folder / "model_card.md").write_text(model_card(results, suites), encoding="utf-8")
    for name, text in eval_result_files(results).items():
        (folder / ".eval_results").mkdir(exist_ok=True)
        (folder / ".eval_results" / name).write_text(text, encoding="utf-8")


def benchmark_list(suites: Suites) -> str:
    """Suites and benchmarks as text, for `--list`."""

    def line(benchmark: Benchmark) -> str:
        return f"    {benchmark.name:<18} {benchmark.title}{f': {benchmark.note}' if benchmark.note else ''}"

    lines = []
    for suite in suites.suites.values():
        lines += [f"{suite.name}: {suite.about}", *(line(suites.benchmark(name)) for name in suite.benchmarks)]
    return "\n".join(lines)
