"""Weights held in 8 or 4 bits: which are, and what is refused because it is known to go wrong."""

from typing import Any

from torch import nn

UNQUANTIZED = [r"(model\.)?patch_embedding", r"(model\.)?projector", "lm_head"]
"""Modules that keep their format, as patterns of transformers: the stem, whose rounding errors all layers would carry,
and the head, which shares its weights with the input embedding matrix where they are tied."""

SKIPPED = {"torchao": "modules_to_not_convert", "bitsandbytes": "llm_int8_skip_modules"}
"""Where a quantization config names what it leaves alone, by its method."""


def leave_stem_and_head(config: Any) -> None:
    """Fill in what a quantization config leaves alone, where the caller has not said so.

    Args:
        config: As `from_pretrained` takes it, changed in place; None and other methods pass.
    """
    name = SKIPPED.get(str(getattr(getattr(config, "quant_method", None), "value", "")))
    if name is not None and getattr(config, name) is None:
        setattr(config, name, list(UNQUANTIZED))


def refuse_wrong_device(config: Any, device_map: Any) -> None:
    """Raise ValueError for int4 weights of torchao on a CPU, before anything is read."""
    kind = type(getattr(config, "quant_type", None)).__name__
    if kind == "Int4WeightOnlyConfig" and str(device_map) in ("None", "cpu", "{'': 'cpu'}"):
        raise ValueError(
            "torchao's int4 weights are for GPUs: give device_map='cuda'. On a CPU take Int8WeightOnlyConfig(), or "
            "BitsAndBytesConfig(load_in_4bit=True)."
        )


def check_quantized(model: nn.Module) -> None:
    """Raise ValueError for a model whose answers would be wrong, or whose layers were silently left as they are.

    Args:
        model: Loaded, with a quantization config of torchao or bitsandbytes; others pass.
    """
    _check_four_bits(model)
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    kind = type(getattr(config, "quant_type", None)).__name__
    if config is None or kind == "NoneType":
        return
    device = next(model.parameters()).device
    if kind == "Int8DynamicActivationInt8WeightConfig" and device.type == "cpu":
        raise ValueError(
            "Int8DynamicActivationInt8WeightConfig gives garbage for single tokens when it is compiled on a CPU "
            "(torchao 0.18 with torch 2.14): take Int8WeightOnlyConfig()."
        )
    layers = {name: module for name, module in model.named_modules() if ".layers." in f".{name}"}
    left = [
        name
        for name, module in layers.items()
        if isinstance(module, nn.Linear)
        and type(module.weight) is nn.Parameter
        and not any(pattern in name for pattern in config.modules_to_not_convert or [])
    ]
    if left:
        inputs = layers[left[0]].weight.shape[1]
        raise ValueError(
            f"{kind} left {len(left)} matrices as they are, among them {left[0]} with {inputs} inputs: its group_size "
            f"({getattr(config.quant_type, 'group_size', 'unknown')}) must divide their inputs."
        )


def _check_four_bits(model: nn.Module) -> None:
    """Raise ValueError for 4-bit matrices that bitsandbytes cannot lay out for a processor with AVX-512 bfloat16.

    There it packs them anew at the first forward pass, 32 outputs and a block of inputs at a time.
    """
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is None or weight.device.type != "cpu" or not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        num_outputs, num_inputs = state.shape
        if num_inputs % state.blocksize or num_outputs % 32:
            raise ValueError(
                f"{name} has {num_inputs} inputs and {num_outputs} outputs, but on this processor bitsandbytes takes "
                f"4-bit matrices of multiples of {state.blocksize} and 32 only: take TorchAoConfig("
                f"Int8WeightOnlyConfig()), or name it in llm_int8_skip_modules."
            )
