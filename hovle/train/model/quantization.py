"""A frozen language model in 8 or 4 bits, through which the layers below it learn; its exact weights wait aside."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ...model.modeling_hovle import HoVLEForConditionalGeneration


def quantize_language_model(
    model: HoVLEForConditionalGeneration, bits: str, dtype: torch.dtype, device: torch.device
) -> dict[str, nn.Linear]:
    """Replace every linear map of the language model's layers by a quantised one, in place.

    Args:
        model: Its language model is frozen; adapters on it stay as they are.
        bits: `int8` (LLM.int8) or `int4` (NF4 in blocks).
        dtype: Number format of products.
        device: Where the quantised weights go.

    Returns:
        Name -> the map that was there, on the CPU.
    """
    first = model.config.num_embedding_layers
    originals = {
        f"model.language_model.layers.{first + index}.{name}": module
        for index, layer in enumerate(model.model.language_layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    for name, linear in originals.items():
        model.set_submodule(name, _quantized(linear, bits, dtype).to(device))
        linear.cpu()
    return originals


def _quantized(linear: nn.Linear, bits: str, dtype: torch.dtype) -> nn.Module:
    """A map that is quantised when it moves to a device."""
    try:
        from bitsandbytes import nn as quantized  # an extra: only this needs it
    except ModuleNotFoundError as error:
        raise ValueError(f"quantize_frozen needs {error.name}: pip install 'hovle[quant]' brings it.") from error

    result: nn.Module
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    weight = linear.weight.detach()
    if bits == "int8":
        result = quantized.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        result.weight = quantized.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        result = quantized.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
        result.weight = quantized.Params4bit(weight, requires_grad=False, quant_type="nf4")
    result.bias = linear.bias
    return result.requires_grad_(False)


@contextlib.contextmanager
def in_full_precision(model: HoVLEForConditionalGeneration, originals: dict[str, nn.Linear]) -> Iterator[None]:
    """Put the exact maps back for as long as their weights are read."""
    quantized = {name: model.get_submodule(name) for name in originals}
    for name, linear in originals.items():
        model.set_submodule(name, linear)
    try:
        yield
    finally:
        for name, module in quantized.items():
            model.set_submodule(name, module)
