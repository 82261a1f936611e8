"""What the stages minimise: loss positions, packed rows, what runs and what does not."""

import itertools
import math

import pytest
import torch
from torch import nn

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.train.config import DataConfig
from hovle.train.data import (
    PackedBatches,
    RandomTextSamples,
    Record,
    ReplySamples,
    Sample,
    SampleMaker,
    StreamPosition,
    conversation,
    load_records,
)
from hovle.train.objectives import DistillationObjective, NextTokenObjective, learning_rate_factor


class ColorTeacher(nn.Module):
    """Stands in for an image teacher: a fixed random map of a cell's mean colour."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.register_buffer("table", torch.randn(3, width, generator=torch.Generator().manual_seed(0)))

    def features(self, pixel_values: torch.Tensor, grid_size: int) -> torch.Tensor:
        cells = nn.functional.adaptive_avg_pool2d(pixel_values, grid_size)
        return cells.flatten(2).transpose(1, 2) @ self.table


def distillation(model: HoVLEForConditionalGeneration, width: int = 64, **weights) -> DistillationObjective:
    table = model.get_input_embeddings().weight.detach().clone()
    weights = {"text_weight": 1.0, "scale_weight": 0.1, **weights}
    torch.manual_seed(3)
    return DistillationObjective(model, ColorTeacher(width), table, **weights)


def samples_alone(batch: dict, tokens_per_tile: int, image_token_id: int) -> list[tuple[int, slice, dict]]:
    """Cut a packed batch into batches of one sample each: (row, place in the row, batch)."""
    alone, tile = [], 0
    for row in range(len(batch["input_ids"])):
        length = int(batch["is_sample"][row].sum())
        starts = [*(batch["position_ids"][row, :length] == 0).nonzero().flatten().tolist(), length]
        for start, end in itertools.pairwise(starts):
            place = slice(start, end)
            single = {name: batch[name][row : row + 1, place] for name in ("input_ids", "labels", "position_ids")}
            num_tiles = int((single["input_ids"] == image_token_id).sum()) // tokens_per_tile
            single["is_sample"] = torch.ones_like(single["input_ids"], dtype=torch.bool)
            single["pixel_values"] = batch["pixel_values"][tile : tile + num_tiles]
            tile += num_tiles
            alone.append((row, place, single))
    assert tile == len(batch["pixel_values"])
    return alone


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # transformers 5.23 sets it
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["", "activation checkpointing"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", ["chat", "pictures"])
def test_packed_samples_give_the_hidden_states_they_give_alone(parts, batches, attention, source, is_checkpointed):
    model, _ = parts
    model.set_attn_implementation(attention)
    if is_checkpointed:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()  # transformers renamed it

    def hidden_states(batch):
        inputs = {name: batch[name] for name in ("input_ids", "pixel_values", "position_ids")}
        if source == "pictures":
            return model.get_holistic_embeddings(**inputs).inputs_embeds
        return model.model(**inputs, use_cache=False).last_hidden_state

    [batch] = batches(source)
    assert "attention_mask" not in batch  # one of all ones would let samples see each other
    # On a CPU, flex attention has no backward pass.
    with torch.set_grad_enabled(attention != "flex_attention"):
        packed = hidden_states(batch)
        alone = samples_alone(batch, model.config.image_seq_length, model.config.image_token_id)
        assert len(alone) >= 4
        assert model.training
        for row, place, single in alone:
            torch.testing.assert_close(packed[row, place], hidden_states(single)[0], atol=1e-5, rtol=0)  # worst 2e-6


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_sample_does_not_see_its_neighbours(parts, batches, attention):
    model, _ = parts
    model.set_attn_implementation(attention)
    [batch] = batches("chat")
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values", "position_ids")}
    before = model.model(**inputs, use_cache=False).last_hidden_state
    first_end = int((batch["position_ids"][0, 1:] == 0).nonzero()[0]) + 1
    ids = batch["input_ids"].clone()
    ids[0, :first_end] = torch.where(ids[0, :first_end] == model.config.image_token_id, ids[0, :first_end], 7)
    after = model.model(**{**inputs, "input_ids": ids}, use_cache=False).last_hidden_state
    assert (after[0, :first_end] - before[0, :first_end]).abs().max() > 0.1
    torch.testing.assert_close(after[0, first_end:], before[0, first_end:], atol=1e-6, rtol=0)
    torch.testing.assert_close(after[1], before[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_questions_about_one_picture_give_the_loss_they_give_alone(parts, data, next_token_config, attention):
    model, processor = parts
    model.set_attn_implementation(attention)
    objective = NextTokenObjective(model)
    conversations = [
        [
            conversation(data / "pictures" / f"{picture:02d}.png", *turn)
            for turn in (("What is in the picture?", "A bus"), ("What is it?", "A tree"), ("Why?", "0 1 2 3"))
        ]
        for picture in range(4)
    ]
    records = [
        Record(f"picture {number}", first, tuple(others)) for number, (first, *others) in enumerate(conversations)
    ]
    config = next_token_config("row_length=200")
    maker = ReplySamples(processor)
    batch = next(iter(PackedBatches(records, maker, config, StreamPosition(), 0, 1, pad_token_id=0)))
    assert batch["attention_mask"].shape == (2, 1, 200, 200)
    output = objective(batch)
    total = count = 0.0
    for name in batch["names"]:
        for messages in conversations[int(name.split()[1])]:
            alone = objective(as_batch(maker, maker.make(Record("alone", messages), 0)))
            total += float(alone.terms["reply_nats"].detach())
            count += int(alone.counts["reply_nats"])
    assert count == int(output.counts["reply_nats"]) > 20
    assert float(output.terms["reply_nats"].detach()) == pytest.approx(total, rel=1e-6)  # worst 1e-7


# --- next token ------------------------------------------------------------------------------------------------------


def test_next_token_loss_equals_that_of_the_model(parts, data):
    model, processor = parts
    sampler = ReplySamples(processor)
    objective = NextTokenObjective(model)
    records = load_records(DataConfig(source="chat", path=str(data / "chat.jsonl")))
    for index, record in enumerate(records[:6]):
        sample = sampler.make(record, index)
        batch = as_batch(sampler, sample)
        output = objective(batch)
        pixel_values = batch["pixel_values"] if sample.pictures else None
        expected = model(sample.input_ids[None], pixel_values=pixel_values, labels=sample.labels[None]).loss
        count = int(output.counts["reply_nats"])
        assert count == int((sample.labels != -100).sum())
        torch.testing.assert_close(output.terms["reply_nats"] / count, expected, atol=1e-5, rtol=0)


def test_next_token_loss_of_packed_rows_is_the_mean_over_all_their_replies(parts, batches):
    model, _ = parts
    objective = NextTokenObjective(model)
    [batch] = batches("chat")
    output = objective(batch)
    total = count = 0.0
    for _, _, single in samples_alone(batch, model.config.image_seq_length, model.config.image_token_id):
        alone = objective(single)
        total += float(alone.terms["reply_nats"].detach())
        count += int(alone.counts["reply_nats"])
    assert count == int(output.counts["reply_nats"])
    assert float(output.terms["reply_nats"].detach()) == pytest.approx(total, rel=1e-5)


def as_batch(maker: SampleMaker, sample: Sample) -> dict:
    length = len(sample.input_ids)
    return {
        "input_ids": sample.input_ids[None],
        "labels": sample.labels[None],
        "position_ids": torch.arange(length)[None],
        "is_sample": torch.ones(1, length, dtype=torch.bool),
        "pixel_values": maker.load_pixels(sample.name, sample.pictures, sample.num_tiles),
        "names": [sample.name],
    }


def test_logits_exist_only_where_there_are_labels(parts, batches):
    model, _ = parts
    shapes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    [batch] = batches("chat")
    count = int((batch["labels"][:, 1:] != -100).sum())
    NextTokenObjective(model)(batch)
    assert 0 < count < batch["labels"].numel() / 2
    assert shapes == [(count, model.config.text_config.vocab_size)]


def test_a_batch_without_pictures_still_reaches_the_stem(parts, data):
    model, processor = parts
    records = load_records(DataConfig(source="chat", path=str(data / "chat.jsonl")))
    maker = ReplySamples(processor)
    text_only = as_batch(maker, maker.make(records[3], 0))
    assert len(text_only["pixel_values"]) == 0
    output = NextTokenObjective(model)(text_only)
    output.terms["reply_nats"].backward()
    # Data parallelism waits for a gradient of every trainable parameter.
    for parameter in [*model.model.patch_embedding.parameters(), *model.model.projector.parameters()]:
        assert parameter.grad is not None
        assert not parameter.grad.any()


# --- distillation ----------------------------------------------------------------------------------------------------


def test_distillation_never_calls_the_language_model(parts, batches):
    model, _ = parts

    def refuse(module, *args):
        raise AssertionError(f"{type(module).__name__} of the language model was called")

    for module in [*model.model.language_layers, model.model.language_model.norm, model.lm_head]:
        module.register_forward_pre_hook(refuse)
    called = []
    for layer in model.model.embedding_layers:
        layer.register_forward_hook(lambda *args: called.append(1))
    output = distillation(model)(batches("pictures")[0])
    assert len(called) == model.config.num_embedding_layers
    torch.stack(list(output.terms.values())).sum().backward()
    for parameter in [*model.model.language_layers.parameters(), *model.model.language_model.norm.parameters()]:
        assert parameter.grad is None


def test_text_terms_cover_all_that_is_no_picture_and_no_padding(parts, batches):
    model, processor = parts
    [batch] = batches("pictures")
    assert not batch["is_sample"].all()
    counts = distillation(model).counts(batch)
    ids = batch["input_ids"][batch["is_sample"]].tolist()
    num_image = ids.count(processor.image_token_id)
    assert int(counts["image_cosine"]) == int(counts["image_scale"]) == num_image
    assert num_image == len(batch["pixel_values"]) * processor.image_seq_length
    assert int(counts["text_cosine"]) == int(counts["text_scale"]) == len(ids) - num_image
    per_sample = len(processor.tokenizer.encode("<|im_start|>user\n<img></img><|im_end|>\n<|im_start|>assistant\n"))
    per_sample += len(processor.tokenizer.encode("<|im_end|>\n")) + 2 * 10
    assert len(ids) - num_image == len(batch["names"]) * per_sample


def test_distillation_is_the_papers_objective_plus_scale_control(parts, batches):
    model, processor = parts
    objective = distillation(model, text_weight=0.7, scale_weight=0.3)
    [batch] = batches("pictures")
    output = objective(batch)
    trained = {name: weight for name, weight in objective.weights.items() if weight}
    assert trained == {"image_cosine": -1, "text_cosine": -0.7, "image_scale": 0.3, "text_scale": 0.3}

    table = model.get_input_embeddings().weight
    image_cosines, text_cosines, image_ratios, text_ratios, plain_ratios = [], [], [], [], []
    for _, _, single in samples_alone(batch, processor.image_seq_length, processor.image_token_id):
        hidden = model.get_holistic_embeddings(single["input_ids"], single["pixel_values"]).inputs_embeds[0]
        targets = iter(objective.teacher.features(single["pixel_values"], 2).flatten(0, 1))
        for token, vector in zip(single["input_ids"][0].tolist(), hidden, strict=True):
            is_image = token == processor.image_token_id
            target = next(targets) if is_image else table[token]
            cosine = float((vector @ target / vector.norm() / target.norm()).detach())
            norm = table.norm(dim=-1).mean() if is_image else target.norm()
            ratio = float((vector.norm() / norm).log().square().detach())
            plain_ratios += [float((vector.norm() / norm).detach())] if is_image else []
            (image_cosines if is_image else text_cosines).append(cosine)
            (image_ratios if is_image else text_ratios).append(ratio)
    expected = {
        "image_cosine": sum(image_cosines),
        "text_cosine": sum(text_cosines),
        "image_scale": sum(image_ratios),
        "text_scale": sum(text_ratios),
        "image_norm_ratio": sum(plain_ratios),
    }
    found = {name: float(term.detach()) for name, term in output.terms.items()}
    assert found == pytest.approx(expected, rel=1e-4)


def test_only_the_direction_counts_for_the_cosine_and_only_the_length_for_the_scale(parts, batches):
    model, _ = parts
    objective = distillation(model)
    [batch] = batches("pictures")
    holistic = model.get_holistic_embeddings

    def ten_times_longer(**inputs):
        outputs = holistic(**inputs)
        outputs.image_hidden_states = outputs.image_hidden_states * 10
        return outputs

    before = objective(batch).terms
    model.get_holistic_embeddings = ten_times_longer
    after = objective(batch).terms
    torch.testing.assert_close(after["image_cosine"], before["image_cosine"])
    torch.testing.assert_close(after["text_scale"], before["text_scale"])
    assert (after["image_scale"] - before["image_scale"]).abs() > 1


def test_a_projection_is_trained_where_widths_differ_and_only_there(parts, batches):
    model, _ = parts
    same = distillation(model, width=64)
    assert isinstance(same.projection, nn.Identity)
    objective = distillation(model, width=48)
    output = objective(batches("pictures")[0])
    output.terms["image_cosine"].backward()
    assert objective.projection.weight.shape == (48, 64)
    assert objective.projection.weight.grad.abs().max() > 0
    # Text goes without it: the text cosine compares with the table itself.
    objective.zero_grad()
    objective(batches("pictures")[0]).terms["text_cosine"].backward()
    assert objective.projection.weight.grad is None


def test_targets_stay_when_the_table_learns(parts, batches):
    model, _ = parts
    objective = distillation(model)
    [batch] = batches("pictures")
    kept = objective.text_table.clone()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1)
    assert torch.equal(objective.text_table, kept)
    assert objective.text_table.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    assert "text_table" not in objective.state_dict()
    assert int(objective.counts(batch)["text_cosine"]) > 0


def test_hd_distils_what_the_language_model_will_see(language_models, data, next_token_config):
    model = HoVLEForConditionalGeneration.from_language_model(
        language_models["tied"], 2, image_size=56, pixel_shuffle_loc="post", dtype=torch.float32
    )
    processor = HoVLEProcessor.from_language_model(language_models["tied"], model.config, max_tiles=2)
    records = load_records(DataConfig(source="pictures", path=str(data / "pictures")))
    config = next_token_config("rows_per_batch=1")
    batch = next(
        iter(
            PackedBatches(records, RandomTextSamples(processor, 10, 0), config, StreamPosition(), 0, 1, pad_token_id=0)
        )
    )
    output = distillation(model)(batch)
    assert len(batch["names"]) > 1
    assert int(output.counts["image_cosine"]) == len(batch["pixel_values"]) * 4
    torch.stack(list(output.terms.values())).sum().backward()
    assert model.model.projector.linear_1.weight.grad.abs().max() > 0


# --- schedule --------------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    factors = [learning_rate_factor(step, 101, 0.1, 0.1) for step in range(101)]
    assert factors[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert factors[11] == 1.0
    assert factors[-1] == pytest.approx(0.1)
    middle = 11 + (100 - 11) / 2
    assert learning_rate_factor(int(middle), 101, 0.1, 0.1) == pytest.approx(0.55, abs=0.01)
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert learning_rate_factor(11 + 22, 100, 0.1, 0.1) == pytest.approx(quarter, abs=0.01)
    falling = factors[11:]
    assert falling == sorted(falling, reverse=True)


def test_learning_rate_of_short_and_flat_schedules():
    assert [learning_rate_factor(step, 1, 0.0, 0.1) for step in range(1)] == [1.0]
    assert [learning_rate_factor(step, 3, 0.0, 1.0) for step in range(3)] == [1.0, 1.0, 1.0]
    assert [learning_rate_factor(step, 2, 0.9, 0.0) for step in range(2)] == [0.5, 1.0]
    assert learning_rate_factor(50, 10, 0.1, 0.2) == pytest.approx(0.2)  # never below, even past the end
