"""Trials: real steps of a stage that leave nothing behind."""

from pathlib import Path

import pytest
import torch

from hovle.train.run.benchmark_step import Trial, seconds_per_step
from hovle.train.run.stage import make_accelerator


@pytest.mark.parametrize("stage", ["distillation", "next_token"])
def test_a_step_is_measured_and_nothing_is_written(stage, request):
    config = request.getfixturevalue(f"{stage}_config")("compile=off", "num_workers=0")
    assert 0 < seconds_per_step(config, make_accelerator()) < 60
    assert not Path(config.output).exists()


def test_a_trial_takes_the_steps_of_training(next_token_config):
    trial = Trial(
        next_token_config("compile=off", "gradient_accumulation_steps=3"),
        make_accelerator(),
        torch.float32,
        num_steps=2,
    )
    before = [parameter.detach().clone() for parameter in trial.objective.parameters()]
    assert trial.step_all() > 0
    assert [len(micro_batches) for micro_batches in trial.steps] == [3, 3]
    moved = [not torch.equal(old, new) for old, new in zip(before, trial.objective.parameters(), strict=True)]
    learns = [parameter.requires_grad for parameter in trial.objective.parameters()]
    assert any(moved)
    assert not any(has_moved and not may for has_moved, may in zip(moved, learns, strict=True))
