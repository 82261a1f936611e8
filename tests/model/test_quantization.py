"""Weights in 8 or 4 bits: what is quantized, saved and loaded again, and what is refused."""

import types

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from tiny_models import IMAGE, TEXT, shake
from torch import nn
from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import BitsAndBytesConfig, LlamaConfig, TorchAoConfig

from hovle import HoVLEConfig, HoVLEForConditionalGeneration
from hovle.loading import load_model
from hovle.model.quantization import UNQUANTIZED, check_quantized

IDS = torch.tensor([[5, 6, *[IMAGE] * 4, 7, 8]])
PIXELS = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))

CONFIGS = {
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "bitsandbytes 4 bit": lambda: BitsAndBytesConfig(load_in_4bit=True),
}


@pytest.fixture(scope="module", params=["pre", "post"])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    text = LlamaConfig(**{**TEXT, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2})
    config = HoVLEConfig(
        text_config=text,
        num_embedding_layers=1,
        image_size=56,
        image_token_id=IMAGE,
        pixel_shuffle_loc=request.param,
    )
    target = tmp_path_factory.mktemp(request.param)
    shake(HoVLEForConditionalGeneration(config)).save_pretrained(target)
    return target


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS, PIXELS, use_cache=False).logits.float()


def quantized_names(model) -> set[str]:
    """Modules whose weight is no plain parameter."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name for name, module in linear.items() if type(module.weight) is not nn.Parameter}


@pytest.mark.parametrize("kind", CONFIGS)
def test_only_the_layers_shrink_and_a_saved_model_gives_the_same_logits(folder, kind, tmp_path):
    exact = HoVLEForConditionalGeneration.from_pretrained(folder)
    model = HoVLEForConditionalGeneration.from_pretrained(folder, quantization_config=CONFIGS[kind]())
    names = quantized_names(model)
    assert len(names) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in names)
    difference, scale = (logits(model) - logits(exact)).abs().max(), logits(exact).abs().max()
    assert 0 < difference < scale * {"torchao int8": 0.1, "bitsandbytes 4 bit": 0.9}[kind]  # measured: 0.06, 0.65
    model.save_pretrained(tmp_path)
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, tmp_path)]
    assert sizes[1] < sizes[0] * 0.75  # half of the weights are in layers
    again = load_model(tmp_path)
    assert quantized_names(again) == names
    assert torch.equal(logits(again), logits(model))


def test_what_the_caller_leaves_alone_is_left_alone(folder):
    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["model.language_model.layers.0", "lm_head"])
    model = HoVLEForConditionalGeneration.from_pretrained(folder, quantization_config=config)
    names = quantized_names(model)
    assert "model.projector.linear_1" in names
    assert not [name for name in names if ".layers.0." in name]


REFUSED = {
    "int4 weights are for GPUs": lambda: Int4WeightOnlyConfig(group_size=32),
    "gives garbage for single tokens": Int8DynamicActivationInt8WeightConfig,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_known_to_go_wrong_is_refused_with_the_reason(folder, reason):
    with pytest.raises(ValueError, match=reason):
        HoVLEForConditionalGeneration.from_pretrained(folder, quantization_config=TorchAoConfig(REFUSED[reason]()))


def test_matrices_that_torchao_silently_leaves_alone_are_an_error(folder):
    """As it does on a GPU; the loading before is not possible here."""
    model = HoVLEForConditionalGeneration.from_pretrained(folder)
    config = TorchAoConfig(Int4WeightOnlyConfig(group_size=64), modules_to_not_convert=list(UNQUANTIZED))
    model.hf_quantizer = types.SimpleNamespace(quantization_config=config)
    with pytest.raises(ValueError, match=r"left 14 matrices .* with 64 inputs: its group_size \(64\) must divide"):
        check_quantized(model)


@pytest.mark.parametrize(("inputs", "outputs"), [(96, 64), (64, 48)])
def test_four_bits_that_a_processor_cannot_lay_out_are_refused(inputs, outputs):
    """bitsandbytes packs them where the processor multiplies bfloat16 in AVX-512, and fails at the first token."""
    layer = Linear4bit(inputs, outputs, bias=False, quant_type="nf4").to("cpu")  # which quantizes
    model = nn.ModuleDict({"layer": layer})
    layer.support_avx512bf16_for_cpu = True
    with pytest.raises(
        ValueError, match=f"layer has {inputs} inputs and {outputs} outputs, .* multiples of 64 and 32"
    ):
        check_quantized(model)
    layer.support_avx512bf16_for_cpu = False
    check_quantized(model)
