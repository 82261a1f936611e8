"""LoRA on the language model's layers: adapters that load with peft and merge into plain weights."""

import torch
from torch import nn

from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ..config import LoraConfig
from ..parallel import full_tensor


def add_lora(model: HoVLEForConditionalGeneration, config: LoraConfig) -> nn.Module:
    """Inject adapters into every linear map of the language model's layers, in place.

    Returns:
        The `PeftModel` around `model`, whose `save_pretrained` writes the adapters alone.
    """
    import peft  # an extra: only LoRA needs it

    linear = [
        f"model.language_model.layers.{model.config.num_embedding_layers + index}.{name}"
        for index, layer in enumerate(model.model.language_layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
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
