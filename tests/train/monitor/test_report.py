"""The page and the curves of a run, finished, going on, broken off or resumed."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from hovle.cli import main
from hovle.train import run_stage
from hovle.train.monitor.report import panels, read_run, speed_rows, state, summarize, warnings_of

TERMS = {"cross_entropy": 1.25, "reply_accuracy": 0.5}

SPEED = {
    "tokens_per_second": 100.0,
    "samples_per_second": 2.0,
    "mfu": 0.25,
    "teacher_ratio": 0.0,
    "data_wait_ratio": 0.1,
    "padding_ratio": 0.03,
    "elapsed_seconds": 30.0,
}

RECIPE = """
output: runs/mine
model: {checkpoint: runs/before/model, language_model: null}
objective: {name: next_token}
data: {source: chat}
validation: {source: chat}
trainable: [stem, holistic_layers]
num_steps: 6
gradient_accumulation_steps: 1
rows_per_batch: 2
row_length: 192
learning_rate: 0.001
seed: 0
"""


def step(number: int, loss: float, **fields) -> dict:
    norms = {"gradient_norm": 2.0, "gradient_norm_stem": 1.0}
    return {"step": number, "loss": loss, **TERMS, **norms, "learning_rate": 1e-3, **SPEED, **fields}


START = {"event": "start", "step": 0, "device": "cpu", "dtype": "float32", "num_threads": 2, "torch": "2.14.1"}


@pytest.fixture
def run_folder(tmp_path):
    """`run_folder(entries, tail)` writes a run folder: its log, and text after the last line."""

    def write(entries: list[dict], tail: str = "", recipe: str = RECIPE) -> Path:
        folder = tmp_path / "mine"
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text(recipe)
        lines = [json.dumps({"time": 1e9 + place, **entry}) + "\n" for place, entry in enumerate(entries)]
        (folder / "log.jsonl").write_text("".join(lines) + tail)
        return folder

    return write


CHECK = {"event": "image_ablation", "true_nats": 1.0, "blank_nats": 1.5, "shuffled_nats": 1.4, "blank_gap": 0.5}
CHECK |= {"shuffled_gap": 0.4, "num_pictures": 9, "num_shuffled": 9}

FINISHED = [
    START,
    {"event": "validation", "step": 0, **TERMS},
    *(step(number, 3.0 - number / 4) for number in range(1, 7)),
    {"event": "validation", "step": 6, "cross_entropy": 0.75, "reply_accuracy": 0.9},
    {**CHECK, "step": 6},
    {"event": "finish", "step": 6},
]


def test_a_real_run_is_reported_by_the_command(next_token_config, data, capsys):
    validation = ("validation.source=chat", f"validation.path={data / 'chat.jsonl'}", "num_validation_batches=1")
    folder = run_stage(next_token_config("num_steps=3", *validation)).parent
    assert main(["train", "report", str(folder)]) == 0
    assert "Finished: 3 of 3 steps" in capsys.readouterr().out
    page = (folder / "report.md").read_text()
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-4])
    assert f"| {last['loss']:.4g} |" in page
    for name in ("validation: cross_entropy", "pictures: blank_gap", "mfu", "gemm_peak_tflops", "device"):
        assert f"| {name} | " in page
    assert "| --- | --- |" in page
    assert "![curves](report.png)" in page
    with Image.open(folder / "report.png") as picture:
        assert picture.width > 1000


def test_what_holds_the_language_has_charts_of_its_own(run_folder):
    held = [step(number, 2.0, language_kl=0.1 * number) for number in (1, 2)]
    validation = {"event": "validation", "step": 2, "cross_entropy": 1.0, "language_kl": 0.3, "perplexity_ratio": 1.02}
    drawn = {panel.title: panel.curves for panel in panels(read_run(run_folder([START, *held, validation])))}
    distance = drawn["distance of text from the bare language model"]
    assert distance == {"language_kl": [(1, 0.1), (2, 0.2)], "language_kl, held out": [(2, 0.3)]}
    ratios = drawn["perplexity over the bare language model's, held-out text"]
    assert ratios == {"perplexity_ratio": [(2, 1.02)]}
    assert set(drawn["terms"]) == set(TERMS)


def test_the_page_says_what_was_reached(run_folder):
    shown = read_run(run_folder(FINISHED))
    assert state(shown) == "Finished: 6 of 6 steps in 3.0 minutes of training."
    page = summarize(shown)
    assert "| training: loss | 2.75 | 1.5 |" in page
    assert "| validation: cross_entropy | 1.25 | 0.75 |" in page
    assert "| pictures: blank_gap | 0.5 | 0.5 |" in page
    assert "| trainable | stem, holistic_layers |" in page
    assert "## Warnings" not in page
    assert {panel.title for panel in panels(shown)} == {
        "loss",
        "terms",
        "gradient norm",
        "learning rate",
        "tokens per second",
        "shares of time, peak and rows",
        "validation",
        "held-out loss by picture",
    }
    curve = next(panel for panel in panels(shown) if panel.title == "loss").curves["loss"]
    assert curve[0] == (1, 2.75)
    assert len(curve) == 6
    assert set(next(panel for panel in panels(shown) if panel.title == "terms").curves) == set(TERMS)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**step(1, 2.0), "gemm_peak_ratio": 0.5}, "gemm_peak_ratio is now mfu"),
        ({**step(1, 2.0), "reply_nats": 2.0}, "reply_nats is now cross_entropy"),
        ({**CHECK, "event": "blind_check", "step": 6}, "blind_check is now image_ablation"),
    ],
)
def test_a_log_with_earlier_names_is_refused_with_todays_and_read_once_they_are_renamed(run_folder, entry, message):
    folder = run_folder([*FINISHED, entry])
    with pytest.raises(ValueError, match=message) as refusal:
        read_run(folder)
    command = str(refusal.value).split("`")[1]
    subprocess.run(shlex.split(command), check=True)
    assert len(read_run(folder).entries) == len(FINISHED) + 1


def test_rates_are_means_over_time(run_folder):
    steps = [step(1, 1.0), step(2, 1.0, tokens_per_second=400.0, elapsed_seconds=90.0)]
    assert ("tokens_per_second", "325.0") in speed_rows(steps)
    assert ("mfu", "25.0%") in speed_rows(steps)


def test_warnings_of_the_run_stand_on_the_page(run_folder):
    warning = {"event": "warning", "step": 6, "message": "Pictures hardly matter: look."}
    page = summarize(read_run(run_folder([*FINISHED[:-1], warning, FINISHED[-1]])))
    assert "## Warnings\n\n- After step 6: Pictures hardly matter: look." in page


def test_what_was_not_checked_is_said(run_folder):
    unchecked = [entry for entry in FINISHED if entry.get("event") not in ("image_ablation", "validation")]
    without = RECIPE.replace("validation: {source: chat}", "validation: null")
    assert warnings_of(read_run(run_folder(unchecked, recipe=without))) == [
        "Whether the pictures matter was not measured: there is no validation source."
    ]
    [found] = warnings_of(read_run(run_folder([*FINISHED[:-2], {**CHECK, "step": 6, "num_shuffled": 2}])))
    assert found.startswith("Only 2 of 9 held-out pictures could be shuffled")
    none = {"event": "image_ablation", "step": 6, "num_pictures": 0, "num_shuffled": 0}
    [found] = warnings_of(read_run(run_folder([*FINISHED[:-2], none])))
    assert "no held-out reply follows a picture" in found


def test_steps_without_anything_to_learn_from_are_a_warning(run_folder):
    steps = [step(1, 3.0, steps_without_loss=2), step(2, 2.0, steps_without_loss=1), step(3, 1.0)]
    assert "3 steps held nothing to learn from and left the weights as they were." in warnings_of(
        read_run(run_folder([START, *steps]))
    )


def test_a_run_that_goes_on_or_was_killed_while_writing_is_shown_as_far_as_it_got(run_folder, capsys):
    folder = run_folder(FINISHED[:5], tail='{"time": 1000000009, "step": 4, "lo')
    assert main(["train", "report", str(folder)]) == 0
    assert "Not finished, either running or interrupted: 3 of 6 steps" in capsys.readouterr().out
    page = (folder / "report.md").read_text()
    assert "Line 6 of log.jsonl is cut off" in page
    assert "last log line at 2001-09-09 01:46 UTC" in page


def test_what_an_interrupted_attempt_did_beyond_its_checkpoint_does_not_count(run_folder):
    resumed = [START, step(1, 3.0), step(2, 2.0), step(3, 9.0), {**START, "step": 2}, step(3, 1.0)]
    shown = read_run(run_folder(resumed))
    assert [(entry["step"], entry["loss"]) for entry in shown.steps] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert "Resumed after step 2." in warnings_of(shown)


def test_a_folder_without_a_run_and_a_run_without_a_step_are_refused(run_folder, tmp_path, capsys):
    assert main(["train", "report", str(tmp_path / "nothing")]) == 1
    assert "is no run folder: it holds no recipe.yaml and no log.jsonl" in capsys.readouterr().err
    assert main(["train", "report", str(run_folder([START]))]) == 1
    assert capsys.readouterr().err.startswith("hovle train report: ")


def test_the_command_explains_itself_and_training_still_takes_a_recipe(capsys):
    with pytest.raises(SystemExit) as left:
        main(["train", "report", "--help"])
    assert left.value.code == 0
    assert "usage: hovle train report" in capsys.readouterr().out
    assert main(["train", "./report"]) == 1
    assert "No recipe './report'" in capsys.readouterr().err
