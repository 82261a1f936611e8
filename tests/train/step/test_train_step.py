"""One optimizer step, however it is cut; what stops it; what is logged."""

import contextlib
import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hovle import HoVLEForConditionalGeneration
from hovle.train.config import StageConfig
from hovle.train.data.batch import PackedBatch
from hovle.train.model.parameters import select_trainable
from hovle.train.monitor import meter as meters
from hovle.train.monitor.meter import Meter
from hovle.train.objectives.distillation import DistillationObjective
from hovle.train.objectives.next_token import NextTokenObjective
from hovle.train.objectives.teachers import make_teacher
from hovle.train.run.loop import train
from hovle.train.step import assembly
from hovle.train.step.assembly import TrainableStep, prepare_model
from hovle.train.step.optimizer import make_optimizer
from hovle.train.step.train_step import NonFiniteLossError, train_step
from hovle.train.step.validation import validate

WITH_VALIDATION = ("validation.source=pictures", "validation.path=.")

FLOAT32: contextlib.AbstractContextManager = contextlib.nullcontext()


@pytest.fixture
def make_parts(checkpoints, next_token_config, distillation_config):
    """`make_parts("chat" or "pictures")`: an objective and its optimizer, the same ones every time."""

    def build(source: str, *overrides: str) -> tuple[nn.Module, torch.optim.Optimizer, StageConfig]:
        config = next_token_config(*overrides) if source == "chat" else distillation_config(*overrides)
        model = HoVLEForConditionalGeneration.from_pretrained(checkpoints["tied"], dtype=torch.float32)
        select_trainable(model, config)
        objective: nn.Module = NextTokenObjective(model)
        if source == "pictures":
            table = model.get_input_embeddings().weight.detach().clone()
            objective = DistillationObjective(model, make_teacher(config.teacher[0]), table, config.objective)
        return objective.train(), make_optimizer(objective, config), config

    return build


def split(batch: PackedBatch, tokens_per_tile: int, image_token_id: int) -> list[PackedBatch]:
    """Cut a batch into batches of one row."""
    num_tiles = (batch.input_ids == image_token_id).sum(dim=1) // tokens_per_tile
    tiles = batch.pixel_values.split(num_tiles.tolist())
    return [
        PackedBatch(
            input_ids=batch.input_ids[row : row + 1],
            targets=batch.targets[row : row + 1],
            position_ids=batch.position_ids[row : row + 1],
            is_sample=batch.is_sample[row : row + 1],
            pixel_values=tiles[row],
            names=[f"row {row}"],
        )
        for row in range(len(tiles))
    ]


# --- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["chat", "pictures"])
def test_splitting_a_batch_does_not_change_the_step(make_parts, batches, source):
    [batch] = batches(source, 1, "rows_per_batch=4")
    results = []
    for pieces in (None, 4):
        objective, _, config = make_parts(source)
        # Not Adam: it divides by the gradient's size, so where a gradient is all rounding, the step would be too.
        optimizer = torch.optim.SGD([item for item in objective.parameters() if item.requires_grad], lr=0.1)
        model = objective.model
        parts = [batch] if pieces is None else split(batch, model.config.image_seq_length, model.config.image_token_id)
        counts = [int(objective.counts(part)[next(iter(objective.weights))]) for part in parts]
        steps = [train_step(objective, optimizer, parts, config.max_gradient_norm, FLOAT32) for _ in range(2)]
        results.append((steps, [item.detach() for item in objective.parameters() if item.requires_grad]))
    assert len(counts) == 4
    assert len(set(counts)) > 1  # a mean of means would differ
    for whole, cut in zip(results[0][0], results[1][0], strict=True):
        assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
        assert cut.terms == pytest.approx(whole.terms, rel=1e-6, abs=2e-8)  # a mean of cosines about 0
        assert cut.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-6)
    for whole, cut in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-6, rtol=0)  # worst 1e-7


def test_a_step_lowers_the_loss_and_leaves_no_gradient_behind(make_parts, batches):
    objective, optimizer, _ = make_parts("chat")
    found = [train_step(objective, optimizer, batches("chat"), 1.0, FLOAT32).loss for _ in range(5)]
    assert found[-1] < found[0] - 0.05
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_a_step_without_anything_to_learn_from_leaves_weights_and_averages(make_parts, batches):
    objective, optimizer, config = make_parts("chat")
    [batch] = batches("chat")
    train_step(objective, optimizer, [batch], config.max_gradient_norm, FLOAT32)  # averages are not zero from here on
    parameters = [item for item in objective.parameters() if item.requires_grad]
    before = [item.detach().clone() for item in parameters]
    averages = [optimizer.state[item]["exp_avg"].clone() for item in parameters]
    mute = dataclasses.replace(batch, targets=torch.full_like(batch.targets, -100))
    result = train_step(objective, optimizer, [mute, mute], config.max_gradient_norm, FLOAT32)
    assert result.is_empty
    assert all(torch.equal(item, old) for item, old in zip(parameters, before, strict=True))
    for item, old in zip(parameters, averages, strict=True):
        assert torch.equal(optimizer.state[item]["exp_avg"], old)
    result = train_step(objective, optimizer, [mute, batch], config.max_gradient_norm, FLOAT32)
    assert not result.is_empty
    assert not any(torch.equal(item, old) for item, old in zip(parameters, before, strict=True))


def test_steps_without_anything_to_learn_from_are_counted(run_loop, monkeypatch):
    results = iter([True, True, False, True, False])

    def train_step(*args, **kwargs):
        return dataclasses.replace(step_of(*args, **kwargs), is_empty=next(results))

    step_of = assembly.train_step
    monkeypatch.setattr(assembly, "train_step", train_step)
    entries, _ = run_loop("num_steps=5", "log_every=2")
    assert [entry["steps_without_loss"] for entry in entries] == [2, 1, 0]


def test_frozen_parts_build_neither_gradients_nor_optimizer_state(make_parts, batches):
    objective, optimizer, _ = make_parts("chat")
    trained = {item for item in objective.parameters() if item.requires_grad}
    frozen = [item for item in objective.parameters() if not item.requires_grad]
    assert frozen
    seen = []
    optimizer.register_step_pre_hook(
        lambda *args: seen.append([item for item in objective.parameters() if item.grad is not None])
    )
    train_step(objective, optimizer, batches("chat"), 1.0, FLOAT32)
    assert set(seen[0]) == set(optimizer.state) == trained


@pytest.mark.parametrize("limit", [0.01, 1e9])
def test_gradients_are_clipped_to_the_norm(make_parts, batches, limit):
    objective, optimizer, _ = make_parts("chat")
    norms = []

    def measure(optimizer, *args):
        parameters = [item for group in optimizer.param_groups for item in group["params"]]
        norms.append(float(nn.utils.get_total_norm([item.grad for item in parameters])))

    optimizer.register_step_pre_hook(measure)
    result = train_step(objective, optimizer, batches("chat"), limit, FLOAT32)
    assert result.gradient_norm > 0.1  # before clipping
    assert norms == [pytest.approx(min(limit, result.gradient_norm), rel=1e-4)]


def test_bfloat16_keeps_weights_and_loss_terms_in_float32(make_parts, batches):
    objective, optimizer, _ = make_parts("chat")
    types = []
    objective.model.model.embedding_layers[0].mlp.up_proj.register_forward_hook(
        lambda module, inputs, output: types.append(output.dtype)
    )
    autocast = torch.autocast("cpu", torch.bfloat16)
    expected = train_step(make_parts("chat")[0], optimizer, batches("chat"), 1.0, FLOAT32)
    optimizer.zero_grad()
    [batch] = batches("chat")
    with autocast:
        assert objective(batch).terms["cross_entropy"].dtype == torch.float32
    objective, optimizer, _ = make_parts("chat")
    result = train_step(objective, optimizer, [batch], 1.0, autocast)
    assert set(types) == {torch.bfloat16}
    assert all(item.dtype == torch.float32 for item in objective.parameters())
    assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())
    assert result.loss == pytest.approx(expected.loss, abs=0.02)


# --- what stops it ---------------------------------------------------------------------------------------------------


def weights_of(objective: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in objective.parameters()]


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_batch(make_parts, batches):
    objective, optimizer, _ = make_parts("chat")
    good, bad = batches("chat", 2)
    objective.normalize.register_forward_hook(
        lambda module, inputs, pixels: pixels * float("nan") if inputs[0] is bad.pixel_values else pixels
    )
    before = weights_of(objective)
    with pytest.raises(NonFiniteLossError, match=r"Loss is nan on the batch of chat\.jsonl:\d+, .*Weights are as bef"):
        train_step(objective, optimizer, [good, bad], 1.0, FLOAT32)
    for old, new in zip(before, weights_of(objective), strict=True):
        assert torch.equal(old, new)
    assert not optimizer.state


def test_a_gradient_that_is_not_a_number_stops_the_run_and_names_the_batch(make_parts, batches):
    objective, optimizer, _ = make_parts("chat")
    objective.model.model.projector.linear_2.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weights_of(objective)
    with pytest.raises(NonFiniteLossError, match=r"gradient norm is (nan|inf) on the batch of chat\.jsonl:"):
        train_step(objective, optimizer, batches("chat"), 1.0, FLOAT32)
    for old, new in zip(before, weights_of(objective), strict=True):
        assert torch.equal(old, new)


# --- validation and the loop -----------------------------------------------------------------------------------------


def test_validation_changes_nothing_and_does_not_depend_on_how_batches_are_cut(make_parts, batches, one_process):
    objective, _, _ = make_parts("chat")
    [batch] = batches("chat", 1, "rows_per_batch=4")
    before = weights_of(objective)
    whole = validate(objective, [batch], FLOAT32, one_process)
    model = objective.model
    parts = split(batch, model.config.image_seq_length, model.config.image_token_id)
    assert validate(objective, parts, FLOAT32, one_process) == pytest.approx(whole, rel=1e-5)
    assert set(whole) == {"cross_entropy", "reply_accuracy", "image_norm_ratio"}
    assert objective.training
    for old, new in zip(before, weights_of(objective), strict=True):
        assert torch.equal(old, new)


@pytest.fixture
def run_loop(make_parts, batches, one_process):
    """`run_loop("key=value", ..., first_step=0)`: what the loop logs, and what it validates and saves."""

    def run(*overrides: str, first_step: int = 0) -> tuple[list[dict], list[tuple]]:
        objective, _, config = make_parts("chat", *overrides)
        trainable = prepare_model(objective.model, config, torch.float32, one_process.device)
        step = TrainableStep(trainable, objective, config, one_process, torch.float32).distribute()
        entries: list[dict] = []
        saved: list[tuple] = []
        two = batches("chat", 2)
        train(
            step,
            itertools.cycle(two),
            first_step=first_step,
            meter=Meter(objective, two[0], FLOAT32, torch.float32, num_processes=1),
            log=entries.append,
            check=lambda: None,
            validate=lambda step, reached: bool(saved.append((step, "validated"))),  # never: go on
            save=lambda step, position: saved.append((step, position)),
            name="tiny",
        )
        return entries, saved

    return run


def test_the_loop_logs_with_units_and_shows_a_progress_bar(run_loop, capsys):
    entries, saved = run_loop("num_steps=5", "log_every=2")
    assert [entry["step"] for entry in entries] == [2, 4, 5]
    assert set(entries[0]) == {
        "step",
        "loss",
        "cross_entropy",
        "reply_accuracy",
        "image_norm_ratio",
        "gradient_norm",
        "gradient_norm_stem",
        "gradient_norm_holistic_layers",
        "learning_rate",
        "steps_without_loss",
        "tokens_per_second",
        "samples_per_second",
        "mfu",
        "teacher_ratio",
        "data_wait_ratio",
        "padding_ratio",
        "elapsed_seconds",
    }
    for entry in entries:
        assert entry["loss"] == entry["cross_entropy"] > 0
        assert entry["tokens_per_second"] > entry["samples_per_second"] > 0
        assert 0 <= entry["padding_ratio"] < 0.5
        assert entry["teacher_ratio"] == 0
        assert entry["steps_without_loss"] == 0
        squares = entry["gradient_norm_stem"] ** 2 + entry["gradient_norm_holistic_layers"] ** 2
        assert squares == pytest.approx(entry["gradient_norm"] ** 2, rel=1e-2)
    shown = capsys.readouterr().err
    assert "tiny: 100%" in shown
    assert "5/5" in shown
    assert not saved


def test_the_learning_rate_follows_the_schedule_from_any_step(run_loop):
    overrides = ("num_steps=5", "warmup_ratio=0.4", "final_learning_rate_ratio=0.5", "learning_rate=0.01")
    rates = [entry["learning_rate"] for entry in run_loop(*overrides)[0]]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005])
    later = [entry["learning_rate"] for entry in run_loop(*overrides, first_step=3)[0]]
    assert later == pytest.approx(rates[3:])


def test_checkpoints_carry_the_position_of_the_last_batch(run_loop, batches):
    _, saved = run_loop("num_steps=4", "checkpoint_every=1", "gradient_accumulation_steps=2")
    position = batches("chat", 2)[1].position
    assert saved == [(1, position), (2, position), (3, position)]  # the end has its own folder


def test_what_comes_before_the_first_step_is_no_training_time(run_loop, monkeypatch):
    clock = iter([0.0, *range(1000, 2000)])  # the meter is made long before the loop begins
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    [entry], _ = run_loop("num_steps=1")
    assert entry["elapsed_seconds"] < 10


def test_a_step_is_validated_before_it_is_saved_and_the_last_one_is_neither(run_loop):
    _, done = run_loop("num_steps=6", "validate_every=2", "checkpoint_every=4", *WITH_VALIDATION)
    assert [(step, what == "validated") for step, what in done] == [(2, True), (4, True), (4, False)]
