"""A frozen language model in 8 or 4 bits: smaller, gradients pass, and its exact weights come back."""

import sys

import pytest
import torch
from safetensors.torch import load_file

from hovle.train.model import quantization
from hovle.train.model.parameters import select_trainable
from hovle.train.model.quantization import in_full_precision, quantize_language_model
from hovle.train.objectives.next_token import NextTokenObjective
from hovle.train.run.checkpoint import find_checkpoint
from hovle.train.run.stage import run_stage

# peft 0.21.2 asks for `is_gradient_checkpointing`, which transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BITS = {"int8": (8, 0.02), "int4": (4, 0.2)}
"""Bits of a weight, and how far outputs may move, relative; worst 0.006 and 0.10."""


@pytest.fixture(params=BITS)
def bits(request) -> str:
    return request.param


@pytest.fixture
def quantized(parts, next_token_config, bits):
    """The tiny HoVLE with its language model quantised, and the exact maps."""
    model, _ = parts
    select_trainable(model, next_token_config())
    return model, quantize_language_model(model, bits, torch.float32, torch.device("cpu"))


def logits_of(model, batch) -> torch.Tensor:
    pixel_values = NextTokenObjective(model).normalize(batch.pixel_values)
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "pixel_values": pixel_values}
    return model(**inputs, use_cache=False).logits


def test_only_the_language_models_layers_shrink(quantized, bits):
    model, originals = quantized
    assert len(originals) == 2 * 7
    exact = sum(linear.weight.numel() for linear in originals.values())
    held = sum(model.get_submodule(name).weight.nbytes for name in originals)
    assert held == exact * BITS[bits][0] // 8
    rest = [item for name, item in model.named_parameters() if name.removesuffix(".weight") not in originals]
    assert {item.dtype for item in rest} == {torch.float32}


def test_answers_and_gradients_stay_close(quantized, batches, bits):
    model, originals = quantized
    [batch] = batches("chat")
    weight = model.model.projector.linear_1.weight
    results = []
    for context in (in_full_precision(model, originals), in_full_precision(model, {})):
        with context:
            logits = logits_of(model, batch)
            loss = logits.float().log_softmax(dim=-1)[..., 5].sum()
            [gradient] = torch.autograd.grad(loss, [weight])
            results.append((logits.detach(), gradient))
    (exact_logits, exact_gradient), (logits, gradient) = results
    assert 0 < (logits - exact_logits).norm() / exact_logits.norm() < BITS[bits][1]
    assert 0 < (gradient - exact_gradient).norm() / exact_gradient.norm() < BITS[bits][1]


def test_exact_weights_are_back_only_while_they_are_read(quantized):
    model, originals = quantized
    name, linear = next(iter(originals.items()))
    with in_full_precision(model, originals):
        assert model.get_submodule(name) is linear
    assert model.get_submodule(name) is not linear


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_saves_the_language_model_bit_for_bit(next_token_config, checkpoints, bits, dtype, monkeypatch):
    forms = []
    original = quantization._quantized
    monkeypatch.setattr(quantization, "_quantized", lambda *args: forms.append(args[1]) or original(*args))
    config = next_token_config(f"quantize_frozen={bits}", f"dtype={dtype}", "checkpoint_every=2")
    folder = run_stage(config)
    assert forms == [bits] * 14
    start = load_file(f"{checkpoints['tied']}/model.safetensors")
    newest = find_checkpoint(folder.parent)
    assert newest is not None
    for place in (folder, newest):
        saved = load_file(place / "model.safetensors")
        assert set(saved) == set(start)
        for name, tensor in saved.items():
            is_new = any(part in name for part in ("patch_embedding", "projector", ".layers.0.", ".layers.1."))
            assert torch.equal(tensor, start[name]) != is_new, name


def test_adapters_learn_over_a_quantised_model_and_are_merged_with_its_exact_weights(
    next_token_config, checkpoints, bits
):
    """QLoRA: what is saved differs from the start by the adapters alone, and not by what the bits lost."""
    changes = ("trainable=[]", "lora.rank=4", "learning_rate=0.01", "learning_rates.lora=0.02", "num_steps=2")
    folder = run_stage(next_token_config(f"quantize_frozen={bits}", *changes))
    saved, start = (load_file(f"{place}/model.safetensors") for place in (folder, checkpoints["tied"]))
    adapters = load_file(folder.parent / "adapter" / "adapter_model.safetensors")
    assert set(saved) == set(start)
    for name, tensor in saved.items():
        down, up = (adapters.get(f"base_model.model.{name[:-7]}.lora_{part}.weight") for part in "AB")
        if down is None or up is None:
            assert torch.equal(tensor, start[name]), name
            continue
        assert up.abs().max() > 0
        torch.testing.assert_close(tensor, start[name] + 32 / 4 * up @ down, atol=1e-6, rtol=0)
    assert len(adapters) == 2 * 2 * 7


def test_without_the_library_the_message_says_what_to_install(parts, next_token_config, monkeypatch):
    model, _ = parts
    select_trainable(model, next_token_config())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'hovle\[quant\]'"):
        quantize_language_model(model, "int8", torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    "overrides",
    [["trainable=[language_model]"], ["sharding=full"], ["retention.window=16"]],
    ids=lambda item: item[0],
)
def test_what_cannot_be_quantised_is_refused(next_token_config, overrides):
    with pytest.raises(ValueError, match="quantize_frozen"):
        next_token_config("quantize_frozen=int8", *overrides)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_quantised_layers_train_on_a_gpu(next_token_config, bits, compiled):
    run_stage(next_token_config(f"quantize_frozen={bits}", f"compile={compiled}", "dtype=bfloat16"))
