"""Answers that grow together: a step reads all weights once and gives every answer its next token.

Each row has keys and values of its own, and attention looks at one row after the other. So nothing is padded, a row
computes what it would compute alone, one joins between any two steps, and one that is done leaves at once. A prompt is
read by `generate` itself, which also makes all that chooses tokens and ends answers.
"""

import contextlib
import contextvars
import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ..model.backbones import CACHE
from ..model.cache import HolisticCacheState
from ..model.configuration_hovle import HoVLEConfig
from ..model.modeling_hovle import HoVLEForConditionalGeneration
from .prefixes import BegunPrompt, PrefixCache, copy_cache

ROOM = 256
"""Tokens for which a row takes memory at a time."""

ROWS = "hovle_rows"
"""Name of the attention that looks at rows one by one."""


class Row:
    """An answer in work.

    Attributes:
        input_ids: Prompt and answer, shape `(1, T)`.
        is_done: Whether its last token was its last.
        error: What went wrong in choosing a token; the row is done then.
        begun: The prompt as the prefix cache knows it; set by `Batch`.
        cache: Keys and values of its own; set by `Batch`.
    """

    begun: BegunPrompt
    cache: Cache

    def __init__(
        self,
        input_ids: torch.Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        generator: torch.Generator | None,
    ):
        self.input_ids, self._processors, self._criteria, self._generator = input_ids, processors, criteria, generator
        self.is_done = False
        self.error: Exception | None = None

    @classmethod
    def begin(
        cls,
        model: HoVLEForConditionalGeneration,
        input_ids: torch.Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        generator: torch.Generator,
        **model_kwargs: Any,
    ) -> "Row":
        """Read a prompt and choose the first token, as a `custom_generate` of `generate`.

        Args:
            model: That `generate` was called on.
            input_ids: Of the prompt, shape `(1, T)`.
            logits_processor: All that changes scores.
            stopping_criteria: All that ends the answer.
            generation_config: Whether tokens are drawn.
            generator: Draws them.
            **model_kwargs: What the model reads.
        """
        inputs = {name: value for name, value in model_kwargs.items() if name not in ("synced_gpus", "streamer")}
        outputs = model._prefill(input_ids, generation_config, inputs)
        row = cls(input_ids, logits_processor, stopping_criteria, generator if generation_config.do_sample else None)
        row.take(outputs.logits[:, -1])
        return row

    def take(self, logits: torch.Tensor) -> None:
        """Choose the next token by its logits, shape `(1, V)`."""
        scores = self._processors(self.input_ids, logits.to(torch.float32, copy=True))
        if self._generator is None:
            token = scores.argmax(dim=-1, keepdim=True)
        else:
            token = torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=self._generator)
        self.input_ids = torch.cat([self.input_ids, token], dim=-1)
        self.is_done = bool(self._criteria(self.input_ids, None).all())


class Batch:
    """All answers that a model works at; only one thread may use it and the model.

    Args:
        prefixes: What has been read before; it knows the model, which must be in evaluation mode.

    Attributes:
        rows: Answers that are not done.
    """

    def __init__(self, prefixes: PrefixCache):
        self.model, self.prefixes = prefixes.model, prefixes
        self.rows: list[Row] = []

    @torch.no_grad()
    def join(
        self,
        inputs: Mapping[str, torch.Tensor],
        config: GenerationConfig,
        criteria: Sequence[StoppingCriteria] = (),
        processors: Sequence[LogitsProcessor] = (),
        seed: int | None = None,
    ) -> Row:
        """Read a prompt and let its answer grow with the others, unless its first token is its last.

        Args:
            inputs: One prompt, as `PrefixCache.begin` takes it.
            config: How tokens are chosen and how many; one row, no beams.
            criteria: What ends the answer besides.
            processors: What changes scores besides.
            seed: Of the numbers that are drawn; None for others each time.

        Raises:
            ValueError: What `generate` raises.
        """
        begun = self.prefixes.begin(inputs, config.max_new_tokens or 0)
        row = self.model.generate(
            **begun.inputs,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList(criteria),
            logits_processor=LogitsProcessorList(processors),
            custom_generate=functools.partial(Row.begin, generator=_generator(seed, self.model.device)),
        )
        self.prefixes.keep(begun, row.input_ids[0], begun.cache)
        # Of what the prompt holds the prefix cache has its own, and tiles may be large.
        row.begun = BegunPrompt({}, begun.num_reused, begun.signature, begun.is_image)
        if not row.is_done:
            row.cache = _with_room(begun.cache)
            self.rows.append(row)
        return row

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Give every answer its next token; return those that are done with it."""
        caches, config = [row.cache for row in self.rows], self.model.config
        ids = torch.cat([row.input_ids[:, -1:] for row in self.rows])
        positions = torch.tensor([[row.input_ids.shape[1] - 1] for row in self.rows], device=ids.device)
        with _attending_row_by_row(self.model):
            logits = self.model(input_ids=ids, position_ids=positions, **{CACHE: _joined(caches, config)}).logits[
                :, -1
            ]
        for row, scores in zip(self.rows, logits.split(1), strict=True):
            _count_token(row.cache, config)
            try:
                row.take(scores)
            except Exception as error:  # its own processors or criteria: no other row's business
                row.error, row.is_done = error, True
        done = [row for row in self.rows if row.is_done]
        self.rows = [row for row in self.rows if not row.is_done]
        for row in done:
            self.leave(row)
        return done

    def leave(self, row: Row) -> None:
        """End an answer; what was read for it serves the next prompt that begins so."""
        self.rows = [other for other in self.rows if other is not row]
        self.prefixes.keep(row.begun, row.input_ids[0], _without_room(row.cache))


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


# ---------------------------------------------------------------------------------------------- caches


class RoomyLayer(DynamicLayer):
    """Keys and values that grow in place: a token more copies none of those before it.

    Args:
        layer: What it begins with; left as it is.
    """

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self._keys, self._values = (_longer(item, item.shape[-2]) for item in (layer.keys, layer.values))
        self._show(layer.keys.shape[-2])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values of new tokens, shape `(1, heads, new, head size)`; return all."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._keys.shape[-2]:
            self._keys, self._values = _longer(self._keys, start), _longer(self._values, start)
        self._keys[..., start:end, :] = key_states
        self._values[..., start:end, :] = value_states
        self._show(end)
        return self.keys, self.values

    def _show(self, length: int) -> None:
        self.keys, self.values = self._keys[..., :length, :], self._values[..., :length, :]


def _longer(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """A copy with room for more tokens behind the first `length`."""
    found = tensor.new_empty((*tensor.shape[:-2], length + ROOM, tensor.shape[-1]))
    found[..., :length, :] = tensor[..., :length, :]
    return found


def _with_room(cache: Cache) -> Cache:
    """A copy of a row's cache that grows in place; layers with a window are short and stay as they are."""
    found = copy_cache(cache)
    found.layers = [RoomyLayer(layer) if type(layer) is DynamicLayer else layer for layer in found.layers]
    return found


def _without_room(cache: Cache) -> Cache:
    """A copy that shares the memory, but for what is appended to it."""
    found = copy_cache(cache)
    for index, layer in enumerate(found.layers):
        if isinstance(layer, RoomyLayer):
            found.layers[index] = plain = DynamicLayer()
            plain.lazy_initialization(layer.keys, layer.values)
            plain.keys, plain.values = layer.keys, layer.values
    return found


class LayerOfRows(DynamicLayer):
    """One layer of the caches of several rows, which gives attention a list: keys and values row by row.

    Args:
        layers: Of the rows' caches.
    """

    def __init__(self, layers: Sequence[DynamicLayer]):
        super().__init__()
        self.layers = layers
        self.is_initialized = True

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Append a token to each row, shape `(B, heads, 1, head size)`; return `(1, heads, T, head size)` of each."""
        new = zip(self.layers, key_states.split(1), value_states.split(1), strict=True)
        keys, values = zip(*(layer.update(*states) for layer, *states in new), strict=True)
        return list(keys), list(values)

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return max(layer.get_seq_length() for layer in self.layers)


def _joined(caches: Sequence[Cache], config: HoVLEConfig) -> Cache:
    """The caches of rows as one, for a pass with one token each."""
    found = Cache(layers=[LayerOfRows(layers) for layers in zip(*(cache.layers for cache in caches), strict=True)])
    if config.pixel_shuffle_loc == "post":  # HoVLE-HD counts a row's positions in its long sequence by a mask
        first = config.num_language_layers  # of the holistic layers
        lengths = torch.tensor([[cache.layers[first].get_seq_length()] for cache in caches])
        longest = int(lengths.max())
        found.holistic_state = HolisticCacheState(  # type: ignore[attr-defined]
            attention_mask=(torch.arange(longest) >= longest - lengths).to(caches[0].layers[0].keys.device),
            short_length=found.get_seq_length(),
            long_length=longest,
        )
    return found


def _count_token(cache: Cache, config: HoVLEConfig) -> None:
    """Note beside HoVLE-HD's cache of a row that it holds a token more."""
    state = getattr(cache, "holistic_state", None)
    if state is not None:
        cache.holistic_state = state = copy.copy(state)  # type: ignore[attr-defined]
        state.keep_beside(cache, config, None, 1, 1, None)


# ---------------------------------------------------------------------------------------------- attention

_attention_of_a_row: contextvars.ContextVar[str] = contextvars.ContextVar("_attention_of_a_row")


@contextlib.contextmanager
def _attending_row_by_row(model: HoVLEForConditionalGeneration) -> Iterator[None]:
    """Let the layers look at rows one by one, each as they do otherwise. No masks are made meanwhile."""
    configs = [model.config.text_config, model.model.language_model.config]
    own = configs[0]._attn_implementation
    token = _attention_of_a_row.set(own)
    for config in configs:
        config._attn_implementation = ROWS
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = own
        _attention_of_a_row.reset(token)


def attend_row_by_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Sequence[torch.Tensor],
    value: Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token for each row, as transformers calls it; a row's last token may see all its keys.

    Args:
        module: The attention layer.
        query: Shape `(B, heads, 1, head size)`.
        key: Of each row `(1, key heads, T, head size)`.
        value: As `key`.
        attention_mask: Ignored, as nothing is padded.
        **kwargs: Of the layer's own attention.

    Returns:
        Shape `(B, 1, heads, head size)`.
    """
    kwargs.pop("position_ids", None)  # those of all rows; flash attention would look for documents in them
    attend = _own_attention(module)
    rows = zip(query.split(1), key, value, strict=True)
    return torch.cat([attend(module, *states, None, **kwargs)[0] for states in rows]), None


def _own_attention(module: torch.nn.Module) -> Callable:
    """The attention function a layer has when nobody looks at rows one by one."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(_attention_of_a_row.get(), eager)


AttentionInterface.register(ROWS, attend_row_by_row)
