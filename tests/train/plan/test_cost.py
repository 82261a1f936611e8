"""Operations and memory of a stage from its shapes, held against torch's own counter and a real process."""

import dataclasses

import pytest
import torch
import yaml
from torch import nn

from hovle.train.config import load_stage
from hovle.train.model import quantization
from hovle.train.objectives.letter_guide import LetterGuide
from hovle.train.plan.command import TOLERANCE, check_stage
from hovle.train.plan.cost import INT8_ROW_BYTES, QUANTIZED_BYTES, StageCost, Workload
from hovle.train.plan.random_step import measure_random_step, random_batch
from hovle.train.plan.shapes import model_config

# peft 0.21.2 asks for `is_gradient_checkpointing`, which transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EXPECTED = "expected={tiles_per_sample: 1.5, text_tokens_per_sample: 20, supervised_tokens_per_sample: 9}"

NEXT_TOKEN = {
    "alignment": [],
    "stem alone": ["trainable=[stem]"],
    "holistic layers alone": ["trainable=[holistic_layers]"],
    "tuning": ["trainable=[stem, holistic_layers, language_model]"],
    "the language model alone": ["trainable=[language_model]"],
    "adapters": ["trainable=[]", "lora.rank=4"],
    "adapters and alignment": ["lora.rank=4"],
    "two micro-batches": ["gradient_accumulation_steps=2"],
    "checkpointing": ["activation_checkpointing=true"],
    "checkpointing, stem alone": ["trainable=[stem]", "activation_checkpointing=true"],
    "checkpointing, the language model alone": ["trainable=[language_model]", "activation_checkpointing=true"],
    "checkpointing adapters": ["lora.rank=4", "activation_checkpointing=true"],
}

HELD = {
    "alignment": [],
    "alignment, whole rows": ["language.share=0.5"],
    "alignment, whole rows run again": ["language.share=0.5", "activation_checkpointing=true"],
    "alignment by what it says": ["language.kl_weight=1"],
    "tuning": ["trainable=[stem, holistic_layers, language_model]"],
    "adapters": ["trainable=[]", "lora.rank=4"],
    "around images": ["language.kl_weight=1", "language.around_images=true"],
}


def assert_counted(config, dtype, folder, tolerance: float) -> None:
    model = model_config(config)
    measured = measure_random_step(config, model, dtype, folder)
    predicted = StageCost(config, model, dtype).flops(measured.workload)
    assert sum(predicted.values()) == pytest.approx(measured.flops, rel=tolerance)


@pytest.mark.parametrize("kind", NEXT_TOKEN)
def test_operations_of_next_token_stages_are_those_of_torchs_counter(next_token_config, tmp_path, kind):
    # Worst 2 %, adapters, where the first layer's inputs need no gradient: one of only two layers here.
    assert_counted(next_token_config(EXPECTED, *NEXT_TOKEN[kind]), torch.float32, tmp_path, tolerance=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_of_distillation_are_those_of_torchs_counter(distillation_config, tmp_path, dtype):
    assert_counted(distillation_config(EXPECTED), dtype, tmp_path, tolerance=0.02)


@pytest.mark.parametrize("kind", HELD)
def test_operations_of_next_token_stages_that_hold_the_language_are_those_of_torchs_counter(
    next_token_config, tmp_path, kind
):
    config = next_token_config(EXPECTED, "language.source=python_docs", "language.share=0.3", *HELD[kind])
    assert_counted(config, torch.float32, tmp_path, tolerance=0.05)


def test_operations_of_distillation_that_holds_the_language_are_those_of_torchs_counter(distillation_config, tmp_path):
    config = distillation_config(EXPECTED, "language.source=python_docs", "language.share=0.3")
    assert_counted(config, torch.float32, tmp_path, tolerance=0.02)


TAUGHT = "objective.words={num_others: 300, characters: {layer: -2}}"


def test_operations_of_words_are_those_of_torchs_counter(distillation_config, tmp_path):
    # Half of the operations are the words' own, so that a missing product would show.
    told = EXPECTED.replace("}", ", word_pieces_per_sample: 5, read_tokens_per_sample: 6}")
    config = distillation_config(told, TAUGHT, "model.image_size=112")
    assert_counted(config, torch.float32, tmp_path, tolerance=0.02)


def test_operations_of_a_guide_are_those_of_torchs_counter(distillation_config, tmp_path):
    told = EXPECTED.replace("}", ", word_pieces_per_sample: 5, read_tokens_per_sample: 6}")
    guided = TAUGHT.replace("layer: -2", "layer: -2, guide_weight: 1")
    config = distillation_config(told, guided, "model.image_size=112")
    assert_counted(config, torch.float32, tmp_path, tolerance=0.02)
    model = model_config(config)
    without, cost = (
        StageCost(item, model, torch.float32)
        for item in (distillation_config(told, TAUGHT, "model.image_size=112"), config)
    )
    guide = LetterGuide(model, 3, 96)
    learning = sum(item.numel() for item in guide.parameters()) + 2 * 64 + sum(65 * width for width in guide.widths)
    assert cost.num_trainable - without.num_trainable == learning
    work = Workload.expected(config, model)
    more = cost.memory(work).peak - without.memory(work).peak
    assert more > 16 * learning  # weight, gradient, two moments; and what autograd keeps


def test_words_take_operations_memory_and_a_head_that_learns(distillation_config):
    told = EXPECTED.replace("}", ", word_pieces_per_sample: 5, read_tokens_per_sample: 6}")
    plain, taught = distillation_config(told), distillation_config(told, TAUGHT)
    model = model_config(plain)
    without, work = Workload.expected(plain, model), Workload.expected(taught, model)
    assert (without.num_pieces, work.num_pieces) == (0, pytest.approx(5 * work.num_samples))
    costs = [StageCost(config, model, torch.float32) for config in (plain, taught)]
    assert costs[1].flops(work).keys() - costs[0].flops(without).keys() == {"words"}
    head = 64 + (64 + 1) * 3 * 96  # a norm, and three characters of 94 kinds, none or another
    assert costs[1].num_trainable - costs[0].num_trainable == head
    vocab_size = model.text_config.vocab_size
    choices = 4 * (
        work.num_pieces * vocab_size + work.num_read * 3 * 96
    )  # log-probabilities, were all of the table candidates
    more = costs[1].memory(work).peak - costs[0].memory(without).peak
    assert 12 * head < more < 12 * head + choices  # weight and two moments; its gradient is there when others are not
    assert costs[1].flops(work.with_rows(4))["words"] > costs[1].flops(work)["words"]


def test_operations_of_hd_count_the_long_sequence(distillation_config, tmp_path):
    config = distillation_config(EXPECTED, "model.pixel_shuffle_loc=post", "rows_per_batch=1")
    assert_counted(config, torch.float32, tmp_path, tolerance=0.02)


def test_a_workload_expected_from_a_recipe_is_about_the_one_that_is_packed(next_token_config):
    config = next_token_config(EXPECTED)
    model = model_config(config)
    packed, expected = Workload.of_batch(random_batch(config, model)), Workload.expected(config, model)
    for name in ("num_rows", "num_tokens", "num_filled", "num_samples", "num_tiles", "num_supervised"):
        assert getattr(expected, name) == pytest.approx(getattr(packed, name), rel=0.15), name


def test_a_sample_longer_than_a_row_is_refused(next_token_config):
    config = next_token_config("expected.text_tokens_per_sample=500")
    with pytest.raises(ValueError, match=r"sample of 504 tokens .* row_length \(192\)"):
        Workload.expected(config, model_config(config))


def test_memory_grows_with_rows_and_with_what_learns(next_token_config):
    frozen, tuned = next_token_config(EXPECTED), next_token_config(EXPECTED, NEXT_TOKEN["tuning"][0])
    model = model_config(frozen)
    work = Workload.expected(frozen, model)
    costs = [StageCost(config, model, torch.float32) for config in (frozen, tuned)]
    small, large = (costs[0].memory(work.with_rows(rows)) for rows in (1, 5))
    # Next to nothing is fixed: in float32 weights are not copied.
    for one, five in zip(small.activations, large.activations, strict=True):
        assert five == pytest.approx(5 * one, rel=0.03)
    assert costs[1].memory(work).peak > costs[0].memory(work).peak
    assert costs[1].memory(work).optimizer == 8 * costs[1].num_trainable == 8 * costs[1].num_parameters


def test_held_language_takes_places_time_and_memory(next_token_config):
    held = ("language.source=python_docs", "language.share=0.3", "language.kl_weight=1", EXPECTED)
    plain, frozen, learns = (
        next_token_config(*overrides)
        for overrides in ((EXPECTED,), held, (*held, "trainable=[stem, holistic_layers, language_model]"))
    )
    model = model_config(plain)
    without, work = Workload.expected(plain, model), Workload.expected(frozen, model)
    assert work.num_language == pytest.approx(0.3 * plain.rows_per_batch * plain.row_length, rel=0.01)
    assert work.num_samples == pytest.approx(0.7 * without.num_samples, rel=0.01)
    costs = [StageCost(config, model, torch.bfloat16) for config in (plain, frozen, learns)]
    assert {"held text", "bare language model"} == costs[1].flops(work).keys() - costs[0].flops(without).keys()
    assert costs[0].memory(work).weights == costs[1].memory(work).weights
    free = dataclasses.replace(learns, language=None)
    copied = costs[2].memory(work).weights - StageCost(free, model, torch.bfloat16).memory(work).weights
    assert copied == 2 * costs[2].groups["language_model"]
    with_rows = work.with_rows(2 * work.num_rows)
    assert costs[1].memory(with_rows).peak > costs[1].memory(work).peak > costs[0].memory(without).peak


def test_gradients_of_earlier_micro_batches_stay_through_the_next_one(next_token_config):
    tuning = NEXT_TOKEN["tuning"][0]
    once, twice = (next_token_config(EXPECTED, tuning, f"gradient_accumulation_steps={steps}") for steps in (1, 2))
    model = model_config(once)
    work = Workload.expected(once, model)
    peaks = [StageCost(config, model, torch.float32).memory(work).peak for config in (once, twice)]
    assert peaks[1] > peaks[0]


def costs(load, *settings: str) -> tuple[StageCost, StageCost, Workload]:
    """What a stage costs without and with some settings, in bfloat16, and the micro-batch of both."""
    plain, changed = load(EXPECTED), load(EXPECTED, *settings)
    model = model_config(plain)
    parts = [StageCost(config, model, torch.bfloat16) for config in (plain, changed)]
    return *parts, Workload.expected(plain, model)


def test_checkpointed_layers_keep_what_enters_them_and_run_once_more(next_token_config):
    plain, checkpointed, work = costs(next_token_config, "activation_checkpointing=true")
    before, after = plain.memory(work), checkpointed.memory(work)
    entering = 2 * 192 * 64 * 4  # rows x tokens x width, float32
    assert after.activations[1:3] == (2 * entering, 2 * entering)  # two layers in either part
    assert after.working[1:3] == tuple(2 * kept / 2 for kept in before.activations[1:3])
    assert (after.activations[0], after.activations[3]) == (before.activations[0], before.activations[3])
    assert after.peak < before.peak
    # Matrices of width 64, keys and values of 32, an MLP of 128 without its last; then scores: two products of T x T.
    matrices = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 2 * 64 * 128) * 2 * 192
    scores = 4 * 2 * 192**2 * 64
    assert checkpointed.flops(work)["layers run again"] == 4 * (matrices + scores)
    assert "layers run again" not in plain.flops(work)


def test_layers_that_keep_nothing_are_not_run_again(next_token_config):
    _, checkpointed, work = costs(next_token_config, "trainable=[]", "lora.rank=4", "activation_checkpointing=true")
    memory = checkpointed.memory(work)
    assert memory.activations[1] == memory.working[1] == 0  # nothing learns in or before the holistic layers
    assert memory.activations[2] == 2 * 2 * 192 * 64 * 4
    adapters = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)) * 2 * 192
    matrices = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) * 2 * 192
    scores = 4 * 2 * 192**2 * 64
    assert checkpointed.flops(work)["layers run again"] == 2 * (adapters + matrices + scores)


def test_shards_are_a_share_of_everything_and_what_is_joined(next_token_config):
    plain, sharded, work = costs(next_token_config, "sharding=full")
    before, after = plain.memory(work), sharded.memory(work, num_processes=4)
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64  # matrices and two norms
    assert plain.groups["holistic_layers"] == 2 * layer
    stem = plain.num_trainable - 2 * layer
    assert 4 * after.optimizer == 8 * plain.num_trainable  # two moments in float32
    assert 4 * after.weights == 4 * plain.num_trainable + 2 * (plain.num_parameters - plain.num_trainable)
    assert after.gradients == (4 * stem, 2 * layer, 0, 0)  # the stem's are cut up at the end
    rest = before.weights - 2 * layer * 4 - 2 * layer * 2  # two learn in float32, two are frozen in bfloat16
    assert after.joined == rest + layer * 4
    assert after.working[1] == before.working[1] + layer * 4  # its gradient is whole before it is cut
    assert after.peak < before.peak + after.joined
    assert sharded.memory(work) == before  # one process has nobody to share with
    assert plain.memory(work, num_processes=4) == before
    assert sharded.flops(work) == plain.flops(work)


def test_a_sharded_teacher_is_whole_while_it_is_used(distillation_config):
    plain, sharded, work = costs(distillation_config, "sharding=full")
    before, after = plain.memory(work), sharded.memory(work, num_processes=2)
    teacher = before.teacher - 4 * 64 * plain.model_config.text_config.vocab_size
    assert after.teacher == before.teacher - teacher / 2
    rest = before.weights - sum(4 * plain.groups[name] for name in ("holistic_layers",)) - 2 * 2 * 36992
    assert after.joined == rest + teacher + 4 * 36992


@pytest.mark.parametrize(("bits", "expected"), [("int8", 36864 + 4 * 512), ("int4", 36864 * (0.5 + 65 / 4096))])
def test_quantised_maps_take_their_bits_and_scales(next_token_config, bits, expected):
    plain, quantised, work = costs(next_token_config, f"quantize_frozen={bits}")
    before = plain.memory(work).weights
    # A layer's maps have 36,864 weights in 512 rows; there are two layers.
    assert quantised.memory(work).weights == pytest.approx(before - 2 * 2 * 36864 + 2 * expected, abs=1)
    assert quantised.memory(work, on_cpu=True).weights == pytest.approx(before + 2 * expected, abs=1)
    assert quantised.flops(work) == plain.flops(work)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantised_maps_have_the_bytes_that_bitsandbytes_gives_them(bits):
    linear = nn.Linear(2048, 1024, bias=False)
    weight = quantization._quantized(linear, bits, torch.bfloat16).to("cpu").weight
    if bits == "int8":
        found, rows = weight.data.nbytes + weight.SCB.nbytes, 1024
    else:
        state = weight.quant_state
        scales = [state.absmax, state.state2.absmax] if state.nested else [state.absmax]
        found, rows = weight.data.nbytes + sum(item.nbytes for item in scales), 0
    assert found == pytest.approx(2048 * 1024 * QUANTIZED_BYTES[bits] + INT8_ROW_BYTES * rows, rel=1e-3)


def test_a_cache_takes_the_teacher_s_place(distillation_config, tmp_path):
    plain, cached, work = costs(distillation_config, "teacher.cache=features")
    assert plain.flops(work).keys() - cached.flops(work).keys() == {"teacher"}
    assert cached.memory(work).teacher == 4 * 64 * plain.model_config.text_config.vocab_size
    assert cached.num_trainable == plain.num_trainable  # the projection stays
    assert_counted(distillation_config(EXPECTED, "teacher.cache=features"), torch.float32, tmp_path, tolerance=0.02)


SMOLLM2_135M = {
    "output": "runs/check",
    "model": {"language_model": "asset:smollm2-135m-instruct", "num_embedding_layers": 6, "image_size": 112},
    "objective": {"name": "next_token"},
    "trainable": ["stem", "holistic_layers"],
    "data": {"source": "easy_vqa"},
    "expected": {"text_tokens_per_sample": 40, "supervised_tokens_per_sample": 15},
    "num_steps": 1,
    "rows_per_batch": 4,
    "row_length": 256,
    "learning_rate": 1e-4,
}

STAGES = {
    "distillation": {
        "objective": {"name": "distillation", "num_random_tokens": 8},
        "teacher": {"name": "tf_efficientnet_lite0", "image_size": 128},
        "expected": {"text_tokens_per_sample": 20},
    },
    "alignment": {},
    "tuning": {"trainable": ["stem", "holistic_layers", "language_model"]},
    "adapters": {"trainable": [], "lora": {"rank": 16}},
    "checkpointing": {
        "trainable": ["stem", "holistic_layers", "language_model"],
        "activation_checkpointing": True,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", STAGES)
def test_a_smollm2_135m_needs_the_operations_and_memory_predicted(tmp_path, kind, dtype):
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(SMOLLM2_135M | STAGES[kind] | {"dtype": dtype}))
    config = load_stage(str(tmp_path / "stage.yaml"))
    result = check_stage(config, model_config(config))
    assert abs(result["errors"]["flops"]) < 0.01
    assert abs(result["errors"]["peak_bytes"]) < TOLERANCE


def test_mixtures_of_experts_count_the_experts_a_token_visits(next_token_config):
    config = next_token_config(EXPECTED)
    model = model_config(config)
    dense = StageCost(config, model, torch.float32)
    work = Workload.expected(config, model)
    text = {**model.text_config.to_dict(), "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    text.pop("architectures", None)
    mixture = StageCost(config, type(model)(**{**model.to_dict(), "text_config": text}), torch.float32)
    assert mixture.num_parameters > dense.num_parameters
    ratio = mixture.flops(work)["language model"] / dense.flops(work)["language model"]
    assert 1 < ratio < 2  # two experts instead of one MLP; attention is the same
    assert dataclasses.asdict(work)["num_rows"] == 2
