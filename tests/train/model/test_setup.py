"""What is set up before the first step: start, frozen and trainable parts, number formats, compiler."""

import dataclasses
import math

import pytest
import torch

from hovle import HoVLEForConditionalGeneration, assets
from hovle.assets import resolve_asset
from hovle.machine import speed
from hovle.machine.speed import choose_dtype
from hovle.train.data.packing import PackedBatches, StreamPosition
from hovle.train.data.records import Record, conversation
from hovle.train.data.samples import ReplySamples
from hovle.train.data.transforms import make_transform
from hovle.train.model import layers
from hovle.train.model.layers import checkpoint_activations, compile_layers
from hovle.train.model.parameters import parameter_groups, select_trainable, store_parameters
from hovle.train.model.start import check_stated_fields, grow, positions_of, start_model
from hovle.train.objectives.next_token import NextTokenObjective
from hovle.train.step.optimizer import make_optimizer, set_learning_rate


def load(folder: str) -> HoVLEForConditionalGeneration:
    return HoVLEForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


# --- start -----------------------------------------------------------------------------------------------------------


def test_a_new_model_is_built_around_the_language_model(distillation_config, language_models):
    model, processor = start_model(distillation_config("model.max_tiles=3"))
    assert model.dtype == torch.float32
    assert model.config.num_embedding_layers == 2
    assert model.config.image_size == processor.image_processor.size["height"] == 56
    assert processor.image_processor.max_patches == 3
    assert processor.image_token_id == model.config.image_token_id


def test_a_checkpoint_is_loaded_in_float32(next_token_config, checkpoints):
    model, processor = start_model(next_token_config())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = load(checkpoints["tied"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name])
    assert processor.image_processor.max_patches == 2


def test_a_shallow_model_grows_by_layers_that_change_nothing(distillation_config, checkpoints):
    lower, (model, _) = load(checkpoints["tied"]), start_model(distillation_config("model.num_embedding_layers=4"))
    with torch.no_grad():  # those of the checkpoint may be the identity themselves
        for parameter in lower.model.embedding_layers.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        pixels, ids = torch.rand(1, 3, 56, 56), torch.tensor([[7, *[lower.config.image_token_id] * 4, 9]])
        expected = lower.get_holistic_embeddings(ids, pixels).last_hidden_state
        grow(model, lower, "shallow")
        found = model.get_holistic_embeddings(ids, pixels).last_hidden_state
    assert model.config.num_embedding_layers == 4
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_recipe_names_what_a_new_model_grows_from(distillation_config, checkpoints):
    overrides = ("model.num_embedding_layers=3", f"model.lower_layers={checkpoints['tied']}")
    model, expected = start_model(distillation_config(*overrides))[0], load(checkpoints["tied"])
    assert torch.equal(model.model.patch_embedding.projection.weight, expected.model.patch_embedding.projection.weight)
    name = "mlp.up_proj.weight"
    for layer, same in ((0, True), (1, True), (2, False)):
        other = expected.model.language_model.layers[layer].get_parameter(name)
        assert torch.equal(model.model.embedding_layers[layer].get_parameter(name), other) == same


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_embedding_layers=1"], r"has 2 holistic layers, but the new model only 1; raise model.num_emb"),
        (
            ["model.image_size=84"],
            r"does not fit below the new model; expected one around the same(.|\n)*position_emb",
        ),
        (["model.pixel_shuffle_loc=none"], r"does not fit below the new model(.|\n)*projector"),
        (["model.untie_text_embeddings=true"], r"does not fit below the new model(.|\n)*text_embeddings"),
        (["model.lower_layers=nowhere"], r"model.lower_layers: (.|\n)*nowhere"),
    ],
)
def test_a_model_grows_only_from_what_fits(distillation_config, checkpoints, overrides, message):
    with pytest.raises(ValueError, match=message):
        start_model(distillation_config(f"model.lower_layers={checkpoints['tied']}", *overrides))


def test_only_a_new_model_grows(next_token_config):
    with pytest.raises(ValueError, match="lower_layers are put into a new model: name its language_model"):
        next_token_config("model.lower_layers=runs/letters/model")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("image_size=84", "model.image_size is 84, but .* has 56"),
        ("num_embedding_layers=4", "model.num_embedding_layers is 4, but .* has 2"),
        ("pixel_shuffle_loc=post", "model.pixel_shuffle_loc is post, but .* has pre"),
        ("untie_text_embeddings=true", "model.untie_text_embeddings is True, but .* has False"),
        ("max_tiles=6", "model.max_tiles is 6, but .* has 2"),
    ],
)
def test_a_recipe_that_describes_a_checkpoint_wrongly_is_refused(next_token_config, override, message):
    with pytest.raises(ValueError, match=message):
        start_model(next_token_config(f"model.{override}"))


def test_a_recipe_that_describes_a_checkpoint_rightly_is_accepted(next_token_config):
    config = next_token_config("model.image_size=56", "model.num_embedding_layers=2", "model.max_tiles=2")
    check_stated_fields(config.model, *start_model(config))


@pytest.mark.parametrize(
    ("language", "own", "shared"),
    [
        ({"rope_type": "default"}, None, math.inf),
        ({"rope_type": "dynamic", "factor": 2.0}, None, 256),
        ({"rope_type": "longrope", "original_max_position_embeddings": 64}, None, 64),
        ({"rope_type": "default"}, {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 128}, 128),
    ],
)
def test_the_stage_knows_how_long_questions_about_one_picture_may_be(checkpoints, language, own, shared):
    config = HoVLEForConditionalGeneration.from_pretrained(checkpoints["tied"]).config
    config.text_config.max_position_embeddings = 256
    config.text_config.rope_parameters = {"rope_theta": 1e4, **language}
    config.embedding_rope_parameters = own
    assert positions_of(config) == (256, shared)


def test_assets_are_found_by_name_and_other_names_stay():
    assert resolve_asset("asset:efficientnet-lite0") == str(assets.teacher())
    assert resolve_asset("org/model") == "org/model"
    with pytest.raises(ValueError, match="Unknown asset 'smollm'; known here: smollm2-135m-instruct"):
        resolve_asset("asset:smollm")


# --- what trains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_every_parameter_belongs_to_one_group(checkpoints, kind):
    model = load(checkpoints[kind])
    grouped = [id(item) for group in parameter_groups(model).values() for item in group]
    assert sorted(grouped) == sorted(id(item) for item in model.parameters())


def test_only_the_named_groups_train(checkpoints, next_token_config):
    model = load(checkpoints["untied"])
    select_trainable(model, next_token_config("trainable=[holistic_layers, text_embeddings]"))
    names = {name for name, item in model.named_parameters() if item.requires_grad}
    named = ("model.language_model.embed_tokens.", "model.language_model.layers.0.", "model.language_model.layers.1.")
    assert names == {name for name, _ in model.named_parameters() if name.startswith(named)}
    assert len({name.split(".")[3] for name in names}) == 3  # the table and either layer


def test_a_tied_table_cannot_train_alone(checkpoints, next_token_config):
    with pytest.raises(ValueError, match="tied to the head"):
        select_trainable(load(checkpoints["tied"]), next_token_config("trainable=[text_embeddings]"))


def test_only_matrices_decay(checkpoints, next_token_config):
    config = next_token_config("weight_decay=0.3")
    model = load(checkpoints["tied"])
    select_trainable(model, config)
    optimizer = make_optimizer(NextTokenObjective(model), config)
    matrices, vectors = optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert all(item.dim() > 1 for item in matrices["params"])
    assert all(item.dim() == 1 for item in vectors["params"])
    trainable = [item for item in model.parameters() if item.requires_grad]
    assert len(matrices["params"]) + len(vectors["params"]) == len(trainable)
    assert (matrices["lr"], matrices["betas"]) == (1e-3, (0.9, 0.95))


def test_parts_have_learning_rates_of_their_own(checkpoints, next_token_config):
    config = next_token_config("weight_decay=0.3", "learning_rates.stem=0.5", "schedule=constant", "warmup_ratio=0")
    model = load(checkpoints["tied"])
    select_trainable(model, config)
    optimizer = make_optimizer(NextTokenObjective(model), config)
    rates = {id(item): group["lr"] for group in optimizer.param_groups for item in group["params"]}
    groups = parameter_groups(model)
    assert {rates[id(item)] for item in groups["stem"]} == {0.5}
    assert {rates[id(item)] for item in groups["holistic_layers"]} == {1e-3}
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.0, 0.3, 0.3]
    peaks = [group["lr"] for group in optimizer.param_groups]
    falling = dataclasses.replace(config, schedule="linear", final_learning_rate_ratio=0.5)
    assert set_learning_rate(optimizer, peaks, falling, config.num_steps - 1) == pytest.approx(5e-4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([peak / 2 for peak in peaks])


# --- number formats --------------------------------------------------------------------------------------------------


def test_frozen_weights_are_stored_small_only_where_that_rounds_nothing(checkpoints, next_token_config):
    model = load(checkpoints["tied"])
    select_trainable(model, next_token_config("trainable=[stem]"))
    before = {name: item.detach().clone() for name, item in model.named_parameters()}
    store_parameters(model, torch.bfloat16)
    types = {name: item.dtype for name, item in model.named_parameters()}
    # The language model's weights are exact in bfloat16; those of the new layers are not. New rows of the table, too.
    assert types["model.language_model.layers.2.mlp.up_proj.weight"] == torch.bfloat16
    assert types["model.language_model.layers.0.mlp.up_proj.weight"] == torch.float32  # frozen, not exact
    assert types["model.projector.linear_1.weight"] == torch.float32  # trainable
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.float(), before[name])
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_float32_stores_everything_in_float32(checkpoints, next_token_config):
    model = load(checkpoints["tied"])
    select_trainable(model, next_token_config())
    store_parameters(model, torch.float32)
    assert {item.dtype for item in model.parameters()} == {torch.float32}


def test_the_number_format_is_the_named_or_the_faster_one(monkeypatch):
    device = torch.device("cpu")
    assert choose_dtype("bfloat16", device) == torch.bfloat16
    assert choose_dtype("float32", device) == torch.float32
    for fast in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(speed, "_matmul_seconds", lambda dtype, *_, fast=fast: 1.0 if dtype == fast else 2.0)
        assert choose_dtype("auto", device) == fast


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("questions", [1, 2], ids=["packed", "with a mask"])
def test_activation_checkpointing_runs_each_layer_twice_and_changes_no_bit(
    parts, batches, data, next_token_config, questions
):
    model, processor = parts
    [batch] = batches("chat")
    if questions == 2:
        picture = data / "pictures" / "00.png"
        others = (conversation(picture, "A tree?", "The street."),)
        record = Record("x", conversation(picture, "Why?", "A bus"), others)
        stream = PackedBatches([record], ReplySamples(processor), next_token_config(), StreamPosition(), 0, 1, 0)
        batch = next(iter(stream))
        assert batch.attention_mask is not None
    objective = NextTokenObjective(model)
    calls: list[int] = []
    for index, layer in enumerate(model.model.language_model.layers):
        layer.mlp.register_forward_pre_hook(lambda *args, index=index: calls.append(index))
    gradients = []
    for enabled in (False, True):
        if enabled:
            checkpoint_activations(model)
        calls.clear()
        objective(batch).terms["cross_entropy"].backward()
        assert sorted(calls) == sorted([0, 1, 2, 3] * (1 + enabled))
        gradients.append([item.grad for item in model.parameters()])
        model.zero_grad(set_to_none=True)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_activation_checkpointing_sends_no_gradient_where_nothing_learns(parts, next_token_config):
    model, _ = parts
    select_trainable(model, next_token_config("trainable=[language_model]"))
    model.get_input_embeddings().weight.requires_grad_(False)
    checkpoint_activations(model)
    hidden_states = model.get_holistic_embeddings(torch.tensor([[5, 6, 7]])).last_hidden_state
    assert not hidden_states.requires_grad


@pytest.mark.slow
# The compiler looks at the gradient of every input it guards, hidden states among them.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_activation_checkpointing_works_in_compiled_layers(parts, batches):
    model, _ = parts
    objective, [batch] = NextTokenObjective(model), batches("chat")
    gradients = []
    for enabled in (False, True):
        if enabled:
            checkpoint_activations(model)
            assert compile_layers(model, "on")
        objective(batch).terms["cross_entropy"].backward()
        gradients.append([item.grad for item in model.parameters()])
        model.zero_grad(set_to_none=True)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, atol=1e-3, rtol=1e-3)


# --- compiler --------------------------------------------------------------------------------------------------------


def test_without_a_compiler_layers_run_eager_and_the_run_says_so(parts, monkeypatch, capsys):
    monkeypatch.setattr(layers, "compiler_problem", lambda device: f"no g++ found for {device}")
    model, _ = parts
    assert compile_layers(model, "auto") is False
    assert "no g++ found for cpu" in capsys.readouterr().out
    assert all(layer._compiled_call_impl is None for layer in model.model.language_model.layers)
    with pytest.raises(ValueError, match=r"compile is on, but .* no g\+\+ found"):
        compile_layers(model, "on")


def test_off_means_off_and_silent(parts, capsys):
    assert compile_layers(parts[0], "off") is False
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("limit", "tokens"), [(None, 3 * 4), (1, 4)])
def test_a_stage_may_cut_pictures_into_fewer_tiles_than_the_model_allows(
    parts, data, next_token_config, limit, tokens
):
    _, processor = parts
    wide = data / "pictures" / "00.png"  # two tiles and a thumbnail
    config = next_token_config(f"max_tiles_per_picture={'null' if limit is None else limit}")
    maker = make_transform(config, processor)
    sample = maker.make(Record("wide", conversation(wide, "what?", "a bus")), 0)
    assert int((sample.input_ids == parts[0].config.image_token_id).sum()) == tokens
    assert processor.image_processor.max_patches == 2
