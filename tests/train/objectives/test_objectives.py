"""What the stages minimise: loss positions, packed rows, what runs and what does not."""

import itertools
import math

import pytest
import torch
from torch import nn

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.train.config import ChatData, DistillationConfig, PictureData
from hovle.train.data.batch import PackedBatch
from hovle.train.data.packing import PackedBatches, StreamPosition
from hovle.train.data.readers import load_records
from hovle.train.data.records import Record, conversation
from hovle.train.data.samples import RandomTextSamples, ReplySamples, Sample, SampleMaker
from hovle.train.data.tiles import PixelNormalization
from hovle.train.objectives.distillation import DistillationObjective, _info_nce
from hovle.train.objectives.next_token import NextTokenObjective
from hovle.train.objectives.teachers import Targets
from hovle.train.step.optimizer import learning_rate_factor


class ColorTeacher(Targets):
    """Stands in for an image teacher: fixed random maps of a cell's mean colour."""

    def __init__(self, *widths: int):
        super().__init__(widths)
        self.register_buffer("table", torch.randn(3, sum(widths), generator=torch.Generator().manual_seed(0)))

    def raw_targets(self, batch: PackedBatch, grid_size: int) -> torch.Tensor:
        # Black is no zero vector, which has no direction.
        cells = nn.functional.adaptive_avg_pool2d(batch.pixel_values.float() / 255 - 0.4, grid_size)
        return cells.flatten(2).transpose(1, 2) @ self.table


def distillation(
    model: HoVLEForConditionalGeneration, width: int = 64, layers: tuple[int, ...] = (-1,), **fields
) -> DistillationObjective:
    table = model.get_input_embeddings().weight.detach().clone()
    config = DistillationConfig(**fields)
    torch.manual_seed(3)
    return DistillationObjective(model, ColorTeacher(*[width] * len(layers)), table, config, layers)


def model_inputs(batch: PackedBatch) -> dict[str, torch.Tensor]:
    """What the model itself takes of a batch."""
    return {
        "input_ids": batch.input_ids,
        "pixel_values": PixelNormalization()(batch.pixel_values),
        "position_ids": batch.position_ids,
    }


def samples_alone(
    batch: PackedBatch, tokens_per_tile: int, image_token_id: int
) -> list[tuple[int, slice, PackedBatch]]:
    """Cut a packed batch into batches of one sample each: (row, place in the row, batch)."""
    alone, tile = [], 0
    for row in range(len(batch.input_ids)):
        length = int(batch.is_sample[row].sum())
        starts = [*(batch.position_ids[row, :length] == 0).nonzero().flatten().tolist(), length]
        for start, end in itertools.pairwise(starts):
            place = slice(start, end)
            input_ids = batch.input_ids[row : row + 1, place]
            num_tiles = int((input_ids == image_token_id).sum()) // tokens_per_tile
            single = PackedBatch(
                input_ids=input_ids,
                targets=batch.targets[row : row + 1, place],
                position_ids=batch.position_ids[row : row + 1, place],
                is_sample=torch.ones_like(input_ids, dtype=torch.bool),
                pixel_values=batch.pixel_values[tile : tile + num_tiles],
            )
            tile += num_tiles
            alone.append((row, place, single))
    assert tile == len(batch.pixel_values)
    return alone


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # transformers 5.23 sets it
@pytest.mark.parametrize(
    ("attention", "is_checkpointed"),
    [
        ("eager", False),
        ("sdpa", False),
        ("eager", True),
        ("sdpa", True),
        # On a CPU, flex attention has no backward pass, and without one nothing is checkpointed.
        pytest.param("flex_attention", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("source", ["chat", "pictures"])
def test_packed_samples_give_the_hidden_states_they_give_alone(parts, batches, attention, source, is_checkpointed):
    model, _ = parts
    model.set_attn_implementation(attention)
    if is_checkpointed:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()  # transformers renamed it

    def hidden_states(batch):
        inputs = model_inputs(batch)
        if source == "pictures":
            return model.get_holistic_embeddings(**inputs).language_inputs_embeds
        return model.model(**inputs, use_cache=False).last_hidden_state

    [batch] = batches(source)
    assert batch.attention_mask is None  # one of all ones would let samples see each other
    with torch.set_grad_enabled(attention != "flex_attention"):
        packed = hidden_states(batch)
        alone = samples_alone(batch, model.config.image_seq_length, model.config.image_token_id)
        assert len(alone) >= 4
        assert model.training
        for row, place, single in alone:
            torch.testing.assert_close(packed[row, place], hidden_states(single)[0], atol=1e-5, rtol=0)  # worst 2e-6


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # transformers 5.23 sets it
@pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_sample_does_not_see_its_neighbours(parts, batches, attention):
    model, _ = parts
    model.set_attn_implementation(attention)
    [batch] = batches("chat")
    inputs = model_inputs(batch)
    before = model.model(**inputs, use_cache=False).last_hidden_state
    first_end = int((batch.position_ids[0, 1:] == 0).nonzero()[0]) + 1
    ids = batch.input_ids.clone()
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
    assert batch.attention_mask.shape == (2, 1, 200, 200)
    output = objective(batch)
    total = count = 0.0
    for name in batch.names:
        for messages in conversations[int(name.split()[1])]:
            alone = objective(as_batch(maker, maker.make(Record("alone", messages), 0)))
            total += float(alone.terms["cross_entropy"].detach())
            count += int(alone.counts["cross_entropy"])
    assert count == int(output.counts["cross_entropy"]) > 20
    assert float(output.terms["cross_entropy"].detach()) == pytest.approx(total, rel=1e-6)  # worst 1e-7


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_branch_changes_no_bit_when_another_one_says_something_else(parts, data, next_token_config, attention):
    """Two pictures before the parting point; the second of three branches changes, longer than the others and not."""
    model, processor = parts
    model.set_attn_implementation(attention)
    maker, config = ReplySamples(processor), next_token_config("row_length=150", "rows_per_batch=1")

    def asked(question: str, answer: str) -> Record:
        first, reply = conversation(data / "pictures" / "00.png", question, answer)
        second = {"type": "image", "path": str(data / "pictures" / "01.png")}
        return Record(question, [{**first, "content": [first["content"][0], second, first["content"][1]]}, reply])

    def examine(*records: Record) -> list[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]]:
        """Logits, nats and gradients of every conversation."""
        stream = PackedBatches([Record.join(records)], maker, config, StreamPosition(), 0, 1, pad_token_id=0)
        [batch] = itertools.islice(stream, 1)
        sample = maker.make(Record.join(records), 0)
        ids = torch.ones_like(sample.input_ids) if sample.subsegment_ids is None else sample.subsegment_ids
        ids = ids[sample.is_input]
        found = []
        for branch in range(1, len(records) + 1):
            outputs = model(
                batch.input_ids,
                pixel_values=PixelNormalization()(batch.pixel_values),
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
            )
            logits = outputs.logits[0, : len(ids)][ids == branch]
            targets = batch.targets[0, : len(ids)][ids == branch]
            nats = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            model.zero_grad()
            nats.backward()
            found.append((logits.detach(), nats.detach(), [item.grad.clone() for item in model.parameters()]))
        return found

    first, last = asked("What is in the picture?", "A bus"), asked("Why?", "0 1 2 3")
    (*kept, before), (*same, after) = (
        [results[0], results[2], results[1]]
        for results in (examine(first, asked(question, answer), last) for question, answer in (("A", "1"), ("B", "2")))
    )
    assert not torch.equal(before[0], after[0])  # the one that changed
    for (logits, nats, gradients), (other_logits, other_nats, other_gradients) in zip(kept, same, strict=True):
        assert torch.equal(logits, other_logits)
        assert torch.equal(nats, other_nats)
        assert all(torch.equal(*pair) for pair in zip(gradients, other_gradients, strict=True))
        assert any(gradient.any() for gradient in gradients)
    for (_, nats, gradients), record in zip(kept, (first, last), strict=True):
        [(_, alone, expected)] = examine(record)
        torch.testing.assert_close(nats, alone, rtol=1e-6, atol=0)
        for found, gradient in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


# --- next token ------------------------------------------------------------------------------------------------------


def test_next_token_loss_equals_that_of_the_model(parts, data):
    model, processor = parts
    sampler = ReplySamples(processor)
    objective = NextTokenObjective(model)
    records = load_records(ChatData(path=str(data / "chat.jsonl")))
    for index, record in enumerate(records[:6]):
        sample = sampler.make(record, index)
        batch = as_batch(sampler, sample)
        output = objective(batch)
        pixel_values = PixelNormalization()(batch.pixel_values) if sample.pictures else None
        expected = model(sample.input_ids[None], pixel_values=pixel_values, labels=sample.labels[None]).loss
        count = int(output.counts["cross_entropy"])
        assert count == int((sample.labels != -100).sum())
        torch.testing.assert_close(output.terms["cross_entropy"] / count, expected, atol=1e-5, rtol=0)


def test_next_token_loss_of_packed_rows_is_the_mean_over_all_their_replies(parts, batches):
    model, _ = parts
    objective = NextTokenObjective(model)
    [batch] = batches("chat")
    output = objective(batch)
    total = count = 0.0
    for _, _, single in samples_alone(batch, model.config.image_seq_length, model.config.image_token_id):
        alone = objective(single)
        total += float(alone.terms["cross_entropy"].detach())
        count += int(alone.counts["cross_entropy"])
    assert count == int(output.counts["cross_entropy"])
    assert float(output.terms["cross_entropy"].detach()) == pytest.approx(total, rel=1e-5)


def as_batch(maker: SampleMaker, sample: Sample) -> PackedBatch:
    length = len(sample.input_ids)
    return PackedBatch(
        input_ids=sample.input_ids[None],
        targets=sample.targets[None],
        position_ids=torch.arange(length)[None],
        is_sample=torch.ones(1, length, dtype=torch.bool),
        pixel_values=maker.load_pixels(sample.name, sample.pictures, sample.num_tiles),
        names=[sample.name],
    )


def test_logits_exist_only_where_there_are_targets(parts, batches):
    model, _ = parts
    shapes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    [batch] = batches("chat")
    count = int((batch.targets != -100).sum())
    NextTokenObjective(model)(batch)
    assert 0 < count < batch.targets.numel() / 2
    assert shapes == [(count, model.config.text_config.vocab_size)]


def test_a_batch_without_pictures_still_reaches_the_stem(parts, data):
    model, processor = parts
    records = load_records(ChatData(path=str(data / "chat.jsonl")))
    maker = ReplySamples(processor)
    text_only = as_batch(maker, maker.make(records[3], 0))
    assert len(text_only.pixel_values) == 0
    output = NextTokenObjective(model)(text_only)
    output.terms["cross_entropy"].backward()
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
    assert not batch.is_sample.all()
    counts = distillation(model).counts(batch)
    ids = batch.input_ids[batch.is_sample].tolist()
    num_image = ids.count(processor.image_token_id)
    assert int(counts["image_cosine"]) == int(counts["image_scale"]) == num_image
    assert num_image == len(batch.pixel_values) * processor.image_seq_length
    assert int(counts["text_cosine"]) == int(counts["text_scale"]) == len(ids) - num_image
    per_sample = len(processor.tokenizer.encode("<|im_start|>user\n<img></img><|im_end|>\n<|im_start|>assistant\n"))
    per_sample += len(processor.tokenizer.encode("<|im_end|>\n")) + 2 * 10
    assert len(ids) - num_image == len(batch.names) * per_sample


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
        hidden = model.get_holistic_embeddings(**model_inputs(single)).language_inputs_embeds[0]
        targets = iter(objective.teacher.targets(single, 2).flatten(0, 1))
        for token, vector in zip(single.input_ids[0].tolist(), hidden, strict=True):
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
    assert isinstance(same.projections[0], nn.Identity)
    objective = distillation(model, width=48)
    output = objective(batches("pictures")[0])
    output.terms["image_cosine"].backward()
    assert objective.projections[0].weight.shape == (48, 64)
    assert objective.projections[0].weight.grad.abs().max() > 0
    # Text goes without it: the text cosine compares with the table itself.
    objective.zero_grad()
    objective(batches("pictures")[0]).terms["text_cosine"].backward()
    assert objective.projections[0].weight.grad is None


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
    records = load_records(PictureData(path=str(data / "pictures")))
    config = next_token_config("rows_per_batch=1")
    batch = next(
        iter(
            PackedBatches(records, RandomTextSamples(processor, 10, 0), config, StreamPosition(), 0, 1, pad_token_id=0)
        )
    )
    output = distillation(model)(batch)
    assert len(batch.names) > 1
    assert int(output.counts["image_cosine"]) == len(batch.pixel_values) * 4
    torch.stack(list(output.terms.values())).sum().backward()
    assert model.model.projector.linear_1.weight.grad.abs().max() > 0


def image_outputs(objective: DistillationObjective, batch: dict, layer: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """What one holistic layer gives at the picture positions, projected, and the targets: `(N, S, D)` each."""
    outputs = objective.model.get_holistic_embeddings(**model_inputs(batch), output_hidden_states=True)
    is_image = batch.input_ids == objective.model.config.image_token_id
    hidden_states = outputs.hidden_states[layer][is_image].view_as(outputs.image_hidden_states)
    return objective.projections[0](hidden_states), objective.teacher.targets(batch, 2)


def test_smooth_l1_is_the_plain_formula(parts, batches):
    objective = distillation(parts[0], width=48, image_loss="smooth_l1")
    [batch] = batches("pictures")
    output = objective(batch)
    outputs, targets = image_outputs(objective, batch)
    difference = (outputs - targets).abs()
    expected = torch.where(difference < 1, difference.square() / 2, difference - 0.5).mean(dim=-1).sum()
    torch.testing.assert_close(output.terms["image_smooth_l1"], expected, rtol=1e-5, atol=0)
    assert objective.weights["image_smooth_l1"] == 1
    assert objective.weights["image_cosine"] == 0  # only watched
    assert output.counts["image_smooth_l1"] == output.counts["image_cosine"] == outputs.shape[:2].numel()


def test_info_nce_is_the_plain_formula(parts, batches):
    objective = distillation(parts[0], image_loss="info_nce", temperature=0.2, tiles_per_set=4)
    [batch] = batches("pictures")
    output = objective(batch)
    outputs, targets = image_outputs(objective, batch)
    assert len(outputs) % 4 != 0  # the last set is smaller
    expected = 0.0
    for start in range(0, len(outputs), 4):
        ours, theirs = outputs[start : start + 4].flatten(0, 1), targets[start : start + 4].flatten(0, 1)
        for patch, vector in enumerate(ours):
            scores = torch.stack([nn.functional.cosine_similarity(vector, other, dim=0) / 0.2 for other in theirs])
            expected += float((scores.exp().sum().log() - scores[patch]).detach())
    assert float(output.terms["image_info_nce"].detach()) == pytest.approx(expected, rel=1e-5)
    assert objective.weights["image_info_nce"] == 1


def test_info_nce_is_low_where_every_patch_finds_its_own_feature():
    targets = torch.randn(4, 9, 32, generator=torch.Generator().manual_seed(0))
    found = _info_nce(targets * 3, targets, 0.05, 2)
    assert float(found) / 36 < 0.01
    assert float(_info_nce(targets.roll(1, dims=1), targets, 0.05, 2)) / 36 > 5


@pytest.mark.parametrize("image_loss", ["cosine", "smooth_l1", "info_nce"])
def test_losses_of_micro_batches_add_up_to_that_of_the_batch(parts, batches, image_loss):
    objective = distillation(parts[0], width=48, image_loss=image_loss, tiles_per_set=1)
    [batch] = batches("pictures")
    whole = objective(batch)
    single = [objective(one) for one in samples_alone_batches(batch, parts[1])]
    for name, term in whole.terms.items():
        torch.testing.assert_close(sum(one.terms[name] for one in single), term, rtol=1e-4, atol=1e-5)
        assert sum(int(one.counts[name]) for one in single) == int(whole.counts[name])


def samples_alone_batches(batch: PackedBatch, processor: HoVLEProcessor) -> list[PackedBatch]:
    return [single for _, _, single in samples_alone(batch, processor.image_seq_length, processor.image_token_id)]


def test_a_cut_between_tile_sets_does_not_change_info_nce():
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(2, 8, 4, 16, generator=generator)
    whole = _info_nce(outputs, targets, 0.1, 4)
    parts = _info_nce(outputs[:4], targets[:4], 0.1, 4) + _info_nce(outputs[4:], targets[4:], 0.1, 4)
    torch.testing.assert_close(parts, whole)
    assert not torch.isclose(_info_nce(outputs, targets, 0.1, 8), whole)


def test_each_matched_layer_has_its_own_features_and_projection(parts, batches):
    model, _ = parts
    objective = distillation(model, 48, layers=(0, -1))
    [batch] = batches("pictures")
    output = objective(batch)
    first, last = objective.teacher.targets(batch, 2).split(48, dim=-1)
    expected = torch.zeros(())
    for layer, projection, target in zip((0, 1), objective.projections, (first, last), strict=True):
        hidden = model.get_holistic_embeddings(**model_inputs(batch), output_hidden_states=True).hidden_states[layer]
        hidden = hidden[batch.input_ids == model.config.image_token_id].unflatten(0, target.shape[:2])
        expected = expected + nn.functional.cosine_similarity(projection(hidden), target, dim=-1).sum()
    torch.testing.assert_close(output.terms["image_cosine"], expected)
    assert output.counts["image_cosine"] == 2 * output.counts["image_scale"]
    output.terms["image_cosine"].backward()
    assert all(projection.weight.grad.abs().max() > 0 for projection in objective.projections)


def test_holistic_hidden_states_are_what_the_layers_give(parts, batches):
    model, _ = parts
    [batch] = batches("pictures")
    seen = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        for layer in model.model.embedding_layers
    ]
    outputs = model.get_holistic_embeddings(**model_inputs(batch), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert len(outputs.hidden_states) == 2
    assert all(torch.equal(found, expected) for found, expected in zip(outputs.hidden_states, seen, strict=True))
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert model.get_holistic_embeddings(**model_inputs(batch)).hidden_states is None


def test_student_layers_that_do_not_exist_are_refused(parts, language_models):
    with pytest.raises(ValueError, match=r"names student layer 2, but there are 2 holistic layers"):
        distillation(parts[0], layers=(2,))
    model = HoVLEForConditionalGeneration.from_language_model(
        language_models["tied"], 2, image_size=56, pixel_shuffle_loc="post", dtype=torch.float32
    )
    with pytest.raises(ValueError, match="HoVLE-HD can match its last holistic layer only"):
        distillation(model, layers=(0, -1))
    distillation(model, layers=(1,))


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
    assert learning_rate_factor(60, 121, 0.0, 0.2, "linear") == pytest.approx(0.6)
    assert learning_rate_factor(120, 121, 0.0, 0.2, "linear") == pytest.approx(0.2)
    assert [learning_rate_factor(step, 4, 0.5, 0.1, "constant") for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert learning_rate_factor(50, 10, 0.1, 0.2) == pytest.approx(0.2)  # never below, even past the end
