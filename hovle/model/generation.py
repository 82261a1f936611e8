"""What `generate` must do differently for HoVLE: tiles that go with their prompts, two caches, longrope, refusals."""

import functools
import math
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .backbones import CACHE
from .cache import holistic_part, reorder
from .checks import check_cache_kind, check_whole_tiles
from .rotary import rope_switch


class HoVLEGenerationMixin(GenerationMixin):
    """`generate` of `HoVLEForConditionalGeneration`."""

    config: Any
    model: Any

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args, pixel_values: torch.Tensor | None = None, **kwargs):
        # A pipeline joins its prompts' outputs: no tiles at all are a tensor of none there, and an argument for each
        # prompt is a list.
        if pixel_values is not None and len(pixel_values):
            kwargs["pixel_values"] = pixel_values
        return super().generate(*args, **{name: _once(name, value) for name, value in kwargs.items()})

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # Every copy of a prompt needs all its tiles, in order. The base class would repeat tile after tile, or take
        # HoVLE-HD's patches for tokens.
        pixel_values = model_kwargs.pop("pixel_values", None)
        image_outputs = (model_kwargs.pop("mm_encoder_outputs", None) or {}).get("image")
        prompts, cache = input_ids, model_kwargs.get(CACHE)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixel_values is None and image_outputs is None:
            return input_ids, model_kwargs
        num_cached = 0 if cache is None else cache.get_seq_length()
        image_mask = prompts[:, num_cached:] == self.config.image_token_id
        num_placeholders = image_mask.sum(dim=1)
        if pixel_values is not None:
            tokens_per_tile = self.config.tokens_per_tile(pixel_values.shape[-1])
            model_kwargs["pixel_values"] = _repeat_tiles(pixel_values, num_placeholders, tokens_per_tile, expand_size)
        if image_outputs is not None:
            features = image_outputs.pooler_output
            tokens_per_tile = features.shape[1] // self.config.slots_per_placeholder
            if int(num_placeholders.sum()) == len(features) * tokens_per_tile:  # else the forward pass reports it
                check_whole_tiles(image_mask, tokens_per_tile)
            features = _repeat_tiles(features, num_placeholders, tokens_per_tile, expand_size)
            outputs = BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=features)
            model_kwargs["mm_encoder_outputs"] = {"image": outputs}
        return input_ids, model_kwargs

    def create_masks_for_generate(self, attention_mask=None, is_first_iteration=False, **kwargs):
        # HoVLE-HD needs a mask for each of its two sequences, and bidirectional pictures need to know where they are:
        # both are built in the forward pass, from the padding mask.
        check_cache_kind(kwargs.get(CACHE), self.config)
        if self.model.is_hd or (is_first_iteration and self.config.image_attention == "bidirectional"):
            return attention_mask
        masks = create_masks_for_generate(
            attention_mask=attention_mask, is_first_iteration=is_first_iteration, **kwargs
        )
        if masks is None or isinstance(masks, dict):
            return masks
        return dict.fromkeys(self.model.attention_types, masks)  # says that it is ready, unlike a caller's own

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        is_special = self.model.is_hd or self.config.image_attention == "bidirectional"
        if generation_config.prefill_chunk_size is not None and is_special and _has_pictures(model_kwargs):
            raise ValueError(
                "prefill_chunk_size would cut pictures, which HoVLE-HD and bidirectional pictures do not allow; leave "
                "it out."
            )
        switch = min(rope_switch(rotary_emb) for rotary_emb in self.model.rotary_embs)
        if generation_config.use_cache and switch < math.inf:
            if generation_config.prefill_chunk_size is not None and generation_config.max_length > switch:
                raise ValueError(
                    f"prefill_chunk_size cannot be used where prompt and answer may exceed {switch} tokens: from "
                    "there on longrope rotates by other factors, which keys in a cache cannot follow. Leave it out."
                )
            model_kwargs["max_length"] = generation_config.max_length  # `prepare_inputs_for_generation` takes it out
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` takes what its signature names
    def prepare_inputs_for_generation(self, input_ids, *args, max_length: int | None = None, **kwargs):
        if max_length is not None and kwargs.get("is_first_iteration"):
            self._refuse_rope_switch(input_ids, max_length - input_ids.shape[1] - 1, **kwargs)
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def _refuse_rope_switch(self, input_ids: torch.Tensor, num_later: int, **model_kwargs) -> None:
        """Raise ValueError where a sequence would outgrow longrope's short factors, which rotated the cached keys.

        Args:
            input_ids: Prompts, shape `(B, T)`.
            num_later: Tokens that will be read after the prompts.
            **model_kwargs: What `generate` prepares the first pass from.
        """
        for rotary_emb, (before, now) in zip(
            self.model.rotary_embs, self._section_lengths(input_ids, **model_kwargs), strict=True
        ):
            begin, end, switch = before or now, now + num_later, rope_switch(rotary_emb)
            if begin <= switch < end:
                raise ValueError(
                    f"Beyond {switch} tokens longrope rotates by other factors, which keys in a cache cannot follow, "
                    f"and the sequence may grow from {begin} to {end} tokens here: generate with use_cache=False, or "
                    f"at most {max(0, int(switch) - now + 1)} new tokens."
                )

    def _section_lengths(
        self, input_ids, attention_mask=None, inputs_embeds=None, next_sequence_length=None, **model_kwargs
    ) -> list[tuple[int, int]]:
        """Tokens of the longest row before and after the first pass: in the holistic layers, in the language model."""
        cache = model_kwargs.get(CACHE)
        num_cached = 0 if cache is None else int(cache.get_seq_length())
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        if next_sequence_length is None:  # the new tokens only
            length += num_cached
        num_tokens = torch.tensor([length]) if attention_mask is None else attention_mask.sum(dim=1).cpu()
        now = int(num_tokens.max())
        padding = length - now
        before = max(0, num_cached - padding)
        if not self.model.is_hd:
            return [(before, now), (before, now)]
        holistic = holistic_part(cache, self.config)
        num_long_cached = 0 if holistic is None else int(holistic.get_seq_length())
        is_image = input_ids[:, -(length - num_cached) :] == self.config.image_token_id
        num_added = is_image.sum(dim=1).cpu() * (self.config.slots_per_placeholder - 1) + num_long_cached - num_cached
        long_now = int((num_tokens + num_added).max())
        return [(max(0, num_long_cached - padding), long_now), (before, now)]

    def _reorder_cache(self, cache: Cache, beam_idx: torch.Tensor) -> Cache:
        reorder(cache, beam_idx, self.config)
        return cache

    def _get_logits_processor(self, generation_config, *args, **kwargs):
        # A placeholder means a picture, never a word. Prompt lookup would copy it from the prompt.
        suppressed = {*(generation_config.suppress_tokens or []), self.config.image_token_id}
        generation_config.suppress_tokens = sorted(suppressed)
        return super()._get_logits_processor(generation_config, *args, **kwargs)

    def _get_candidate_generator(self, generation_config, *args, **kwargs):
        if self.model.is_hd:
            raise ValueError(
                "HoVLE-HD cannot take back tokens from its two caches, which assisted generation needs: leave out "
                "assistant_model, prompt_lookup_num_tokens and assistant_early_exit."
            )
        if generation_config.assistant_early_exit is not None:
            raise ValueError("assistant_early_exit would leave out the language model's upper layers; leave it out.")
        assistant = kwargs.get("assistant_model")
        if "image" in getattr(assistant, "input_modalities", ()) and _has_pictures(kwargs["model_kwargs"]):
            raise ValueError(
                f"{type(assistant).__name__} cannot assist with pictures: `generate` hands on what this model's stem "
                "made of them, not the pictures. Take a text-only assistant_model with rows for the picture tokens."
            )
        if assistant is not None:  # transformers hands on what a text model does not take, pixels in 5.16
            dropped = ("pixel_values", "max_length")
            kept = {key: value for key, value in kwargs["model_kwargs"].items() if key not in dropped}
            kwargs["model_kwargs"] = kept
        return super()._get_candidate_generator(generation_config, *args, **kwargs)


def _once(name: str, value: Any) -> Any:
    """An argument of `generate`, of which a pipeline gives one for each prompt, all the same."""
    is_listed = (
        isinstance(value, list) and len(value) > 0 and all(isinstance(one, bool | int | float) for one in value)
    )
    if name in SINGLE and is_listed and len(set(value)) == 1:
        return value[0]
    return value


SINGLE = {name for name in vars(GenerationConfig()) if not name.endswith(("_id", "_ids", "_tokens"))}
"""Arguments of `generate` that are one number; ids and tokens may be lists."""


def _has_pictures(model_kwargs: dict) -> bool:
    """Whether `generate` was given pictures, as pixels or as what the stem made of them."""
    return model_kwargs.get("pixel_values") is not None or bool(
        (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
    )


def _repeat_tiles(
    tiles: torch.Tensor, num_placeholders: torch.Tensor, tokens_per_tile: int, num_copies: int
) -> torch.Tensor:
    """Repeat each prompt's group of tiles: A, B | C becomes A, B, A, B | C, C for two copies.

    Args:
        tiles: Pixels or features of all tiles in prompt order, shape `(N, ...)`.
        num_placeholders: Placeholders of each prompt, shape `(B,)`.
        tokens_per_tile: Placeholders one tile fills.
        num_copies: Copies of each prompt.
    """
    counts = [count // tokens_per_tile for count in num_placeholders.tolist()]
    if sum(counts) != len(tiles) or num_copies == 1:
        return tiles  # a mismatch is for the forward pass to report
    return torch.cat([group for tiles_of_one in tiles.split(counts) for group in [tiles_of_one] * num_copies])
