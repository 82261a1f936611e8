"""Show how training runs went: curves and one page of figures, written into each run folder.

examples:
  hovle train report runs/demo/alignment           writes report.png and report.md there
  hovle train report runs/demo/*                   the same for several runs

A run that still goes on, or was interrupted, is shown as far as its log reaches.
"""

import argparse
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ...charts import load_pyplot
from ...files.documents import UnreadableError, load_yaml, parse_json

SPEED = ("tokens_per_second", "samples_per_second")
SHARES = ("mfu", "teacher_ratio", "data_wait_ratio", "padding_ratio")
HELD = ("text_error", "prompt_error", "language_kl", "prompt_kl")
"""Terms that hold the language, drawn by themselves."""

NOT_TERMS = re.compile(
    "time|step|event|loss|learning_rate|elapsed_seconds|image_norm_ratio|(gradient_norm|samples)_?.*"
)
"""Fields of a step's log line that are no terms of the loss; rates and shares neither."""

SETTINGS = (
    "output",
    "trainable",
    "num_steps",
    "gradient_accumulation_steps",
    "rows_per_batch",
    "row_length",
    "learning_rate",
    "seed",
)
"""Recipe fields on the page, beside where the model starts, objective and data."""

RENAMED = {"reply_nats": "cross_entropy", "gemm_peak_ratio": "mfu", "blind_check": "image_ablation"}
"""What earlier versions called fields and events of a log -> their names now."""

MACHINE = ("device", "num_processes", "num_threads", "dtype", "compiled", "gemm_peak_tflops", "torch", "commit")
"""Fields of the start entry on the page."""


@dataclass
class Run:
    """A run folder's recipe and log."""

    folder: Path
    recipe: dict
    entries: list[dict] = field(default_factory=list)
    """Log lines that count: after resuming, what an interrupted attempt did beyond its checkpoint is left out."""
    remarks: list[str] = field(default_factory=list)
    """What a reader should know about the log itself."""

    @property
    def steps(self) -> list[dict]:
        """Log lines of steps."""
        return [entry for entry in self.entries if "event" not in entry]

    def events(self, name: str) -> list[dict]:
        """Log lines of one kind of event."""
        return [entry for entry in self.entries if entry.get("event") == name]


@dataclass
class Panel:
    """One chart: curves over the steps."""

    title: str
    curves: dict[str, list[tuple[int, float]]]
    is_logarithmic: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle train report`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, with log.jsonl and recipe.yaml")


def run(args: argparse.Namespace) -> int:
    """Write the reports."""
    pyplot = load_pyplot()
    for folder in args.runs:
        shown = read_run(folder)
        draw(pyplot, shown, folder / "report.png")
        (folder / "report.md").write_text(summarize(shown), encoding="utf-8")
        print(f"{state(shown)}\nReport: {folder / 'report.md'}, {folder / 'report.png'}")  # noqa: T201 - the output
    return 0


def read_run(folder: Path) -> Run:
    """Read a run folder; ValueError unless it holds a recipe and a log with a step or a validation."""
    missing = [name for name in ("recipe.yaml", "log.jsonl") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no run folder: it holds no {' and no '.join(missing)}.")
    shown = Run(folder, load_yaml(folder / "recipe.yaml"))
    for number, line in enumerate((folder / "log.jsonl").read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = parse_json(line, f"line {number} of log.jsonl")
        except UnreadableError:
            shown.remarks.append(f"Line {number} of log.jsonl is cut off, as when a run is killed; it is left out.")
            continue
        check_names(entry, folder / "log.jsonl")
        if entry.get("event") == "start" and entry["step"]:
            shown.entries = [old for old in shown.entries if old["step"] <= entry["step"]]
            shown.remarks.append(f"Resumed after step {entry['step']}.")
        shown.entries.append(entry)
    if not shown.steps and not shown.events("validation"):
        raise ValueError(f"{folder / 'log.jsonl'} holds no step yet: ask again after the first log line.")
    return shown


def check_names(entry: dict, log: Path) -> None:
    """Raise ValueError for a log line that calls something by a name it no longer has."""
    if old := RENAMED.keys() & {*entry, entry.get("event")}:
        renamed = ", ".join(f"{name} is now {RENAMED[name]}" for name in sorted(old))
        script = "; ".join(f's/"{name}"/"{new}"/g' for name, new in RENAMED.items())
        raise ValueError(
            f"{log} was written by an earlier version, in which names differ: {renamed}. Rename them once with "
            f"`sed -i '{script}' {log}`; the figures are the same."
        )


def state(shown: Run) -> str:
    """How far a run has come, in a line."""
    reached, wanted = max(entry["step"] for entry in shown.entries), shown.recipe["num_steps"]
    minutes = sum(entry["elapsed_seconds"] for entry in shown.steps) / 60
    steps = f"{reached} of {wanted} steps in {minutes:.1f} minutes of training"
    if shown.events("finish"):
        return f"Finished: {steps}."
    last = time.strftime("%Y-%m-%d %H:%M", time.gmtime(shown.entries[-1]["time"]))
    return f"Not finished, either running or interrupted: {steps}; last log line at {last} UTC."


def warnings_of(shown: Run) -> list[str]:
    """What the run warned of, and what it could not have warned of."""
    found = [f"After step {entry['step']}: {entry['message']}" for entry in shown.events("warning")]
    if (
        shown.recipe["objective"]["name"] == "next_token"
        and shown.events("finish")
        and not shown.events("image_ablation")
    ):
        reason = "image_ablation is off" if shown.events("validation") else "there is no validation source"
        found.append(f"Whether the pictures matter was not measured: {reason}.")
    for entry in shown.events("image_ablation")[-1:]:
        if not entry["num_pictures"]:
            found.append("Whether the pictures matter could not be measured: no held-out reply follows a picture.")
        elif entry["num_shuffled"] < entry["num_pictures"]:
            found.append(
                f"Only {entry['num_shuffled']} of {entry['num_pictures']} held-out pictures could be shuffled: the "
                "others have no different one to change places with."
            )
    for reason, count in (shown.steps[-1].get("samples_skipped", {}) if shown.steps else {}).items():
        found.append(f"{count:,} of {shown.steps[-1]['samples_drawn']:,} samples were skipped: {reason}.")
    if num_empty := sum(entry.get("steps_without_loss", 0) for entry in shown.steps):
        found.append(f"{num_empty:,} steps held nothing to learn from and left the weights as they were.")
    return found + shown.remarks


def summarize(shown: Run) -> str:
    """The page, in Markdown."""
    parts = [f"# {shown.folder.name}", state(shown)]
    if warnings := warnings_of(shown):
        parts += ["## Warnings", "\n".join(f"- {warning}" for warning in warnings)]
    parts += ["## Result", table(("", "first", "last"), result_rows(shown))]
    if shown.steps:
        parts += ["## Speed", table(("", "mean"), speed_rows(shown.steps))]
    recipe = shown.recipe
    sources = recipe["data"] if isinstance(recipe["data"], list) else [recipe["data"]]
    start = recipe["model"]["checkpoint"] or recipe["model"]["language_model"]
    settings = [
        ("model", start),
        ("objective", recipe["objective"]["name"]),
        ("data", [data["source"] for data in sources]),
    ]
    settings += [(name, recipe[name]) for name in SETTINGS]
    machine = shown.events("start")[-1:] or [{}]
    settings += [(name, machine[0][name]) for name in MACHINE if name in machine[0]]
    parts += ["## Settings and machine", table(("", ""), [(name, _text(value)) for name, value in settings])]
    parts += ["## Curves", "![curves](report.png)"]
    return "\n\n".join(parts) + "\n"


def result_rows(shown: Run) -> list[tuple[str, str, str]]:
    """First and last value of what tells whether the run learnt."""
    rows = []
    for title, entries, names in (
        ("training", shown.steps, ("loss", "gradient_norm", "image_norm_ratio")),
        ("validation", shown.events("validation"), None),
        ("pictures", shown.events("image_ablation"), ("true_nats", "blank_gap", "shuffled_gap")),
        ("text", shown.events("text_retention"), ("text_perplexity", "bare_perplexity", "perplexity_ratio")),
    ):
        if entries:
            chosen = names or [name for name in entries[-1] if name not in ("time", "step", "event")]
            first, last = entries[0], entries[-1]
            rows += [
                (f"{title}: {name}", _text(first.get(name, "")), _text(last[name])) for name in chosen if name in last
            ]
    return rows


def speed_rows(steps: list[dict]) -> list[tuple[str, str]]:
    """Rates and shares over the whole run, by the time they were measured over."""
    seconds = sum(entry["elapsed_seconds"] for entry in steps) or 1.0
    rows = []
    for name in (*SPEED, *SHARES):
        known = [entry for entry in steps if name in entry]
        if known:
            mean = sum(entry[name] * entry["elapsed_seconds"] for entry in known) / seconds
            rows.append((name, f"{mean:,.1f}" if name in SPEED else f"{mean:.1%}"))
    return rows


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(list(head)), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def panels(shown: Run) -> list[Panel]:
    """The charts that this run has figures for."""
    steps = shown.steps
    norms = sorted({name for entry in steps for name in entry if name.startswith("gradient_norm")})
    terms = measured_terms(steps)
    held_out = shown.events("validation")
    held_text = curves(steps, HELD)
    held_text |= {f"{name}, held out": points for name, points in curves(held_out, HELD).items()}
    drawn = [
        Panel("loss", curves(steps, ["loss"])),
        Panel("terms", curves(steps, terms)),
        Panel("gradient norm", curves(steps, norms), is_logarithmic=True),
        Panel("learning rate", curves(steps, ["learning_rate"])),
        Panel("tokens per second", curves(steps, ["tokens_per_second"])),
        Panel("shares of time, peak and rows", curves(steps, SHARES)),
        Panel("length of picture outputs over text embeddings", curves(steps, ["image_norm_ratio"])),
        Panel("validation", curves(held_out, measured_terms(held_out))),
        Panel(
            "held-out loss by picture",
            curves(shown.events("image_ablation"), ["true_nats", "blank_nats", "shuffled_nats"]),
        ),
        Panel("distance of text from the bare language model", held_text, is_logarithmic=True),
        Panel("perplexity over the bare language model's, held-out text", curves(held_out, ["perplexity_ratio"])),
        Panel("perplexity on text", curves(shown.events("text_retention"), ["text_perplexity", "bare_perplexity"])),
    ]
    return [panel for panel in drawn if panel.curves]


def measured_terms(entries: list[dict]) -> list[str]:
    """Names of the loss terms that log lines have, but for those that have a chart of their own."""
    names = {name for entry in entries for name in entry if not NOT_TERMS.fullmatch(name)}
    return sorted(names - {*SPEED, *SHARES, *HELD, "perplexity_ratio"})


def curves(entries: list[dict], names: Iterable[str]) -> dict[str, list[tuple[int, float]]]:
    """Values over steps of those fields that occur."""
    found = {name: [(entry["step"], entry[name]) for entry in entries if name in entry] for name in names}
    return {name: points for name, points in found.items() if points}


def draw(pyplot, shown: Run, path: Path, num_columns: int = 3) -> None:
    """Draw the charts into a PNG file."""
    drawn = panels(shown)
    num_rows = -(-len(drawn) // num_columns)
    figure, axes = pyplot.subplots(num_rows, num_columns, figsize=(5 * num_columns, 3.2 * num_rows), squeeze=False)
    for axis, panel in zip(axes.flat, drawn, strict=False):
        for name, points in panel.curves.items():
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, marker="o" if len(points) < 3 else None, label=name)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if panel.is_logarithmic and any(value > 0 for points in panel.curves.values() for _, value in points):
            axis.set_yscale("log")
        if len(panel.curves) > 1:
            axis.legend(fontsize=7)
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    figure.suptitle(f"{shown.folder.name}: {state(shown)}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
