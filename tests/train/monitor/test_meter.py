"""What training measures about itself: operations, rates, gradients by part."""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn

from hovle.train.config import DistillationConfig, LoraConfig
from hovle.train.data.batch import TileBatch
from hovle.train.model.adapters import add_lora
from hovle.train.model.bare_language_model import BareLanguageModel
from hovle.train.model.parameters import select_trainable
from hovle.train.monitor import meter as meters
from hovle.train.monitor.meter import Meter, count_flops, first_row, largest_linear
from hovle.train.objectives.distillation import DistillationObjective
from hovle.train.objectives.held_language import HeldLanguage
from hovle.train.objectives.next_token import NextTokenObjective
from hovle.train.objectives.teachers import Targets
from hovle.train.step.gradients import clip_gradients, trained_parts

# peft 0.21.2 asks for `is_gradient_checkpointing`, which transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FLOAT32: contextlib.AbstractContextManager = contextlib.nullcontext()


class BigTeacher(Targets):
    """Multiplies far more than the tiny student does."""

    def raw_targets(self, batch: TileBatch, grid_size: int) -> torch.Tensor:
        square = torch.ones(1024, 1024)
        shape = (len(batch.pixel_values), grid_size**2, sum(self.widths))
        return (square @ square)[:1, :1].expand(shape[0] * shape[1], shape[2]).reshape(shape)


class NoTeacher(Targets):
    """Gives features without multiplying anything."""

    def raw_targets(self, batch: TileBatch, grid_size: int) -> torch.Tensor:
        return torch.ones(len(batch.pixel_values), grid_size**2, sum(self.widths))


def distillation(model, teacher: Targets) -> DistillationObjective:
    table = model.get_input_embeddings().weight.detach().clone()
    return DistillationObjective(model, teacher, table, DistillationConfig())


# --- operations ------------------------------------------------------------------------------------------------------


def test_a_frozen_language_model_saves_the_products_of_its_weight_gradients(parts, batches, next_token_config):
    model, _ = parts
    [batch] = batches("chat")
    counted = {}
    for groups in ("stem, holistic_layers", "stem, holistic_layers, language_model"):
        select_trainable(model, next_token_config(f"trainable=[{groups}]"))
        counted[groups] = count_flops(NextTokenObjective(model), batch, FLOAT32)
    frozen, trained = counted.values()
    weights = sum(
        module.weight.numel() for module in model.model.language_layers.modules() if isinstance(module, nn.Linear)
    )
    num_supervised = int((batch.targets != -100).sum())
    assert (
        trained - frozen == 2 * batch.input_ids.numel() * weights + 2 * num_supervised * model.lm_head.weight.numel()
    )


def test_attention_is_counted_whichever_way_it_is_computed(parts, batches):
    model, _ = parts
    [batch] = batches("chat")
    counted = {}
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        counted[attention] = count_flops(NextTokenObjective(model), batch, FLOAT32)
    rows, length = batch.input_ids.shape
    one_product = 2 * rows * length**2 * 64  # over all heads
    # Without a mask to add, fused attention does one product again in its backward pass: that of the scores.
    assert counted["sdpa"] - counted["eager"] == 4 * one_product


def test_a_teachers_operations_and_the_time_of_counting_are_left_out(parts, batches):
    model, _ = parts
    [batch] = batches("pictures")
    flops = []
    for teacher in (BigTeacher([64]), NoTeacher([64])):
        objective = distillation(model, teacher)
        flops.append(count_flops(objective, batch, FLOAT32))
        assert objective.teacher_time.read() == 0
    assert flops[0] == flops[1] > 0


def test_counting_changes_nothing(parts, batches):
    model, _ = parts
    add_lora(model, LoraConfig(rank=2, dropout=0.5))  # draws random numbers
    [batch] = batches("chat")
    objective = NextTokenObjective(model).train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert count_flops(objective, batch, FLOAT32) > 0
    assert torch.equal(torch.rand(3), expected)
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_the_rows_of_a_batch_make_up_its_operations(parts, batches):
    """Rows may differ by their pictures and replies only, which are little of the work."""
    model, _ = parts
    objective = NextTokenObjective(model)
    [batch] = batches("chat", 1, "rows_per_batch=3")
    row = first_row(batch, model.config)
    assert row.input_ids.shape == (1, 192)
    num_placeholders = int((row.input_ids == model.config.image_token_id).sum())
    assert len(row.pixel_values) * model.config.image_seq_length == num_placeholders
    assert 3 * count_flops(objective, row, FLOAT32) == pytest.approx(count_flops(objective, batch, FLOAT32), rel=0.05)


def test_layers_to_be_compiled_are_counted_as_eager_ones(parts, batches):
    model, _ = parts
    [batch] = batches("chat")
    objective = NextTokenObjective(model)
    eager = count_flops(objective, batch, FLOAT32)
    for layer in model.model.language_model.layers:
        layer.compile(backend=refuse_to_compile)
    assert count_flops(objective, batch, FLOAT32) == eager


def refuse_to_compile(graph, inputs):
    raise AssertionError("Counting compiled a layer.")


# --- rates -----------------------------------------------------------------------------------------------------------


class Clock:
    """Stands in for `time`, and moves when it is told."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_rates_leave_pauses_out_and_count_all_batches_of_the_window(parts, batches, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    monkeypatch.setattr(meters, "gemm_peak", lambda *args: 4e9)
    two = batches("chat", 2)
    meter = Meter(NextTokenObjective(parts[0]), two[0], FLOAT32, torch.float32, num_processes=3)
    tokens = sum(int(batch.is_sample.sum()) for batch in two)
    for _ in range(2):  # a reading starts anew
        with meter.waiting_for_data():
            clock.now += 1
        clock.now += 3
        with meter.paused():
            clock.now += 50
        meter.add(two)
        rates = meter.read()
        assert rates["elapsed_seconds"] == 4
        assert rates["data_wait_ratio"] == 0.25
        assert rates["tokens_per_second"] == round(3 * tokens / 4, 1)
        assert rates["samples_per_second"] == round(3 * sum(len(batch.names) for batch in two) / 4, 2)
        assert rates["padding_ratio"] == round(1 - tokens / (4 * 192), 4)
        assert rates["mfu"] == round(2 * meter.batch_flops / 4 / 4e9, 4)
        assert rates["mfu"] > 0
        assert rates["teacher_ratio"] == 0


def test_the_teachers_share_is_that_of_training_alone(parts, batches, monkeypatch):
    [batch] = batches("pictures")
    objective = distillation(parts[0], NoTeacher([64])).train()
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    monkeypatch.setattr(meters, "gemm_peak", lambda *args: 1e9)
    monkeypatch.setattr("hovle.machine.speed.time", clock)
    meter = Meter(objective, batch, FLOAT32, torch.float32, num_processes=1)
    targets = objective.teacher.targets

    def slow(*args):
        clock.now += 2
        return targets(*args)

    monkeypatch.setattr(objective.teacher, "targets", slow)
    objective(batch)
    objective.eval()
    with meter.paused():
        objective(batch)
    clock.now += 6
    meter.add([batch])
    assert meter.read()["teacher_ratio"] == 0.25


def test_the_peak_is_measured_at_the_largest_map_of_a_layer(parts):
    layers = parts[0].model.language_model.layers
    linear = largest_linear(layers)
    assert (linear.in_features, linear.out_features) in ((64, 128), (128, 64))


# --- gradients by part -----------------------------------------------------------------------------------------------


def test_gradient_norms_go_by_the_parts_recipes_name(parts, batches, next_token_config):
    model, _ = parts
    select_trainable(model, next_token_config("trainable=[stem, holistic_layers, language_model]"))
    objective = NextTokenObjective(model)
    objective(batches("chat")[0]).terms["cross_entropy"].backward()
    norms = clip_gradients(objective, 1e9)[1]
    assert set(norms) == {"stem", "holistic_layers", "language_model"}
    total = nn.utils.get_total_norm([item.grad for item in objective.parameters() if item.grad is not None])
    assert torch.stack(list(norms.values())).norm() == pytest.approx(float(total), rel=1e-5)
    assert min(norms.values()) > 0
    model.model.projector.zero_grad()
    model.model.patch_embedding.zero_grad()
    assert clip_gradients(objective, 1e9)[1]["stem"] == 0
    assert clip_gradients(objective, 1e9)[1]["language_model"] == norms["language_model"]


def test_adapters_and_the_training_only_projection_are_parts_of_their_own(parts, next_token_config):
    model, _ = parts
    select_trainable(model, next_token_config("trainable=[stem]"))
    add_lora(model, LoraConfig(rank=2))
    assert set(trained_parts(NextTokenObjective(model))) == {"stem", "lora"}
    parts_of = trained_parts(distillation(model, NoTeacher([48])))
    assert [tuple(item.shape) for item in parts_of["projections"]] == [(48, 64)]


def test_the_bare_language_model_counts_where_rows_hold_text(parts, batches, next_token_config):
    model = parts[0]
    select_trainable(model, next_token_config())
    [batch] = batches("chat")
    held = dataclasses.replace(batch, num_language_rows=1, language_length=48)
    objective = NextTokenObjective(
        model, held=HeldLanguage(BareLanguageModel(model, torch.float32), kl_weight=1.0)
    ).train()
    counted = Meter(objective, held, FLOAT32, torch.float32, num_processes=1).batch_flops
    alone = count_flops(NextTokenObjective(model).train(), batch, FLOAT32)
    layers = sum(item.numel() for item in model.model.language_layers.parameters() if item.dim() > 1)
    head = model.lm_head.weight.numel()
    # The bare pass without gradient, and the head's second pass with one for its input.
    expected = 2 * 48 * (layers + head) + 2 * 48 * head * 2
    text_config = model.config.text_config
    attention = 4 * 48 * 48 * text_config.hidden_size * len(model.model.language_layers)
    assert counted - alone == expected + attention
