"""What autograd keeps of each part of a model between forward and backward pass, found without memory.

Parts run on fake tensors, which have shapes and no storage: number formats, attention and the ways of decoder families
are then those of a real, uncompiled step, whatever its size.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef

from ...model.backbones import attention_types, final_norm, rotary_tables
from ...model.configuration_hovle import HoVLEConfig
from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ..config import StageConfig
from ..model.adapters import add_lora
from ..model.parameters import select_trainable


@dataclass(frozen=True)
class Line:
    """Bytes that grow with a count."""

    fixed: float
    per_unit: float

    def at(self, count: float) -> float:
        """Bytes of so many units."""
        return self.fixed + self.per_unit * count


@dataclass(frozen=True)
class Activations:
    """Bytes kept by each part; the fixed share is copies of its weights in the number format of the products."""

    stem: Line
    """Per tile."""
    holistic_layer: Line
    """One layer, per row."""
    language_layer: Line
    """One layer, per row."""
    loss: Line
    """Next token: head and cross-entropy, per supervised position; distillation: cosines and scales, per position."""


def measure_activations(
    config: StageConfig, model_config: HoVLEConfig, dtype: torch.dtype, row_length: int, holistic_length: int
) -> Activations:
    """Run the parts of a stage's model and count what autograd keeps of them.

    Args:
        config: The stage, for what learns.
        model_config: Its model.
        dtype: Number format of matrix products.
        row_length: Tokens of a row as the language model sees it.
        holistic_length: The same for the holistic layers.
    """
    small = _two_layers(model_config)
    with torch.device("meta"):
        model = HoVLEForConditionalGeneration._from_config(small)
        select_trainable(model, config)
        if config.lora is not None:
            add_lora(model, config.lora)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    # Each layer stands for all of its section, and what enters any but the first has a gradient if the section learns.
    trainable = set(config.trainable) | ({"text_embeddings"} if tied_table_learns(config, model_config) else set())
    in_holistic = bool({"stem", "text_embeddings", "holistic_layers"} & trainable)
    in_language = in_holistic or "language_model" in trainable or config.lora is not None
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model.to_empty(device="cpu")
        run_loss = _head if config.objective.name == "next_token" else _similarities
        weights = list(model.parameters())
        return Activations(
            stem=_kept(weights, lambda count: _stem(model, count)),
            holistic_layer=_kept_by_layer(model, 0, holistic_length, in_holistic),
            language_layer=_kept_by_layer(model, -1, row_length, in_language),
            loss=_kept(weights, lambda count: run_loss(model, 64 * count, in_language), units_per_count=64),
        )


def tied_table_learns(config: StageConfig, model_config: HoVLEConfig) -> bool:
    """Whether the text table learns as the language model's head, to which it is tied."""
    return model_config.tie_word_embeddings and "language_model" in config.trainable


def _two_layers(config: HoVLEConfig) -> HoVLEConfig:
    """The same model with one holistic layer, if it has any, and one layer of the language model."""
    small = copy.deepcopy(config)
    num_holistic = min(1, config.num_embedding_layers)
    for name in ("layer_types", "no_rope_layers"):
        if (values := getattr(small.text_config, name, None)) is not None:
            setattr(small.text_config, name, [*values[:num_holistic], values[-1]])
    small.text_config.num_hidden_layers = num_holistic + 1
    small.num_embedding_layers = num_holistic
    return small


def _kept(owners: Iterable[torch.Tensor], run: Callable[[int], object], units_per_count: int = 1) -> Line:
    """Bytes autograd keeps when a part runs, from runs at two sizes; tensors that are there anyway do not count."""
    owned = {StorageWeakRef(item.untyped_storage()) for item in owners}
    totals = []
    for count in (1, 2):
        sizes: dict[StorageWeakRef, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[StorageWeakRef, int] = sizes) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[StorageWeakRef(storage)] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = run(count)  # kept alive: a freed storage's name may be given again
        totals.append(sum(size for storage, size in sizes.items() if storage not in owned))
        del output
        torch.clear_autocast_cache()
    per_count = totals[1] - totals[0]
    return Line(totals[0] - per_count, per_count / units_per_count)


def _stem(model: HoVLEForConditionalGeneration, num_tiles: int) -> torch.Tensor:
    config = model.config
    tiles = torch.empty(num_tiles, config.num_channels, config.image_size, config.image_size)
    features = model.get_image_features(tiles).pooler_output
    if model.model.is_hd:
        assert model.model.projector is not None  # HD shuffles after the holistic layers
        features = model.model.projector(features)
    return features


def _kept_by_layer(model: HoVLEForConditionalGeneration, index: int, length: int, needs_gradient: bool) -> Line:
    """What one decoder layer keeps of packed rows; the rotary tables, which all layers share, do not count."""
    text = model.config.text_config
    kind = attention_types(text)[index]
    with unset_fake_temporarily():  # real tables of one row: some families look at the positions to make them
        rotary_emb = type(model.model.language_model.rotary_emb)(text)
        tables = rotary_tables(rotary_emb, torch.zeros(1), torch.arange(length)[None], [kind])[kind]

    def run(num_rows: int) -> torch.Tensor:
        return model.model.language_model.layers[index](
            torch.empty(num_rows, length, text.hidden_size, requires_grad=needs_gradient),
            attention_mask=torch.empty(num_rows, 1, length, length, dtype=torch.bool),
            position_ids=torch.empty(1, length, dtype=torch.long),
            position_embeddings=tables,
            use_cache=False,
        )

    return _kept([*model.parameters(), *tables], run)


def _head(model: HoVLEForConditionalGeneration, num_tokens: int, needs_gradient: bool) -> torch.Tensor:
    hidden_states = torch.empty(num_tokens, model.config.text_config.hidden_size, requires_grad=needs_gradient)
    logits = model.compute_logits(final_norm(model.model.language_model)(hidden_states)).float()
    return nn.functional.cross_entropy(logits, torch.empty(num_tokens, dtype=torch.long), reduction="sum")


def _similarities(model: HoVLEForConditionalGeneration, num_tokens: int, needs_gradient: bool) -> torch.Tensor:
    outputs = torch.empty(num_tokens, model.config.text_config.hidden_size, requires_grad=needs_gradient)
    cosines = nn.functional.cosine_similarity(outputs.float(), torch.empty_like(outputs), dim=-1)
    return cosines.sum() + outputs.float().norm(dim=-1).log().square().sum()
