"""Prompts that begin alike are read once: what a model made of words and images is kept for the next prompt.

Everything is causal, so what a token became does not depend on what follows it: a second question about the same
images, or the next turn of a conversation, goes on behind what it shares with an earlier prompt.
"""

import copy
import dataclasses
import hashlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import Cache

from ..model.backbones import CACHE
from ..model.modeling_hovle import HoVLEForConditionalGeneration
from ..model.processing_hovle import HoVLEProcessor
from ..model.rotary import same_rotation

MAX_BYTES = 2**30
"""Of keys and values, in all. A token of the released models takes 128 KiB in bfloat16: 32 layers, 8 heads of 128."""

MAX_PROMPTS = 64
"""Prompts that are kept at most: a new one is compared with each."""

NOT_FOR_PREFIXES = ("num_beams", "num_return_sequences", "cache_implementation", "prompt_lookup_num_tokens", CACHE)
"""Options of `generate` that want a cache of another kind, or several rows of it."""

AS_TENSOR = "return_dict_in_generate"


@dataclass(frozen=True)
class _Read:
    """Tokens a model has read, and what it made of them."""

    signature: torch.Tensor
    """One number for each token: its id, or for a placeholder the hash of its tile, below 0; shape `(T,)`."""
    is_image: torch.Tensor
    """Shape `(T,)`."""
    cache: Cache
    """Never changed: a generation goes on from a copy, which shares its memory."""

    @property
    def num_bytes(self) -> int:
        """Memory it holds, with what was taken for tokens that did not come or were left out."""
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        return sum(item.untyped_storage().nbytes() for layer in layers for item in (layer.keys, layer.values))


@dataclass(frozen=True)
class BegunPrompt:
    """A prompt of which the beginning may have been read."""

    inputs: dict[str, Any]
    """What `model.generate` reads: all ids, the tiles that are left, and the cache."""
    num_reused: int
    """Tokens the cache holds."""
    signature: torch.Tensor
    """Shape `(T,)`; see `sign`."""
    is_image: torch.Tensor
    """Where placeholders stand, shape `(T,)`."""

    @property
    def cache(self) -> Cache:
        """Filled by `generate`."""
        return self.inputs[CACHE]


class PrefixCache:
    """Generates, and reads of each prompt only what no earlier one began with.

    It may be used from several threads at once: what is kept is never changed.

    Args:
        model: In evaluation mode; its weights must stay as they are.
        max_bytes: Of keys and values of all prompts that are kept; those not used for longest go first. A prompt that
            takes more by itself is not kept.

    Attributes:
        num_reused: Tokens of the last prompt that did not have to be read.
    """

    def __init__(self, model: HoVLEForConditionalGeneration, max_bytes: int = MAX_BYTES):
        self.model = model
        self.max_bytes = max_bytes
        self.num_reused = 0
        self._reads: list[_Read] = []  # last used last
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Memory of all that is kept."""
        with self._lock:
            return sum(read.num_bytes for read in self._reads)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._reads.clear()

    @torch.no_grad()
    def generate(self, inputs: Mapping[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """Generate as `model.generate(**inputs, **options)` does.

        Args:
            inputs: As `begin` takes them.
            **options: Of `generate`, `generation_config` among them; none that needs several rows or a cache of its
                own, and no `return_dict_in_generate`.

        Returns:
            Prompt and answer, shape `(1, T + new)`.

        Raises:
            ValueError: As `begin`, and for options that go with no shared cache.
        """
        given = _as_asked(options)
        refused = [name for name in NOT_FOR_PREFIXES if given(name) not in (None, 1)]
        if refused:
            raise ValueError(f"{refused[0]} needs a cache of its own: call model.generate, or leave it out.")
        if given(AS_TENSOR):
            raise ValueError(
                f"{AS_TENSOR} would give away the cache that is kept: call model.generate, or leave it out."
            )
        own = self.model.generation_config
        options[AS_TENSOR] = False  # whatever the model's own settings say
        if any(getattr(own, name, None) not in (None, 1) for name in NOT_FOR_PREFIXES):
            self.num_reused = 0  # the model's own settings want what cannot be shared
            return self.model.generate(**{**inputs, **options})
        begun = self.begin(inputs, _num_new(given, own, inputs["input_ids"].shape[1]))
        generated = self.model.generate(**begun.inputs, **options)
        self.num_reused = begun.num_reused
        self.keep(begun, generated[0], begun.cache)
        return generated

    def begin(self, inputs: Mapping[str, torch.Tensor], num_new: int = 0) -> "BegunPrompt":
        """Find what of a prompt has been read, for a generation that goes on from there.

        Args:
            inputs: What the processor makes of one prompt: `input_ids` `(1, T)`, `attention_mask` without padding
                and, where it shows images, `pixel_values` of all of them.
            num_new: Tokens the answer may take.

        Raises:
            ValueError: For several prompts, and padding.
        """
        input_ids, pixel_values = inputs["input_ids"], inputs.get("pixel_values")
        mask = inputs.get("attention_mask")
        if len(input_ids) != 1 or (mask is not None and not bool(mask.all())):
            raise ValueError(
                f"One prompt without padding is read at a time, got {len(input_ids)} rows"
                f"{'' if mask is None else f' with {int((mask == 0).sum())} places of padding'}."
            )
        ids = input_ids[0].cpu()
        is_image = ids == self.model.config.image_token_id
        signature = sign(ids, is_image, pixel_values)
        num_read = len(signature) + max(0, num_new - 1)  # the answer's last token is not
        num_reused, cache = self._longest_prefix(signature, is_image, num_read)
        rest: dict[str, Any] = {**inputs, CACHE: cache}
        if pixel_values is not None:
            rest["pixel_values"] = pixel_values[num_tiles(is_image[:num_reused], is_image, len(pixel_values)) :]
        return BegunPrompt(rest, num_reused, signature, is_image)

    def _turns(self, num_tokens: int, is_image: torch.Tensor) -> bool:
        """Whether positions are others than in a shorter sequence; HoVLE-HD's holistic layers have more of them.

        Args:
            num_tokens: Of the sequence.
            is_image: Placeholders of the prompt it begins with.
        """
        num_more = int(is_image.sum()) * (self.model.config.slots_per_placeholder - 1)
        longest = min(same_rotation(rotary_emb.config) for rotary_emb in self.model.model.rotary_embs)
        return num_tokens + num_more > longest

    def _longest_prefix(self, signature: torch.Tensor, is_image: torch.Tensor, longest: int) -> tuple[int, Cache]:
        """What of a prompt has been read, and a copy of what was made of it; nothing where positions would turn.

        Args:
            signature: Of the prompt.
            is_image: Where it shows images.
            longest: Tokens of prompt and answer that may be read.
        """
        best, best_length = None, 0
        if not self._turns(longest, is_image):
            with self._lock:
                for read in self._reads:
                    length = common_length(read, signature, is_image)
                    if length >= max(1, best_length) and _can_be_cut(read, length, self.model.model.is_hd):
                        best, best_length = read, length
                if best is not None:  # it is the last one used
                    self._reads = [read for read in self._reads if read is not best] + [best]
        if best is None:
            return 0, DynamicCache(config=self.model.config)
        return best_length, copy_cache(best.cache, best_length - len(best.signature))

    def keep(self, begun: "BegunPrompt", ids: torch.Tensor, cache: Cache) -> None:
        """Keep what a generation has read, instead of what it went on from; nothing where positions have turned.

        Args:
            begun: The prompt.
            ids: Prompt and answer, shape `(T + new,)`.
            cache: What was made of them, of the last tokens perhaps not yet; nobody may change it from now on.
        """
        length = cache.get_seq_length()
        if self._turns(length, begun.is_image):
            return
        answer = ids[len(begun.signature) : length].cpu()
        read = _Read(
            torch.cat([begun.signature, answer])[:length],
            torch.cat([begun.is_image, torch.zeros_like(answer, dtype=torch.bool)])[:length],
            cache,
        )
        if read.num_bytes > self.max_bytes:
            return
        with self._lock:
            self._reads = [old for old in self._reads if not _goes_on(read, old, self.model.model.is_hd)] + [read]
            while len(self._reads) > MAX_PROMPTS or sum(item.num_bytes for item in self._reads) > self.max_bytes:
                self._reads.pop(0)


class ImageSession:
    """Ask one question after the other about the same images; they are read once.

    Args:
        model: In evaluation mode.
        processor: Of the model.
        images: Pictures, paths or URLs, as the processor's chat template takes them.
        max_bytes: As in `PrefixCache`.
    """

    def __init__(
        self,
        model: HoVLEForConditionalGeneration,
        processor: HoVLEProcessor,
        images: Sequence[Any],
        max_bytes: int = MAX_BYTES,
    ):
        self.processor = processor
        self.images = [{"type": "image", "image": image} for image in images]
        self.prefixes = PrefixCache(model, max_bytes)

    def ask(self, question: str, **options: Any) -> str:
        """Answer a question about the images; none sees the questions before it.

        Args:
            question: Plain text.
            **options: Of `generate`, such as `max_new_tokens`.
        """
        content = [*self.images, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.prefixes.model.device, self.prefixes.model.dtype)
        generated = self.prefixes.generate(inputs, **options)
        return self.processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _as_asked(options: Mapping[str, Any]) -> Callable[[str], Any]:
    """What a call of `generate` says of an option, by itself or in its `generation_config`; None where nothing."""
    config = options.get("generation_config")
    return lambda name: options[name] if name in options else getattr(config, name, None)


def _num_new(given: Callable[[str], Any], own: GenerationConfig, num_prompt: int) -> int:
    """Tokens an answer may take, by what a call says of them or of its whole length, else by the model's settings."""
    for says in (given, partial(getattr, own)):
        if says("max_new_tokens") is not None:
            return int(says("max_new_tokens"))
        if says("max_length") is not None:
            return int(says("max_length")) - num_prompt
    return 0


def sign(input_ids: torch.Tensor, is_image: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
    """A number for each token by which prompts are compared: its id, or the hash of its tile, below 0.

    Args:
        input_ids: Shape `(T,)`.
        is_image: Where placeholders stand, shape `(T,)`.
        pixel_values: Tiles in their order, shape `(N, C, s, s)`.

    Returns:
        Shape `(T,)`.
    """
    signature = input_ids.clone()
    count = int(is_image.sum())
    if pixel_values is None or not count or count % len(pixel_values):
        return signature  # `generate` says what is wrong with images and placeholders that do not match
    numbers = torch.tensor([_hash(tile) for tile in pixel_values.cpu()])
    signature[is_image] = numbers.repeat_interleave(count // len(pixel_values))
    return signature


def _hash(tile: torch.Tensor) -> int:
    digest = hashlib.blake2b(tile.contiguous().view(torch.uint8).numpy().data, digest_size=8).digest()
    return -1 - (int.from_bytes(digest) >> 1)


def num_tiles(is_image_read: torch.Tensor, is_image: torch.Tensor, num_all: int) -> int:
    """Tiles whose placeholders stand in the part of a prompt that was read."""
    return int(is_image_read.sum()) * num_all // max(1, int(is_image.sum()))


def common_length(read: _Read, signature: torch.Tensor, is_image: torch.Tensor) -> int:
    """Tokens a prompt shares with the beginning of what was read: not its last one, and no part of an image.

    Args:
        read: What was read.
        signature: Of the prompt, shape `(T,)`.
        is_image: Its placeholders; tiles of an image stand side by side.
    """
    most = min(len(read.signature), len(signature) - 1)
    length = int((read.signature[:most] == signature[:most]).long().cumprod(dim=0).sum())
    goes_on = bool(is_image[length]) or bool(read.is_image[length : length + 1].any())
    while goes_on and length > 0 and is_image[length - 1]:
        length -= 1
    return length


def _can_be_cut(read: _Read, length: int, is_hd: bool) -> bool:
    """Whether the tokens behind `length` can be taken out of a cache again.

    HoVLE-HD takes back text only; layers with a window forget what lies before it.
    """
    if length == len(read.signature):
        return True
    if is_hd and bool(read.is_image[length:].any()):
        return False
    return all(
        len(read.signature) < getattr(layer, "sliding_window", math.inf)
        for layer in read.cache.layers
        if layer.is_sliding
    )


def _goes_on(read: _Read, old: _Read, is_hd: bool) -> bool:
    """Whether what was read holds all that an earlier one did, and can be cut back to it."""
    length = len(old.signature)
    is_longer = len(read.signature) >= length and torch.equal(read.signature[:length], old.signature)
    return is_longer and _can_be_cut(read, length, is_hd)


def copy_cache(cache: Cache, num_removed: int = 0) -> Cache:
    """A cache that goes on by itself and shares the memory of what it holds.

    Args:
        cache: A dynamic one.
        num_removed: 0, or less for tokens left out at its end.
    """
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    state = getattr(cache, "holistic_state", None)
    if state is not None:
        found.holistic_state = dataclasses.replace(state)  # type: ignore[attr-defined]
    if num_removed:
        found.crop(num_removed)
    return found
