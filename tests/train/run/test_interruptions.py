"""Training processes killed with no warning: the finished weights equal those of a run that was left alone."""

import json
import multiprocessing
import random
import runpy
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hovle import HoVLEForConditionalGeneration
from hovle.train.run.checkpoint import sorted_checkpoints

PATIENCE_SECONDS = 120


@pytest.fixture(scope="module")
def server():
    """Starts processes that have imported torch and hovle already, so that each kill costs little."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hovle.train.run.stage", "hovle.train.__main__", "accelerate"])
    return context


def launch(server, monkeypatch, *arguments: str):
    """`python -m hovle.train ARGUMENTS` in a process of its own."""
    monkeypatch.setattr(sys, "argv", ["hovle.train", *arguments])  # the process inherits it
    process = server.Process(target=runpy.run_module, args=("hovle.train", None, "__main__"))
    process.start()
    return process


def wait_until(process, condition) -> None:
    """Look often until the condition holds or the process has ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.is_alive() and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0003)


def num_log_lines(run: Path) -> int:
    return (run / "log.jsonl").read_bytes().count(b"\n") if (run / "log.jsonl").exists() else 0


def kill_somewhere(process, run: Path, number: int, chance: random.Random) -> tuple[bool, bool, bool]:
    """Kill a training process before its first log line, during a save, or at any moment after its start: by turns.

    Returns:
        Whether it was still running, whether it had logged nothing yet, and whether it left a half-written checkpoint.
    """
    before = num_log_lines(run)
    if number % 3 == 1:
        deadline = time.monotonic() + chance.uniform(0, 0.1 * number)  # later and later in its set-up
        wait_until(process, lambda: time.monotonic() > deadline or num_log_lines(run) > before)
    elif number % 3 == 2:
        wait_until(process, lambda: any(run.glob(".checkpoint-*.writing")))
        time.sleep(chance.uniform(0, 0.02))
    else:
        wanted = before + 1 + chance.randrange(4)  # the first line says that training starts
        wait_until(process, lambda: num_log_lines(run) >= wanted)
        time.sleep(chance.uniform(0, 0.2))
    was_running = process.is_alive()
    process.kill()
    process.join()
    return was_running, num_log_lines(run) == before, any(run.glob(".checkpoint-*.writing"))


@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])])
def test_killed_runs_end_with_the_weights_of_an_unbroken_one(
    next_token_config, server, monkeypatch, tmp_path, num_kills
):
    next_token_config()
    recipe = [str(tmp_path / "next_token.yaml"), f"num_steps={15 * num_kills}", "row_length=96", "rows_per_batch=1"]
    run, straight = tmp_path / "run", tmp_path / "straight"
    process = launch(server, monkeypatch, *recipe, f"output={straight}")
    process.join()
    assert process.exitcode == 0

    chance, kills, silent, half_written = random.Random(num_kills), 0, 0, 0
    broken = [*recipe, "checkpoint_every=1", "keep_last=2", "--resume"]
    while kills < num_kills and not (run / "model").exists():
        process = launch(server, monkeypatch, *broken)
        was_running, is_silent, is_half_written = kill_somewhere(process, run, kills + 1, chance)
        kills += was_running
        silent += is_silent
        half_written += is_half_written
        for folder in sorted_checkpoints(run)[-1:]:
            HoVLEForConditionalGeneration.from_pretrained(folder)
    assert kills == num_kills
    assert not (run / "model").exists()
    assert silent > 0
    assert half_written > 0
    process = launch(server, monkeypatch, *broken)
    process.join()
    assert process.exitcode == 0

    found, expected = (load_file(folder / "model" / "model.safetensors") for folder in (run, straight))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].equal(tensor), name
    losses = [
        {entry["step"]: entry["loss"] for entry in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
         if "loss" in entry}
        for folder in (run, straight)
    ]  # fmt: skip
    assert losses[0] == losses[1]
    assert not list(run.glob(".*"))  # nothing is left of the kills
