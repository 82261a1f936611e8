"""The language term: distance from the bare language model on text without pictures."""

import contextlib
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from hovle import HoVLEForConditionalGeneration
from hovle.train.config import DistillationConfig, StageConfig
from hovle.train.data.batch import PackedBatch, TileBatch
from hovle.train.data.packing import PackedBatches, StreamPosition
from hovle.train.data.records import Record
from hovle.train.data.samples import ReplySamples
from hovle.train.model.bare_language_model import BareLanguageModel, bare_logits
from hovle.train.objectives.distillation import DistillationObjective
from hovle.train.objectives.held_language import HeldLanguage, divergence, prompt_places
from hovle.train.objectives.next_token import NextTokenObjective
from hovle.train.objectives.teachers import Targets
from hovle.train.step.assembly import TrainableModel, TrainableStep, prepare_model
from hovle.train.step.train_step import train_step

CPU = torch.device("cpu")


def prepared(model: HoVLEForConditionalGeneration, config: StageConfig) -> TrainableModel:
    return prepare_model(model, config, torch.float32, CPU)


def objective_of(
    trainable: TrainableModel, weight: float = 1.0, *, by: str = "kl_weight", around_images: bool = False
) -> NextTokenObjective:
    """Holds what the language model says, or with `by="weight"` what enters it."""
    weights = {"weight": 0.0, "kl_weight": 0.0} | {by: weight}
    held = HeldLanguage(BareLanguageModel(trainable.model, torch.float32), around_images=around_images, **weights)
    return NextTokenObjective(trainable.model, held=held).train()


def with_text(batch: PackedBatch, rows: int = 1, length: int = 60) -> PackedBatch:
    """The batch with one or two documents of random text in front of its last rows' samples, which are gone."""
    ids = torch.randint(20, 400, (rows, length), generator=torch.Generator().manual_seed(5))
    values = {name: getattr(batch, name).clone() for name in ("input_ids", "targets", "position_ids", "is_sample")}
    plain = len(batch.input_ids) - rows
    values["input_ids"][plain:], values["targets"][plain:], values["is_sample"][plain:] = 0, -100, False
    values["input_ids"][plain:, :length], values["is_sample"][plain:, :length] = ids, True
    ends = torch.cat([torch.arange(length // 3), torch.arange(length - length // 3)])
    values["position_ids"][plain:, :length] = ends
    values["position_ids"][plain:, length:] = torch.arange(batch.input_ids.shape[1] - length)
    tiles = int((values["input_ids"] == batch_image_token(batch)).sum()) // tokens_per_tile(batch)
    return PackedBatch(
        **values,
        pixel_values=batch.pixel_values[:tiles],
        num_language_rows=rows,
        language_length=length,
        names=batch.names,
    )


def batch_image_token(batch: PackedBatch) -> int:
    """The most frequent id of the pictures' places."""
    return int(batch.input_ids.flatten().bincount()[1:].argmax()) + 1


def tokens_per_tile(batch: PackedBatch) -> int:
    return int((batch.input_ids == batch_image_token(batch)).sum()) // len(batch.pixel_values)


@pytest.fixture
def batch(batches) -> PackedBatch:
    [batch] = batches("chat")
    return with_text(batch)


def terms_of(objective: NextTokenObjective, batch: PackedBatch) -> dict[str, torch.Tensor]:
    return objective(batch).terms


def test_a_new_model_is_no_distance_from_the_bare_one(language_models, next_token_config, batch):
    model = HoVLEForConditionalGeneration.from_language_model(
        language_models["tied"], 2, dtype=torch.float32, image_size=56
    )
    objective = objective_of(prepared(model, next_token_config()))
    output = objective(batch)
    assert int(output.counts["language_kl"]) == 60
    assert abs(float(output.terms["language_kl"].detach())) < 1e-4


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_distance_is_that_from_the_original_language_model(
    language_models, checkpoints, next_token_config, batch, kind
):
    model = HoVLEForConditionalGeneration.from_pretrained(checkpoints[kind], dtype=torch.float32)
    objective = objective_of(prepared(model, next_token_config()))
    found = terms_of(objective, batch)["language_kl"]
    original = AutoModelForCausalLM.from_pretrained(language_models[kind], dtype=torch.float32)
    ids, positions = batch.input_ids[-1:, :60], batch.position_ids[-1:, :60]
    with torch.no_grad():
        rows = model.config.text_config.vocab_size
        original.resize_token_embeddings(rows)
        original.lm_head.weight.copy_(model.lm_head.weight)  # the rows of picture tokens are new
        expected = original(ids, position_ids=positions, use_cache=False).logits.log_softmax(-1)
        ours = model(ids, position_ids=positions, use_cache=False).logits.log_softmax(-1)
        reference = (expected.exp() * (expected - ours)).sum()
    assert float(reference) > 1
    torch.testing.assert_close(found.detach(), reference, rtol=1e-4, atol=1e-4)


def test_the_gradient_goes_into_what_learns_and_nowhere_else(parts, next_token_config, batch):
    trainable = prepared(parts[0], next_token_config())
    terms_of(objective_of(trainable), batch)["language_kl"].backward()
    reached = {name for name, item in trainable.model.named_parameters() if item.grad is not None and item.grad.any()}
    assert reached
    assert all(".layers.0." in name or ".layers.1." in name for name in reached)


def test_the_other_terms_are_those_without_text(parts, next_token_config, batches):
    trainable = prepared(parts[0], next_token_config())
    [batch] = batches("chat")
    held, free = objective_of(trainable), NextTokenObjective(trainable.model)
    batch = with_text(batch)
    for name, value in terms_of(free, batch).items():
        assert torch.equal(value, terms_of(held, batch)[name])
    assert "language_kl" not in free.weights


def test_the_weight_is_the_recipes(parts, next_token_config):
    trainable = prepared(parts[0], next_token_config())
    assert objective_of(trainable, 2.5).weights["language_kl"] == 2.5


def test_a_frozen_language_model_is_not_copied(parts, next_token_config):
    bare = BareLanguageModel(prepared(parts[0], next_token_config()).model, torch.float32)
    assert not list(bare.parameters())


@pytest.mark.parametrize("trainable", ["[language_model]", "[stem, holistic_layers, language_model]"])
def test_a_language_model_that_learns_is_held_to_a_copy_of_its_start(parts, next_token_config, batch, trainable):
    prepared_model = prepared(parts[0], next_token_config(f"trainable={trainable}"))
    model, objective = prepared_model.model, objective_of(prepared_model)
    assert not any(item.requires_grad for item in objective.held.bare.parameters())
    ids, positions = batch.input_ids[-1:, :60], batch.position_ids[-1:, :60]
    before = objective.held.bare(model, ids, positions)
    with torch.no_grad():
        for part in [*model.model.language_layers, model.model.language_model.norm, model.lm_head]:
            for parameter in part.parameters():
                parameter.mul_(1.3)
    assert torch.equal(objective.held.bare(model, ids, positions), before)
    assert float(terms_of(objective, batch)["language_kl"].detach()) > 1


def test_copies_are_stored_in_the_number_format_of_the_products(parts, next_token_config):
    model = prepare_model(parts[0], next_token_config("trainable=[language_model]"), torch.bfloat16, CPU).model
    bare = BareLanguageModel(model, torch.bfloat16)
    assert {item.dtype for item in bare.parameters()} == {torch.bfloat16}
    layers = sum(item.numel() for item in model.model.language_layers.parameters())
    table = model.lm_head.weight.numel()
    assert sum(item.numel() for item in bare.parameters()) == layers + table + 64  # tied: one table


def test_only_a_text_table_that_learns_is_copied(checkpoints, next_token_config):
    model = HoVLEForConditionalGeneration.from_pretrained(checkpoints["untied"], dtype=torch.float32)
    config = next_token_config(f"model.checkpoint={checkpoints['untied']}", "trainable=[text_embeddings]")
    bare = BareLanguageModel(prepared(model, config).model, torch.float32)
    assert [tuple(item.shape) for item in bare.parameters()] == [tuple(model.get_input_embeddings().weight.shape)]


# peft 0.21.2 asks for `is_gradient_checkpointing`, which transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_left_out_of_the_bare_model_only(parts, next_token_config, batch):
    pytest.importorskip("peft")
    trainable = prepared(parts[0], next_token_config("trainable=[]", "lora.rank=2"))
    objective = objective_of(trainable)
    ids, positions = batch.input_ids[-1:, :60], batch.position_ids[-1:, :60]
    before = objective.held.bare(trainable.model, ids, positions)
    assert not list(objective.held.bare.parameters())
    untouched = terms_of(objective, batch)["language_kl"].detach()
    adapters = {name: item for name, item in trainable.model.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for item in adapters.values():
            item.normal_()
    assert torch.equal(objective.held.bare(trainable.model, ids, positions), before)
    assert all(item.requires_grad for item in adapters.values())
    moved = terms_of(objective, batch)["language_kl"]
    assert float(moved.detach()) != pytest.approx(float(untouched), rel=1e-2)
    moved.backward()
    assert all(item.grad is not None for item in adapters.values())


def test_the_bare_model_has_no_dropout(parts, next_token_config, batch):
    model = prepared(parts[0], next_token_config()).model.train()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    bare = BareLanguageModel(model, torch.float32)
    ids, positions = batch.input_ids[-1:, :60], batch.position_ids[-1:, :60]
    assert torch.equal(bare(model, ids, positions), bare(model, ids, positions))
    assert all(layer.training for layer in model.model.language_layers)


def test_cutting_a_step_does_not_change_it(parts, next_token_config, batches):
    """Counts join what micro-batches, and so processes, hold: rows of text and rows without."""
    [batch] = batches("chat")
    whole = with_text(batch)
    plain = int((whole.input_ids[0] == batch_image_token(batch)).sum()) // tokens_per_tile(batch)
    names = ("input_ids", "targets", "position_ids", "is_sample")
    first = PackedBatch(**{name: getattr(whole, name)[:1] for name in names}, pixel_values=whole.pixel_values[:plain])
    second = PackedBatch(
        **{name: getattr(whole, name)[1:] for name in names},
        pixel_values=whole.pixel_values[plain:],
        num_language_rows=1,
        language_length=60,
    )
    trainable = prepared(parts[0], next_token_config())
    results = []
    for micro_batches in ([whole], [first, second]):
        objective = objective_of(trainable)
        optimizer = torch.optim.SGD([item for item in objective.parameters() if item.requires_grad], lr=0.0)
        results.append(train_step(objective, optimizer, micro_batches, 1.0, contextlib.nullcontext()))
    for name, value in results[0].terms.items():
        assert results[1].terms[name] == pytest.approx(value, rel=1e-4)
    assert results[1].gradient_norm == pytest.approx(results[0].gradient_norm, rel=1e-4)


def test_the_term_pulls_the_model_back_to_the_bare_one(parts, next_token_config, batch, one_process):
    config = next_token_config("trainable=[holistic_layers]", "learning_rate=3e-3", "num_steps=30")
    trainable = prepared(parts[0], config)
    step = TrainableStep(trainable, objective_of(trainable, 10.0), config, one_process, torch.float32).distribute()
    distances = [step.step(number, [batch]).terms["language_kl"] for number in range(25)]
    assert distances[-1] < 0.5 * distances[0]


def test_compiled_layers_give_the_same_distance(parts, next_token_config, batch):
    trainable = prepared(parts[0], next_token_config())
    graphs: list[bool] = []

    def note(graph, inputs):
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    with torch.no_grad():
        expected = terms_of(objective_of(trainable), batch)["language_kl"]
        for layer in trainable.model.model.language_model.layers:
            layer.compile(backend=note)
        found = terms_of(objective_of(trainable), batch)["language_kl"]
    assert graphs
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- text around pictures --------------------------------------------------------------------------------------------


def around(trainable: TrainableModel) -> NextTokenObjective:
    return objective_of(trainable, 2.5, around_images=True)


def test_text_around_pictures_is_held_by_the_same_weight_and_nothing_else_changes(parts, next_token_config, batch):
    trainable = prepared(parts[0], next_token_config())
    objective, plain = around(trainable), objective_of(trainable)
    assert objective.weights["prompt_kl"] == objective.weights["language_kl"] == 2.5
    found, expected = objective(batch), plain(batch)
    assert "prompt_kl" not in expected.terms
    assert all(torch.equal(found.terms[name], value) for name, value in expected.terms.items())
    assert float(found.terms["prompt_kl"].detach()) > 0


def test_only_words_before_words_of_prompts_are_held(parts, next_token_config, batch):
    trainable = prepared(parts[0], next_token_config())
    objective = around(trainable)
    places = prompt_places(batch, trainable.model.config.image_token_id)
    assert int(objective.counts(batch)["prompt_kl"]) == int(places.sum()) > 0
    token = trainable.model.config.image_token_id
    for row, column in itertools.product(*map(range, batch.input_ids.shape)):
        is_text = batch.is_sample[row, column] and batch.input_ids[row, column] != token
        next_id = batch.input_ids[row, (column + 1) % batch.input_ids.shape[1]]
        is_held = is_text and batch.targets[row, column] == -100 and next_id != token
        in_text = row >= len(places) - batch.num_language_rows and column < batch.language_length
        assert bool(places[row, column]) == bool(is_held and not in_text)


def test_identity_layers_are_no_distance_from_the_bare_model_around_pictures(
    language_models, next_token_config, batch
):
    model = HoVLEForConditionalGeneration.from_language_model(
        language_models["tied"], 2, dtype=torch.float32, image_size=56
    )
    assert abs(float(around(prepared(model, next_token_config()))(batch).terms["prompt_kl"].detach())) < 1e-4


@pytest.mark.parametrize("fields", [{}, {"pixel_shuffle_loc": "post"}, {"normalize_encoder_output": True}])
def test_the_bare_model_reads_plain_words_and_our_pictures(language_models, next_token_config, batch, fields):
    """By hand: the language model's layers on embeddings of words and what our layers make of the pictures."""
    model = HoVLEForConditionalGeneration.from_language_model(
        language_models["tied"], 2, dtype=torch.float32, image_size=56, **fields
    )
    with torch.no_grad():
        for layer in model.model.embedding_layers:
            layer.mlp.down_proj.weight.normal_(std=0.1)
    trainable = prepared(model, next_token_config())
    part = one_row(batch) if model.model.is_hd else batch
    objective = around(trainable)
    ids, positions, token = part.input_ids, part.position_ids, model.config.image_token_id
    with torch.no_grad():
        found = objective(part).terms["prompt_kl"]
        holistic = model.get_holistic_embeddings(
            input_ids=ids, pixel_values=objective.normalize(part.pixel_values), position_ids=positions
        )
        is_image = (ids == token)[..., None]
        embeds = torch.where(is_image, holistic.language_inputs_embeds, model.get_input_embeddings()(ids))
        expected = bare_logits(model, embeds, positions)
        ours = bare_logits(model, holistic.language_inputs_embeds, positions)
        places = prompt_places(part, model.config.image_token_id)
    torch.testing.assert_close(found, divergence(expected[places], ours[places]), rtol=1e-4, atol=1e-4)
    assert float(found) > 0


def one_row(batch: PackedBatch) -> PackedBatch:
    """The first row alone, which has no text."""
    num_tiles = int((batch.input_ids[0] == batch_image_token(batch)).sum()) // tokens_per_tile(batch)
    names = ("input_ids", "targets", "position_ids", "is_sample")
    fields: dict = {name: getattr(batch, name)[:1] for name in names}
    return PackedBatch(**fields, pixel_values=batch.pixel_values[:num_tiles])


def test_the_gradient_reaches_the_holistic_layers_but_not_through_the_bare_model(parts, next_token_config, batch):
    trainable = prepared(parts[0], next_token_config())
    around(trainable)(batch).terms["prompt_kl"].backward()
    gradients = {name: item.grad for name, item in trainable.model.named_parameters() if item.grad is not None}
    reached = {name for name, gradient in gradients.items() if gradient.any()}
    assert any(".layers.0." in name for name in reached)
    assert any("patch_embedding" in name for name in reached)  # our own reading of the prompt looks at the pictures
    assert all(".layers.0." in name or ".layers.1." in name or "patch" in name or "proj" in name for name in reached)


def test_the_bare_model_hears_no_other_question_about_a_shared_picture(parts, next_token_config, data):
    model, processor = parts
    objective, maker = around(prepared(model, next_token_config())), ReplySamples(processor)

    def asked(question: str) -> Record:
        content = [{"type": "image", "path": str(data / "pictures" / "01.png")}, {"type": "text", "text": question}]
        return Record(question, [{"role": "user", "content": content}, {"role": "assistant", "content": "A bus."}])

    def of_the_first(*records: Record) -> torch.Tensor:
        """What the bare model says at the first question, behind the picture that all of them share."""
        config = next_token_config("rows_per_batch=1")
        [batch] = itertools.islice(
            PackedBatches([Record.join(records)], maker, config, StreamPosition(), 0, 1, pad_token_id=0), 1
        )
        assert (batch.attention_mask is None) == (len(records) == 1)
        images = model.model(
            input_ids=batch.input_ids,
            pixel_values=objective.normalize(batch.pixel_values),
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
        ).image_hidden_states
        sample = maker.make(Record.join(records), 0)
        ids = torch.ones_like(sample.input_ids) if sample.subsegment_ids is None else sample.subsegment_ids
        is_own = ids[sample.is_input] == 1
        places = prompt_places(batch, model.config.image_token_id)
        places[0, : len(is_own)] &= is_own
        places[0, len(is_own) :] = False  # more samples of the same records
        return objective.held.bare(model, batch.input_ids, batch.position_ids, images, batch.attention_mask, places)

    first, others = asked("What is in the picture, please?"), [asked("Why?"), asked("How many apples are there?")]
    found = [of_the_first(first, other) for other in others]
    assert len(found[0]) > 2
    assert torch.equal(found[0], found[1])
    alone = of_the_first(first)[-len(found[0]) :]
    torch.testing.assert_close(found[0], alone, rtol=1e-4, atol=1e-5)


# --- distillation ----------------------------------------------------------------------------------------------------


class NoTeacher(Targets):
    def raw_targets(self, batch: TileBatch, grid_size: int) -> torch.Tensor:
        return torch.ones(len(batch.pixel_values), grid_size**2, 64)


def distillation_of(model: HoVLEForConditionalGeneration, weight: float | None = 1.0) -> DistillationObjective:
    table = model.model.input_embedding_matrix()
    return DistillationObjective(model, NoTeacher([64]), table, DistillationConfig(), language_weight=weight)


def test_in_distillation_text_is_pulled_to_its_embeddings(parts, batch):
    model, _ = parts
    output = distillation_of(model)(batch)
    ids, positions = batch.input_ids[-1:, :60], batch.position_ids[-1:, :60]
    entering = model.model.get_holistic_embeddings(input_ids=ids, position_ids=positions).language_inputs_embeds
    targets = model.get_input_embeddings()(ids)
    expected = ((entering - targets).norm(dim=-1) / targets.norm(dim=-1)).square().sum()
    assert float(expected.detach()) > 1
    torch.testing.assert_close(output.terms["text_error"], expected, rtol=1e-4, atol=1e-4)
    assert int(output.counts["text_error"]) == 60
    plain = distillation_of(model, None)(batch)
    assert "text_error" not in plain.terms
    for name, value in plain.terms.items():
        assert torch.equal(value, output.terms[name])
    assert int(plain.counts["text_cosine"]) == int((batch.is_sample & (batch.input_ids != 0)).sum()) - int(
        (batch.input_ids == model.config.image_token_id).sum()
    )


def test_the_error_sees_a_length_that_the_cosine_does_not(parts, batch):
    model, _ = parts
    objective = distillation_of(model)
    with torch.no_grad():
        for layer in model.model.embedding_layers:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight.zero_()
        exact = objective(batch).terms
        objective.text_table.mul_(0.5)
        halved = objective(batch).terms
    assert float(exact["text_error"]) == 0
    assert float(halved["text_error"]) == pytest.approx(60, rel=1e-4)
    torch.testing.assert_close(halved["text_cosine"], exact["text_cosine"], rtol=1e-5, atol=1e-4)


def test_a_batch_without_text_has_no_error(parts, batches):
    [batch] = batches("chat")
    output = distillation_of(parts[0])(batch)
    assert float(output.terms["text_error"].detach()) == int(output.counts["text_error"]) == 0


# --- what enters the language model ----------------------------------------------------------------------------------


def whole_rows(batches) -> PackedBatch:
    [batch] = batches("chat")
    return with_text(batch, length=batch.input_ids.shape[1])


def test_alignment_holds_what_enters_the_language_model_as_distillation_does(parts, next_token_config, batches):
    trainable, batch = prepared(parts[0], next_token_config()), whole_rows(batches)
    found = objective_of(trainable, by="weight")(batch)
    expected = distillation_of(trainable.model)(batch)
    assert "language_kl" not in found.terms
    assert int(found.counts["text_error"]) == batch.input_ids.shape[1]
    torch.testing.assert_close(found.terms["text_error"], expected.terms["text_error"], rtol=1e-4, atol=1e-4)
    found.terms["text_error"].backward()
    reached = {name for name, item in trainable.model.named_parameters() if item.grad is not None and item.grad.any()}
    assert reached
    assert all(".layers.0." in name or ".layers.1." in name for name in reached)


def test_whole_rows_of_text_do_not_enter_a_language_model_that_is_not_asked(parts, next_token_config, batches):
    trainable, batch = prepared(parts[0], next_token_config()), whole_rows(batches)
    num_rows: list[int] = []
    first = trainable.model.model.language_layers[0]
    first.register_forward_pre_hook(lambda _, args: num_rows.append(len(args[0])))
    below = terms_of(objective_of(trainable, by="weight"), batch)
    through = terms_of(objective_of(trainable), batch)
    assert num_rows == [len(batch.input_ids) - 1, len(batch.input_ids), 1]  # the last one: the bare language model
    for name in NextTokenObjective.weights:
        torch.testing.assert_close(below[name], through[name], rtol=1e-5, atol=1e-5)


def test_rows_that_hold_samples_too_enter_the_language_model(parts, next_token_config, batch):
    objective = objective_of(prepared(parts[0], next_token_config()), by="weight")
    assert objective.held.num_rows_through_language_model(batch) == len(batch.input_ids)


def test_what_prompts_enter_the_language_model_as_is_held_too(parts, next_token_config, batch):
    trainable = prepared(parts[0], next_token_config())
    objective = objective_of(trainable, by="weight", around_images=True)
    output = objective(batch)
    places = prompt_places(batch, trainable.model.config.image_token_id)
    entering = trainable.model.get_holistic_embeddings(
        input_ids=batch.input_ids,
        pixel_values=objective.normalize(batch.pixel_values),
        position_ids=batch.position_ids,
    ).language_inputs_embeds[places]
    targets = trainable.model.get_input_embeddings()(batch.input_ids[places])
    expected = ((entering - targets).norm(dim=-1) / targets.norm(dim=-1)).square().sum()
    assert int(output.counts["prompt_error"]) == int(places.sum()) > 0
    torch.testing.assert_close(output.terms["prompt_error"], expected, rtol=1e-4, atol=1e-4)
