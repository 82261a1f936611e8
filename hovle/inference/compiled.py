"""Answers compiled: `optimize` makes `generate` run graphs, with keys and values in memory that is taken once.

A prompt is read into a dynamic cache, as ever: all of the forward pass but the layers, which take the time, runs as it
always does, checks included, and the layers are two graphs (holistic and language model) that know no lengths. What
they made is copied into a static cache. Each further token is one graph, the same for all lengths, which writes in
place: no cache grows, nothing is allocated. Where somebody wants the cache back, it is copied once more.
"""

import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
import torch.fx.experimental._config
from torch import nn
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import GenerationMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils import ModelOutput

from ..machine.facts import compiler_problem
from ..model.backbones import CACHE, attention_types
from ..model.decoder import run_all
from ..model.modeling_hovle import HoVLEForConditionalGeneration
from ..model.rotary import depends_on_length

logger = logging.getLogger(__name__)

PACKED_SDPA = "packed_sdpa"
"""sdpa that reads the keys and values of a new token where they lie, under the name transformers looks it up by."""

NUM_GRAPHS = 64
"""Graphs of one function: with and without a mask, for one row and several, with something cached and without."""

SMALLEST_STEP = 256
"""Slots by which a static cache grows, at least; a quarter of its length where that is more."""


def packed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as sdpa does; the heads that share keys become queries of one head when there is one new token.

    transformers' sdpa copies keys and values once for each of these heads while it is compiled.

    Args:
        module: Attention layer.
        query: Shape `(B, heads, T, d)`.
        key: Shape `(B, key heads, slots, d)`.
        value: As `key`.
        attention_mask: True where a token may look, shape `(B or 1, 1, T, slots)`.
        **kwargs: As `sdpa_attention_forward` takes them.

    Returns:
        Shape `(B, T, heads, d)`, and no weights.
    """
    batch_size, num_heads, length, width = query.shape
    is_plain = all(kwargs.get(name) is None for name in ("softcap", "position_bias"))
    if length != 1 or num_heads == key.shape[1] or not is_plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(batch_size, key.shape[1], -1, width),
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=kwargs.get("dropout", 0.0),
        scale=kwargs.get("scaling"),
    )
    return output.reshape(batch_size, 1, num_heads, value.shape[-1]), None


def optimize(model: HoVLEForConditionalGeneration, max_length: int | None = None) -> HoVLEForConditionalGeneration:
    """Let `generate` run compiled graphs and a static cache; greedy search and sampling give the tokens they gave.

    The first answers take minutes, in which the graphs are compiled: one or two for a prompt's layers, one for a new
    token. Other lengths of prompts and answers compile nothing more, a new kind of request does (the first prompt
    that goes on from a cache, the first padded batch). torch keeps compiled code on the disk for the next start.

    On a CPU the weights are packed for the products of single tokens, which holds them a second time. They must not
    change afterwards. On a GPU each token is one CUDA graph.

    Args:
        model: In evaluation mode, on the device and in the number format it will keep; changed in place.
        max_length: Tokens for which the static cache is made at once; longer ones make a longer one when they come.

    Returns:
        The model.

    Raises:
        ValueError: For what cannot be compiled, with the reason.
    """
    _refuse(model)
    if model.config.text_config._attn_implementation == "sdpa":
        AttentionInterface.register(PACKED_SDPA, packed_sdpa)
        AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
        model.set_attn_implementation(PACKED_SDPA)
    original = type(model)
    # Under its own name, by which transformers saves it.
    model.__class__ = type(original.__name__, (_Compiled, original), {"__module__": original.__module__})
    model._graphs = _Graphs(model, original, max_length)  # type: ignore[assignment]
    return model


def _refuse(model: Any) -> None:
    """Raise ValueError for a model that cannot be compiled."""
    if isinstance(model, _Compiled):
        raise ValueError("The model is optimized already.")
    if not isinstance(model, HoVLEForConditionalGeneration):
        raise ValueError(
            f"hovle.optimize takes a HoVLEForConditionalGeneration, got {type(model).__name__}; of a model with "
            "adapters what its merge_and_unload() gives."
        )
    if model.training:
        raise ValueError("The model is in training mode, in which it drops and caches nothing: call model.eval().")
    if len(set(getattr(model, "hf_device_map", {None: None}).values())) > 1:
        raise ValueError("The model lies on several devices, between which hooks move tensors: load it onto one.")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        raise ValueError(f"Weights quantized by {type(quantizer).__name__} cannot be compiled; those of torchao can.")
    text_config = model.config.text_config
    if (attention := text_config._attn_implementation) not in ("sdpa", "eager"):
        raise ValueError(f"A static cache needs sdpa or eager attention, not {attention}.")
    if "sliding_attention" in attention_types(text_config):
        raise ValueError(f"{text_config.model_type} has layers with a sliding window, whose cache turns over.")
    if any(depends_on_length(table) for table in model.model.rotary_embs):
        raise ValueError("The model's rotary positions depend on a prompt's length, which a graph does not know.")
    if (problem := compiler_problem(model.device)) is not None:
        raise ValueError(f"torch.compile does not work here: {problem}")


class _Compiled:
    """Stands before the class of a model that `optimize` was given."""

    _graphs: "_Graphs"

    @functools.wraps(HoVLEForConditionalGeneration.generate)
    def generate(self, *args, **kwargs):
        with self._graphs.lock:  # the static cache is one
            self._graphs.is_custom = kwargs.get("custom_generate") is not None
            try:
                return self._graphs.hand_over(super().generate(*args, **kwargs))  # type: ignore[misc]
            finally:
                self._graphs.answer = None

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args
    ):
        is_given = model_kwargs.get(CACHE) is not None
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args
        )
        reason = _reason_against(generation_config, generation_mode, model_kwargs.get(CACHE))
        if self._graphs.is_custom:
            reason = "custom_generate has steps of its own"
        if reason is not None:
            logger.warning("%s: this answer is generated uncompiled.", reason)
            return
        self._graphs.answer = _Answer(max_cache_length, is_given or bool(generation_config.return_dict_in_generate))

    @functools.wraps(HoVLEForConditionalGeneration.forward)  # `generate` looks at its signature
    def forward(self, *args, **kwargs):
        if self._graphs.answer is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return self._graphs.forward(self, *args, **kwargs)

    def create_masks_for_generate(self, *args, **kwargs):
        answer = self._graphs.answer
        if answer is not None and answer.static is not None and not answer.is_padded:
            return None  # the graph makes it
        return super().create_masks_for_generate(*args, **kwargs)  # type: ignore[misc]


def _reason_against(config: GenerationConfig, mode: GenerationMode, cache: Cache | None) -> str | None:
    """Why a way to generate does not go with the graphs; None where it does."""
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"{mode.value} reorders or takes back what is cached"
    if cache is None or type(cache) is not DynamicCache or cache.offloading:
        return "Another cache than the default was asked for"
    if config.prefill_chunk_size is not None:
        return "prefill_chunk_size reads the prompt in parts"
    if config.output_attentions or config.output_hidden_states:
        return "Attention weights or hidden states are to be returned"
    return None


@dataclasses.dataclass
class _Answer:
    """What is known of the answer that is being generated."""

    max_length: int
    """Tokens of prompt and answer, as the language model counts them."""
    is_cache_wanted: bool
    """Whether the caller gave the cache, or gets it."""
    is_padded: bool = False
    dynamic: Cache | None = None
    """What the prompt became, where the caller wants it."""
    static: Cache | None = None
    """Where the answer goes, once the prompt is read."""


class _Graphs:
    """The compiled functions of a model, and its static cache.

    Args:
        model: Of which they are.
        original: Its class, whose forward pass is compiled.
        max_length: Tokens for which the cache is made at once.
    """

    def __init__(self, model: HoVLEForConditionalGeneration, original: type, max_length: int | None):
        self.lock = threading.RLock()
        self.answer: _Answer | None = None
        self.is_custom = False
        self._config = model.config
        self._max_length = max_length or 0
        self._static: StaticCache | None = None
        self._weights: list[tuple] | None = None
        self._forward: Callable = original.forward  # type: ignore[attr-defined]
        self._run_layers = torch.compile(run_all, fullgraph=True, dynamic=True)
        self._is_frozen = model.device.type == "cpu"
        # A CUDA graph is recorded for the lengths it finds; on a CPU a graph that knows none is as fast.
        options: dict[str, Any] = {"dynamic": True} if self._is_frozen else {"mode": "reduce-overhead"}
        self._decode = torch.compile(self._forward, fullgraph=True, **options)
        # int8 and int4 are fast where the products are templates that torch chooses among.
        self._inductor = {"freezing": self._is_frozen, "max_autotune": getattr(model, "is_quantized", False)}

    def __deepcopy__(self, memo: dict) -> "_Graphs":
        raise ValueError("An optimized model cannot be copied: copy the model first, then optimize it.")

    def forward(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Read a prompt, or one more token; arguments and outputs are the model's."""
        answer = self.answer
        assert answer is not None
        with _shapes_as_they_come():
            if answer.static is None:
                return self._read_prompt(model, answer, *args, **kwargs)
            if not answer.is_padded:
                kwargs["attention_mask"] = None
            torch.compiler.cudagraph_mark_step_begin()
            with torch._inductor.config.patch(self._inductor):
                return self._decode(model, *args, **kwargs)

    def hand_over(self, result: Any) -> Any:
        """What `generate` returns, with a cache that later answers leave alone."""
        answer = self.answer
        if answer is not None and answer.static is not None and answer.dynamic is not None:
            self._copy_back(answer.static, answer.dynamic)
            if isinstance(result, ModelOutput):
                result[CACHE] = answer.dynamic
        return result

    def _read_prompt(self, model: Any, answer: _Answer, *args: Any, **kwargs: Any) -> Any:
        self._check_weights(model)
        mask = kwargs.get("attention_mask")
        answer.is_padded = mask is not None and not bool(mask.all())
        inputs = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        # One token, new or cached, would need another graph each, for what is rare.
        is_rare = 1 in (inputs.shape[1], kwargs[CACHE].get_seq_length())
        options = {} if is_rare else {"run_layers": self._run_layers}
        _lay_out_anew(kwargs[CACHE])
        outputs = self._forward(model, *args, **kwargs, **options)
        cache = outputs[CACHE]
        num_new = answer.max_length - cache.get_seq_length()
        if num_new > 0:
            answer.static = outputs[CACHE] = self._fill(cache, num_new)
            answer.dynamic = cache if answer.is_cache_wanted else None
        return outputs

    def _check_weights(self, model: Any) -> None:
        """Raise ValueError where weights changed that are part of the graphs."""
        if not self._is_frozen:
            return
        weights = [(id(weight), weight.device, weight.dtype, weight._version) for weight in model.parameters()]
        if self._weights is not None and weights != self._weights:
            raise ValueError(
                "The model's weights changed after it was optimized, but on a CPU they are part of the graphs: load "
                "or train the model first, then call hovle.optimize."
            )
        self._weights = weights

    def _fill(self, dynamic: Cache, num_new: int) -> StaticCache:
        """Copy what is cached into the static cache, which is made anew where it does not fit."""
        needed = [layer.keys.shape[2] + num_new for layer in dynamic.layers]
        static = self._static
        if static is None or not _fits(static, dynamic, needed):
            self._static = None  # its memory is free before the other's is taken
            static = StaticCache(config=self._config.get_text_config(), max_cache_len=0)
            for layer, old, slots in zip(static.layers, dynamic.layers, needed, strict=True):
                layer.max_cache_len = num_slots(max(slots, self._max_length))
                layer.lazy_initialization(old.keys, old.values)
                if self._is_frozen:
                    _let_change(layer)
            self._static = static
        for layer, old in zip(static.layers, dynamic.layers, strict=True):
            length = old.keys.shape[2]
            layer.keys[:, :, :length] = old.keys
            layer.values[:, :, :length] = old.values
            layer.cumulative_length.fill_(length)
        if (state := getattr(dynamic, "holistic_state", None)) is not None:
            static.holistic_state = dataclasses.replace(state, keys=None)
        return static

    def _copy_back(self, static: Cache, dynamic: Cache) -> None:
        """Lengthen a dynamic cache by what was written behind it."""
        num_new = int(static.get_seq_length()) - dynamic.get_seq_length()
        for layer, old in zip(static.layers, dynamic.layers, strict=True):
            length = old.keys.shape[2] + num_new
            old.keys, old.values = (item[:, :, :length].clone() for item in (layer.keys, layer.values))
        if (state := getattr(dynamic, "holistic_state", None)) is not None:
            state.short_length += num_new
            state.long_length += num_new
            state.num_text += num_new
            state.attention_mask = static.holistic_state.attention_mask
            state.keys = dynamic.layers[self._config.num_language_layers].keys
        if num_new and hasattr(dynamic, "ended_in_picture"):
            dynamic.ended_in_picture = None


def _lay_out_anew(cache: Cache) -> None:
    """Copy what was cut from longer keys and values, for which there would be other graphs."""
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()


def _let_change(layer: StaticLayer) -> None:
    """Take back that a layer's memory stays where it is, meant for CUDA graphs: freezing would take it for weights."""
    for tensor in (layer.keys, layer.values, layer.cumulative_length):
        if hasattr(tensor, "_dynamo_static_input_type"):
            del tensor._dynamo_static_input_type


@contextlib.contextmanager
def _shapes_as_they_come() -> Iterator[None]:
    """Compile for lengths as a model has them: that two are equal once, say a prompt's and a head's, means nothing."""
    with (
        torch._dynamo.config.patch(recompile_limit=NUM_GRAPHS, specialize_float=True),
        torch.fx.experimental._config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
    ):
        yield


def num_slots(length: int) -> int:
    """Slots of a static cache that shall hold so many tokens: a quarter more at most, beyond a few."""
    step = max(SMALLEST_STEP, 2 ** (length.bit_length() - 3))
    return -(-length // step) * step


def _fits(static: StaticCache, dynamic: Cache, needed: list[int]) -> bool:
    """Whether a static cache can take what is cached, and has the slots that are needed."""
    return all(
        layer.max_cache_len >= slots
        and len(layer.keys) == len(old.keys)
        and (layer.keys.dtype, layer.keys.device) == (old.keys.dtype, old.keys.device)
        for layer, old, slots in zip(static.layers, dynamic.layers, needed, strict=True)
    )
