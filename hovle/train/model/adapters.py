"""LoRA on the language model's layers: adapters that load with peft and merge into plain weights."""

import torch
from torch import nn

from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ..config import LoraConfig
from ..parallel import full_tensor


def add_lora(model: HoVLEForConditionalGeneration, config: LoraConfig) -> nn.Module:
    """Inject adapters into linear maps of the language model's layers, in place.

    Returns:
        The `PeftModel` around `model`, whose `save_pretrained` writes the adapters alone.

    Raises:
        ValueError: For `target_modules` that are no linear maps there.
    """
    import peft  # an extra: only LoRA needs it

    first = model.config.num_embedding_layers
    linear = [
        f"model.language_model.layers.{first + int(index)}.{name}"
        for index, name in (path.split(".", 1) for path in adapted_maps(model, config))
    ]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # fractions work too
            lora_dropout=config.dropout,
            target_modules=linear,
        ),
    )
    for parameter in trained:  # peft freezes everything but its adapters
        parameter.requires_grad_(True)
    return wrapped


def adapted_maps(model: HoVLEForConditionalGeneration, config: LoraConfig) -> dict[str, nn.Linear]:
    """Linear maps of the language model's layers that get adapters, by their names below the layers.

    Raises:
        ValueError: For `target_modules` that are none.
    """
    linear = {
        name: module
        for name, module in model.model.language_layers.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    ends = {name.rpartition(".")[2] for name in linear}
    if missing := [name for name in config.target_modules if name not in ends]:
        raise ValueError(
            f"lora.target_modules: the language model's layers have no linear map {', '.join(missing)}; they have "
            f"{', '.join(sorted(ends))}."
        )
    return {
        name: module
        for name, module in linear.items()
        if not config.target_modules or name.rpartition(".")[2] in config.target_modules
    }


def unadapted(model: HoVLEForConditionalGeneration) -> dict[str, int]:
    """Matrices of the language model's layers that LoRA cannot adapt, as they lie in no linear map: fused experts.

    Returns:
        Name of each below its layer -> numbers in all layers together.
    """
    inside = {
        id(weight) for module in model.modules() if isinstance(module, nn.Linear) for weight in module.parameters()
    }
    found: dict[str, int] = {}
    for path, weight in model.model.language_layers.named_parameters():
        if weight.dim() > 1 and id(weight) not in inside and ".lora_" not in path:
            name = path.split(".", 1)[1]
            found[name] = found.get(name, 0) + weight.numel()
    return found


@torch.no_grad()
def merged_state_dict(model: HoVLEForConditionalGeneration, keep: bool = True) -> dict[str, torch.Tensor]:
    """State dict of a plain HoVLE in float32: pieces joined, adapters added to the weights they adapt; on the CPU.

    The model stays as it is. A sharded one needs all processes; those that do not `keep` the result get none.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if plain != name and name.endswith(".weight"):
            layer = model.get_submodule(name.removesuffix(".base_layer.weight"))
            tensor = tensor.float() + sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
        tensor = full_tensor(tensor)
        if keep:
            state[plain] = tensor.cpu().float()
    return state
