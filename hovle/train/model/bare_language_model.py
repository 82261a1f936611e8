"""The bare language model inside a HoVLE: its own layers, entered above the holistic ones with plain text.

What the stage does not train serves as it is, quantised or not. What it trains is copied as the stage finds it, in the
number format of the products. Adapters are left out while the bare model runs.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...model.backbones import final_norm, scale_embeddings, scale_logits
from ...model.decoder import run_section
from ...model.holistic_sequence import SectionInputs
from ...model.image_tokens import merge_image_tokens
from ...model.masks import causal_masks
from ...model.modeling_hovle import HoVLEForConditionalGeneration


class BareLanguageModel(nn.Module):
    """Says what the language model would without holistic layers, as it is when this is made.

    Args:
        model: Prepared for training: what of it learns requires a gradient.
        dtype: Number format in which copies are stored.
    """

    def __init__(self, model: HoVLEForConditionalGeneration, dtype: torch.dtype):
        super().__init__()
        learns = {name: part for name, part in _parts(model).items() if _learns(part)}
        self.copies = _copy(nn.ModuleDict(learns)).to(dtype).requires_grad_(False)

    @torch.no_grad()
    def forward(
        self,
        model: HoVLEForConditionalGeneration,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        image_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Next-token logits of plain text, and of text around images as the model shows them.

        Args:
            model: The one it was made of.
            input_ids: Shape `(B, T)`.
            position_ids: 0 where a document begins, shape `(B, T)`.
            image_hidden_states: What the language model sees of the images, in the places of `input_ids`; shape
                `(N, S, D)`. Without them `input_ids` holds text alone.
            attention_mask: Who may look at whom, bool, shape `(B, 1, T, T)`; None where positions tell.
            places: Where logits are wanted, bool, shape `(B, T)`; everywhere by default.

        Returns:
            Shape `(B, T, V)`, or `(places, V)`, without gradient.
        """
        parts = self._parts(model)
        embeds = self.embeds(model, input_ids)
        if image_hidden_states is not None:
            sequence = model.model.sequence_class(model.config, model.model.projector)
            images = sequence.normalize(image_hidden_states)
            embeds = merge_image_tokens(embeds, images, input_ids == model.config.image_token_id)
        with as_released(parts["layers"], model.training):
            return _logits(model, parts, embeds, position_ids, attention_mask, places)

    @torch.no_grad()
    def embeds(self, model: HoVLEForConditionalGeneration, input_ids: torch.Tensor) -> torch.Tensor:
        """What its first layer reads of plain text, `input_ids.shape + (D,)`, without gradient."""
        return scale_embeddings(self._parts(model)["table"](input_ids), model.config.text_config)

    def _parts(self, model: HoVLEForConditionalGeneration) -> dict[str, Any]:
        return {**_parts(model), **self.copies}


@torch.no_grad()
def bare_logits(
    model: HoVLEForConditionalGeneration, embeds: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """Next-token logits of a frozen language model as released: without gradient, dropout and adapters.

    Args:
        model: Whose language model runs.
        embeds: What enters it, scaled as the family does, shape `(B, T, D)`.
        position_ids: 0 where a document begins, shape `(B, T)`.

    Returns:
        Shape `(B, T, V)`.
    """
    with as_released(model.model.language_layers, model.training):
        return _logits(model, _parts(model), embeds, position_ids)


def language_hidden_states(
    model: HoVLEForConditionalGeneration,
    embeds: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the language model as it is now makes of what enters it, before the head.

    Args:
        model: Whose language model runs.
        embeds: What the holistic layers give, shape `(B, T, D)`.
        position_ids: 0 where a document begins, shape `(B, T)`.
        attention_mask: Who may look at whom, bool, shape `(B, 1, T, T)`; None where positions tell.

    Returns:
        Shape `(B, T, D)`.
    """
    return _hidden_states(model, _parts(model), embeds, position_ids, attention_mask)


def _logits(
    model: HoVLEForConditionalGeneration,
    parts: dict[str, Any],
    embeds: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    hidden_states = _hidden_states(model, parts, embeds, position_ids, attention_mask)
    hidden_states = hidden_states if places is None else hidden_states[places]
    return scale_logits(parts["head"](hidden_states), model.config.text_config)


def _hidden_states(
    model: HoVLEForConditionalGeneration,
    parts: dict[str, Any],
    embeds: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    base, config = model.model, model.config
    masks = causal_masks(config, embeds, attention_mask, position_ids, None)
    inputs = SectionInputs(embeds, masks, position_ids)
    patterns, rotary_emb = config.split_layers(base.attention_types).language, base.language_model.rotary_emb
    return parts["norm"](run_section(parts["layers"], patterns, rotary_emb, inputs, None, config))


def _parts(model: HoVLEForConditionalGeneration) -> dict[str, nn.Module]:
    base = model.model
    return {
        "table": base.get_input_embeddings(),
        "layers": base.language_layers,
        "norm": final_norm(base.language_model),
        "head": model.lm_head,
    }


def _learns(part: nn.Module) -> bool:
    """Whether weights of the language model itself change; adapters beside them do not count."""
    return any(item.requires_grad for name, item in part.named_parameters() if ".lora_" not in name)


def _copy(parts: nn.ModuleDict) -> nn.ModuleDict:
    """A copy that shares the configs, by which the kind of attention is chosen later on."""
    configs = [module.config for module in parts.modules() if hasattr(module, "config")]
    return copy.deepcopy(parts, {id(config): config for config in configs})


@contextlib.contextmanager
def as_released(layers: nn.Module, was_training: bool) -> Iterator[None]:
    """Run layers without dropout, checkpoints and adapters."""
    adapted: list[Any] = [module for module in layers.modules() if hasattr(module, "_disable_adapters")]
    layers.eval()
    for module in adapted:  # peft's own switch would also freeze the adapters, which sharding must not see
        module._disable_adapters = True
    try:
        yield
    finally:
        layers.train(was_training)
        for module in adapted:
            module._disable_adapters = False
