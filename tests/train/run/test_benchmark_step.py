"""The benchmark step: real steps of a stage that leave nothing behind."""

from pathlib import Path

import pytest
import torch

from hovle.train.parallel import make_accelerator
from hovle.train.run import benchmark_step
from hovle.train.run.benchmark_step import BenchmarkStep


@pytest.mark.parametrize("stage", ["distillation", "next_token"])
def test_a_step_is_estimated_from_a_few_rows_and_nothing_is_written(stage, request, monkeypatch):
    config = request.getfixturevalue(f"{stage}_config")("compile=on", "num_workers=0", "rows_per_batch=10")
    step_all = BenchmarkStep.step_all
    sizes = []

    def seconds(self: BenchmarkStep) -> float:
        sizes.append(len(self.steps[0][0].input_ids))
        assert not self.step.is_compiled
        return step_all(self) * 0 + 1.0 + 0.5 * sizes[-1]

    monkeypatch.setattr(BenchmarkStep, "step_all", seconds)
    estimate = benchmark_step.estimate_seconds(config, make_accelerator())
    assert set(sizes) == {1, 4}
    assert estimate == pytest.approx((1.0 + 0.5 * 10) * benchmark_step.COMPILED_SHARE[stage])
    assert not Path(config.output).exists()


def test_the_steps_are_those_of_training(next_token_config):
    benchmark = BenchmarkStep(
        next_token_config("compile=off", "gradient_accumulation_steps=3"),
        make_accelerator(),
        torch.float32,
        num_steps=2,
    )
    objective = benchmark.step.objective
    before = [parameter.detach().clone() for parameter in objective.parameters()]
    assert benchmark.step_all() > 0
    assert [len(micro_batches) for micro_batches in benchmark.steps] == [3, 3]
    moved = [not torch.equal(old, new) for old, new in zip(before, objective.parameters(), strict=True)]
    learns = [parameter.requires_grad for parameter in objective.parameters()]
    assert any(moved)
    assert not any(has_moved and not may for has_moved, may in zip(moved, learns, strict=True))
