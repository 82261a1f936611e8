"""HoVLE: pixels and words enter one embedding, and the language model sees a single sequence.

Read from top to bottom: patch stem -> holistic layers -> language model. `image_tokens.py` puts pictures in their
places (pixel shuffle, placeholders, HD's longer sequence), `generation.py` holds what `generate` does differently.

The decoder is one stock stack of N + M layers. The first N are the holistic embedding, the last M the language
model; no norm stands between them. HoVLE-HD (`pixel_shuffle_loc="post"`) shuffles after the holistic layers, so
these see a longer sequence than the language model; `HolisticLayout` maps between the two.

Axis legend of this file (logical sizes, never a shard):
  B prompts in the batch   T tokens of one prompt as the language model sees them   L the same as the holistic
  layers see them (L = T unless HD)   N image tiles in the batch   S image tokens of one tile   D hidden size
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .backbones import (
    CACHE,
    MASK_FUNCTIONS,
    attention_types,
    check_backbone,
    final_norm,
    given_cache,
    refuse_router_losses,
    rotary_tables,
    scale_embeddings,
    scale_logits,
)
from .cache import HolisticCacheState
from .configuration_hovle import HoVLEConfig
from .generation import HoVLEGenerationMixin
from .image_tokens import (
    HolisticLayout,
    check_image_tokens,
    check_padding_mask,
    check_whole_tiles,
    document_boundaries,
    merge_image_tokens,
    number_pictures,
    pixel_shuffle,
    positions_from_mask,
    take_image_tokens,
)
from .language_model import build_around_language_model
from .rotary import embedding_rope_config

IGNORE_INDEX = -100
"""Label of a position without a loss."""


class HoVLEPatchEmbedding(nn.Module):
    """Turn square tiles into patch vectors: convolution plus learned position embedding."""

    def __init__(self, config: HoVLEConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.patch_size = config.patch_size
        self.grid_size = config.image_size // config.patch_size
        self.projection = nn.Conv2d(
            config.num_channels, hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Parameter(torch.zeros(1, self.grid_size**2, hidden_size))

    def positions_for(self, grid_size: int) -> torch.Tensor:
        """Resize the position embedding to another square grid, bicubic as in InternViT; `(1, grid_size ** 2, D)`."""
        if grid_size == self.grid_size:
            return self.position_embedding
        grid = self.position_embedding.float().unflatten(1, (self.grid_size, self.grid_size)).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, size=(grid_size, grid_size), mode="bicubic", align_corners=False)
        return grid.flatten(2).transpose(1, 2).to(self.position_embedding.dtype)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed tiles of shape `(N, C, s, s)` as row-major patches `(N, (s / patch_size) ** 2, D)`."""
        patches = self.projection(pixel_values.to(self.projection.weight.dtype))  # (N, D, H, W)
        grid_size = patches.shape[-1]
        return patches.flatten(2).transpose(1, 2) + self.positions_for(grid_size)


class HoVLEPixelShuffleProjector(nn.Module):
    """Join neighbouring patches into one token of the hidden size."""

    def __init__(self, config: HoVLEConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.factor = config.shuffle_factor
        self.linear_1 = nn.Linear(hidden_size * self.factor**2, hidden_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Map `(N, H * H, D)` to `(N, H * H / factor ** 2, D)`."""
        return self.linear_2(self.act(self.linear_1(pixel_shuffle(patches, self.factor))))


@dataclass
class HoVLEModelOutputWithPast(BaseModelOutputWithPast):
    """Outputs of `HoVLEModel`; `last_hidden_state` is the language model's, after its final norm, `(B, T, D)`.

    The cache is called as this transformers calls it, `cache` or (before 5.24) `past_key_values`.
    """

    image_hidden_states: torch.FloatTensor | None = None
    """What the language model sees of the pictures, before normalisation, shape `(N, S, D)`."""


@dataclass
class HoVLECausalLMOutputWithPast(CausalLMOutputWithPast):
    """Outputs of `HoVLEForConditionalGeneration`, the cache called as in `HoVLEModelOutputWithPast`.

    `loss` is the mean next-token cross-entropy in nats per supervised token, when `labels` were given; `logits` have
    shape `(B, T, V)`, or the last `logits_to_keep` positions only.
    """

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class HolisticEmbeddingOutput(ModelOutput):
    """Outputs of the holistic layers alone."""

    last_hidden_state: torch.FloatTensor | None = None
    """The residual stream over the whole sequence before normalisation: `(B, T, D)`, or `(B, L, D)` for HD."""
    image_hidden_states: torch.FloatTensor | None = None
    """Its image part as the language model will see it (for HD after shuffle and MLP), shape `(N, S, D)`."""
    inputs_embeds: torch.FloatTensor | None = None
    """What enters the language model's first layer, shape `(B, T, D)`."""
    hidden_states: tuple[torch.Tensor, ...] | None = None
    """Output of each holistic layer, shapes as `last_hidden_state`, when `output_hidden_states` was given."""


@dataclass
class PreparedInputs:
    """One forward pass as the language model's sequence sees it."""

    embeds: torch.Tensor
    """Text embeddings with throwaway rows at placeholders, shape `(B, T, D)`."""
    image_features: torch.Tensor | None
    """Output of the stem, shape `(N, S, D)` or longer for HD."""
    image_mask: torch.Tensor | None
    """True at placeholders, shape `(B, T)`."""
    attention_mask: torch.Tensor | None
    """The caller's padding mask."""
    causal_masks: dict[str, torch.Tensor | None]
    """What the attention function takes, for each attention pattern among the layers."""
    holistic_masks: dict[str, torch.Tensor | None]
    """The same for the holistic layers, where the tokens of one picture may see each other (not for HD)."""
    position_ids: torch.Tensor
    """Shape `(B, T)` or `(1, T)`."""


class HoVLEPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the contracts with transformers."""

    config: HoVLEConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer"]  # noqa: RUF012 - the base class declares these as plain attributes
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": LlamaAttention}  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a saved HoVLE as the base class does, whole or not at all.

        Args:
            pretrained_model_name_or_path: Folder or Hub id of a HoVLE, or None for the weights in `state_dict`.
            *model_args: Of the base class.
            **kwargs: Of the base class. With `output_loading_info=True` missing weights are reported, not refused.

        Raises:
            ValueError: For a model of another type, and for missing weights: random ones would take their place.
        """
        wants_report = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        if wants_report:
            return model, report
        if pretrained_model_name_or_path is not None and (missing := sorted(report["missing_keys"])):
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights, among them {missing[0]}; random ones "
                "would take their place. Save the model anew, or load it all the same with output_loading_info=True."
            )
        return model

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, HoVLEPatchEmbedding):
            init.normal_(module.position_embedding, mean=0.0, std=self.config.initializer_range)
        elif module is getattr(self, "embedding_rotary_emb", None):
            self.language_model._init_weights(module)  # some families keep a table for each attention pattern

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """Resize the vocabulary as in the base class; `ValueError` when the placeholder would lose its row."""
        if new_num_tokens is not None and new_num_tokens <= self.config.image_token_id:
            raise ValueError(
                f"A vocabulary of {new_num_tokens} tokens leaves no row for image_token_id "
                f"{self.config.image_token_id}: keep at least {self.config.image_token_id + 1}."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)


class HoVLEModel(HoVLEPreTrainedModel):
    """Patch stem and the decoder of holistic layers and language model, without the head."""

    def __init__(self, config: HoVLEConfig):
        super().__init__(config)
        config.check_image_token_id()
        self.patch_embedding = HoVLEPatchEmbedding(config)
        self.projector = None if config.pixel_shuffle_loc == "none" else HoVLEPixelShuffleProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.attention_types = attention_types(config.text_config)
        check_backbone(self.language_model)
        # Dynamic rope keeps state, and HD's two sequences differ in length: each section has its own table.
        rope_config = embedding_rope_config(config.text_config, config.embedding_rope_parameters)
        self.embedding_rotary_emb = type(self.language_model.rotary_emb)(rope_config)
        if self.is_hd:
            self._put_language_layers_first_in_cache()
        self.post_init()

    @property
    def is_hd(self) -> bool:
        """Whether the holistic layers see a longer sequence than the language model."""
        return self.config.pixel_shuffle_loc == "post"

    @property
    def embedding_layers(self) -> nn.ModuleList:
        """The holistic layers."""
        return self.language_model.layers[: self.config.num_embedding_layers]

    @property
    def language_layers(self) -> nn.ModuleList:
        """The layers of the language model."""
        return self.language_model.layers[self.config.num_embedding_layers :]

    @property
    def rotary_embs(self) -> tuple[nn.Module, nn.Module]:
        """Rotary tables of the holistic layers and of the language model."""
        return self.embedding_rotary_emb, self.language_model.rotary_emb

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model

    @torch.no_grad()
    def text_table(self) -> torch.Tensor:
        """What each token id enters the first layer as, scaled as the family scales it; a copy of shape `(V, D)`."""
        table = self.get_input_embeddings()
        weight: torch.Tensor = table.weight  # type: ignore[assignment]
        embeds = table(torch.arange(len(weight), device=weight.device))
        return scale_embeddings(embeds, self.config.text_config)

    def _put_language_layers_first_in_cache(self) -> None:
        """Give the language model cache slots 0..M-1, so whoever asks a cache for its length hears the short one."""
        if len(set(self.attention_types)) > 1:
            raise ValueError(
                f"HoVLE-HD needs one attention pattern in all layers, but {self.config.text_config.model_type} mixes "
                f"{' and '.join(sorted(set(self.attention_types)))}."
            )
        num_layers = self.config.text_config.num_hidden_layers
        for index, layer in enumerate(self.language_model.layers):
            layer.self_attn.layer_idx = (index - self.config.num_embedding_layers) % num_layers

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Run the patch stem.

        Args:
            pixel_values: Normalised tiles, shape `(N, C, s, s)`; any `s` that divides into whole tokens.
            **kwargs: Ignored; `generate` passes `return_dict`.

        Returns:
            `pooler_output` (and `last_hidden_state`): the tokens that enter the holistic layers, shape `(N, S, D)`;
            for HD the patches, `(N, S * shuffle_factor ** 2, D)`.
        """
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values must have shape (tiles, {self.config.num_channels}, size, size), "
                f"got {tuple(pixel_values.shape)}."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values must be normalised floating-point numbers, got {pixel_values.dtype}.")
        if pixel_values.shape[2] != pixel_values.shape[3]:
            raise ValueError(f"Tiles must be square, got {pixel_values.shape[2]} x {pixel_values.shape[3]} pixels.")
        self.config.tokens_per_tile(pixel_values.shape[-1])
        features = self.patch_embedding(pixel_values)
        if self.config.pixel_shuffle_loc == "pre":
            assert self.projector is not None
            features = self.projector(features)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=features)

    def _run_layers(
        self,
        layers: nn.ModuleList,
        attention_types: list[str],
        rotary_emb: nn.Module,
        hidden_states: torch.Tensor,
        causal_masks: dict[str, torch.Tensor | None],
        position_ids: torch.Tensor,
        cache: Cache | None,
        /,
        layer_outputs: list[torch.Tensor] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Run one section of the decoder, `(B, T, D)` to `(B, T, D)`; `layer_outputs` gathers what layers give."""
        position_embeddings = rotary_tables(rotary_emb, hidden_states, position_ids, attention_types)
        if "cache" not in kwargs:  # continuous batching says itself what is to be attended to
            kwargs |= self._flash_arguments(hidden_states, causal_masks, position_ids, cache)
        for layer, attention_type in zip(layers, attention_types, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_masks[attention_type],
                position_ids=position_ids,
                position_embeddings=position_embeddings[attention_type],
                **({CACHE: cache, "use_cache": cache is not None} | kwargs),
            )
            if layer_outputs is not None:
                layer_outputs.append(hidden_states)
        return hidden_states

    def _causal_masks(self, hidden_states, attention_mask, position_ids, cache, image_mask=None):
        """Build one mask for each attention pattern among the layers; a mask that `generate` has prepared is kept.

        With `image_mask`, tokens of one picture see each other in both directions.
        """
        if isinstance(attention_mask, dict):
            return attention_mask
        pictures = None
        if image_mask is not None:
            if "flash" in self.config.text_config._attn_implementation:
                raise ValueError(
                    "Flash attention is causal; bidirectional pictures need sdpa, eager or flex_attention."
                )
            past_length = 0 if cache is None else cache.get_seq_length()
            pictures = nn.functional.pad(number_pictures(image_mask), (past_length, 0), value=-1)
        if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.dtype == torch.bool:
            if pictures is not None:
                queries = pictures[:, -hidden_states.shape[1] :, None]
                attention_mask = attention_mask | ((queries == pictures[:, None]) & (queries >= 0))[:, None]
            return dict.fromkeys(self.attention_types, self._own_mask(attention_mask, hidden_states.dtype))
        # An empty dynamic cache says nothing, but its mere presence switches off the detection of packed documents.
        if cache is not None and not cache.is_compileable and not cache.get_seq_length():
            cache = None
        return {
            attention_type: MASK_FUNCTIONS[attention_type](
                config=self.config.text_config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                block_sequence_ids=pictures,
                **{CACHE: cache},
            )
            for attention_type in sorted(set(self.attention_types))
        }

    def _flash_arguments(self, hidden_states, causal_masks, position_ids, cache) -> dict:
        """Where documents begin, for flash attention, which knows no mask between them.

        transformers finds them by itself in a single row only, and again in every layer.
        """
        batch_size, length = hidden_states.shape[:2]
        if "flash" not in self.config.text_config._attn_implementation or length == 1:
            return {}
        if any(mask is not None for mask in causal_masks.values()):
            return {}
        if cache is not None and (cache.is_compileable or cache.get_seq_length()):
            return {}
        boundaries = document_boundaries(position_ids.expand(batch_size, length))
        return {
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": length,  # a bound that is the same for all batches: the true one would be waited for
            "max_length_k": length,
        }

    def _own_mask(self, attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Put a caller's mask, `(B, 1, T, past + T)`, True where a token may look, into the form attention takes."""
        if "sliding_attention" in self.attention_types:
            raise ValueError("A 4-D attention_mask cannot be combined with sliding attention; give a 2-D one.")
        attention = self.config.text_config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(f"A 4-D attention_mask needs sdpa or eager attention, not {attention}.")
        if attention == "sdpa":
            return attention_mask
        return torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device).masked_fill(
            ~attention_mask, torch.finfo(dtype).min
        )

    def _embed_pictures(self, input_ids, pixel_values, cache, image_features):
        """Run the stem and find the placeholders; `(None, None)` without pictures, ValueError on a mismatch."""
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values).pooler_output
        image_mask = input_ids == self.config.image_token_id
        if image_features is not None:
            slots_per_placeholder = self.config.shuffle_factor**2 if self.is_hd else 1
            tokens_per_tile = image_features.shape[1] // slots_per_placeholder
            check_image_tokens(image_mask, len(image_features), tokens_per_tile)
            if pixel_values is not None:  # `generate` may cut encoded pictures into chunks
                check_whole_tiles(image_mask, tokens_per_tile)
            return image_features, image_mask
        if torch.compiler.is_compiling():  # a static cache tells its length as a tensor
            return None, None
        # A single token after a cache is one the model itself has generated, even if it is the placeholder.
        if cache is None or cache.get_seq_length() == 0 or input_ids.shape[1] > 1:
            check_image_tokens(image_mask, 0, self.config.image_seq_length)
        return None, None

    def _check_cache_kind(self, cache: Cache | None) -> None:
        if cache is not None and cache.is_compileable and "flex" in self.config.text_config._attn_implementation:
            raise ValueError(
                "flex_attention with a static cache reads a wrong length in transformers' masks: take a dynamic "
                "cache, or sdpa or eager attention."
            )

    def _check_positions(self, position_ids, attention_mask, length: int, cache: Cache | None) -> None:
        """Raise ValueError for position ids that nothing would follow; not for single tokens, nor while compiling."""
        if length == 1 or torch.compiler.is_compiling():
            return
        steps = position_ids.diff(dim=1)
        if attention_mask is None and cache is not None and (cache.is_compileable or cache.get_seq_length()):
            if bool((steps != 1).any()):
                raise ValueError(
                    "position_ids restart or jump, as those of packed documents do, but with a static cache, or one "
                    "that holds tokens, the documents would see each other: use an empty dynamic cache, or none."
                )
        elif self.is_hd:
            is_fine = (steps == 1) | (position_ids[:, 1:] == 0)
            if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
                is_token = attention_mask[:, -length:].bool()
                is_fine = is_fine | ~(is_token[:, 1:] & is_token[:, :-1])
            if not bool(is_fine.all()):
                raise ValueError(
                    "HoVLE-HD counts the positions of its long sequence by itself: position_ids must go on by 1, or "
                    "restart at 0 where a document begins."
                )

    def _refuse_a_cut_through_a_picture(self, image_mask: torch.Tensor | None, cache: Cache | None) -> None:
        """Raise ValueError where a picture goes on that earlier tokens should have seen in both directions."""
        if cache is None or self.config.image_attention == "causal":
            return
        ended_in_picture = getattr(cache, "ended_in_picture", None)
        cache.ended_in_picture = None if image_mask is None else image_mask[:, -1]  # type: ignore[attr-defined]
        if ended_in_picture is None or image_mask is None or torch.compiler.is_compiling():
            return
        if len(ended_in_picture) != len(image_mask):  # others have changed the rows
            ended_in_picture = ended_in_picture.any()
        if cache.get_seq_length() and bool((ended_in_picture & image_mask[:, 0]).any()):
            raise ValueError(
                "A pass ended within a picture that this one goes on with; bidirectional pictures must be given "
                "whole: all tiles of a picture in one pass."
            )

    def _prepare(self, input_ids, pixel_values, attention_mask, position_ids, cache, inputs_embeds, image_features):
        """Embed text and pictures and settle positions and mask of the language model's sequence."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        image_mask = None
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            image_features, image_mask = self._embed_pictures(input_ids, pixel_values, cache, image_features)
        elif pixel_values is not None or image_features is not None:
            raise ValueError("Pictures need input_ids, which say where they stand; inputs_embeds do not.")
        batch_size, length = inputs_embeds.shape[:2]
        self._check_cache_kind(cache)
        check_padding_mask(attention_mask, batch_size, length, cache)
        if position_ids is not None:
            self._check_positions(position_ids, attention_mask, length, cache)
        if position_ids is None and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            position_ids = positions_from_mask(attention_mask)[:, -length:]
        elif position_ids is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(length, device=inputs_embeds.device) + past_length)[None]
        self._refuse_a_cut_through_a_picture(image_mask, cache)
        causal_masks = self._causal_masks(inputs_embeds, attention_mask, position_ids, cache)
        holistic_masks = causal_masks
        if image_mask is not None and self.config.image_attention == "bidirectional" and not self.is_hd:
            holistic_masks = self._causal_masks(inputs_embeds, attention_mask, position_ids, cache, image_mask)
        return PreparedInputs(
            inputs_embeds, image_features, image_mask, attention_mask, causal_masks, holistic_masks, position_ids
        )

    def _normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.config.normalize_encoder_output:
            return hidden_states
        norm = hidden_states.norm(dim=-1, keepdim=True)
        return hidden_states / norm.masked_fill(norm == 0, 1)  # padding is often a row of zeros

    def _run_holistic_layers(self, inputs, cache: Cache | None, /, **kwargs) -> HolisticEmbeddingOutput:
        """Run the holistic layers on the sequence the language model sees."""
        embeds = inputs.embeds
        if inputs.image_features is not None:
            embeds = merge_image_tokens(embeds, inputs.image_features, inputs.image_mask)
        hidden_states = self._run_layers(
            self.embedding_layers,
            self.attention_types[: self.config.num_embedding_layers],
            self.embedding_rotary_emb,
            scale_embeddings(embeds, self.config.text_config, self.training),
            inputs.holistic_masks,
            inputs.position_ids,
            cache,
            **kwargs,
        )
        image_hidden_states = None
        if inputs.image_features is not None:
            image_hidden_states = take_image_tokens(hidden_states, inputs.image_mask, *inputs.image_features.shape[:2])
        return HolisticEmbeddingOutput(hidden_states, image_hidden_states, self._normalize(hidden_states))

    def _run_holistic_layers_hd(self, inputs, cache: Cache | None, /, **kwargs) -> HolisticEmbeddingOutput:
        """Run the holistic layers on the long sequence of HoVLE-HD and shorten their output again."""
        layout, embeds = None, inputs.embeds
        if inputs.image_features is not None:
            num_tiles, num_patches = inputs.image_features.shape[:2]
            slots_per_placeholder = self.config.shuffle_factor**2
            layout = HolisticLayout.from_image_mask(
                inputs.image_mask, slots_per_placeholder, num_tiles * num_patches // slots_per_placeholder
            )
            embeds = merge_image_tokens(layout.spread(embeds), inputs.image_features, layout.image_mask)
        view = self._holistic_cache(cache)
        self._refuse_padding_within_a_window(layout, cache)
        self._make_room_in_static_cache(view, embeds.shape[1], embeds.shape[1] - inputs.embeds.shape[1])
        state = self._holistic_state(cache, view)
        long_mask = self._long_attention_mask(embeds, layout, inputs.attention_mask, view, state.attention_mask)
        long_positions = self._long_positions(embeds, layout, long_mask, inputs, view)
        pictures = None
        if layout is not None and self.config.image_attention == "bidirectional":
            pictures = layout.image_mask
        hidden_states = self._run_layers(
            self.embedding_layers,
            self.attention_types[: self.config.num_embedding_layers],
            self.embedding_rotary_emb,
            scale_embeddings(embeds, self.config.text_config, self.training),
            self._causal_masks(embeds, long_mask, long_positions, view, pictures),
            long_positions,
            cache,
            **kwargs,
        )
        if cache is not None:
            state.attention_mask = long_mask
            cache.holistic_state = state
            if not torch.compiler.is_compiling():
                holistic_layers = cache.layers[self.config.num_language_layers :]
                state.note(cache, holistic_layers, inputs.embeds.shape[1], embeds.shape[1])
        if layout is None:
            return HolisticEmbeddingOutput(hidden_states, None, self._normalize(hidden_states))
        patches = take_image_tokens(hidden_states, layout.image_mask, *inputs.image_features.shape[:2])
        assert self.projector is not None
        image_hidden_states = self.projector(patches)
        merged = merge_image_tokens(layout.collect(hidden_states), image_hidden_states, inputs.image_mask)
        return HolisticEmbeddingOutput(hidden_states, image_hidden_states, self._normalize(merged))

    def _holistic_cache(self, cache: Cache | None) -> Cache | None:
        """View of the cache that speaks for the holistic layers of HD (the slots after the language model's)."""
        layers = [] if cache is None else cache.layers[self.config.num_language_layers :]
        return Cache(layers=layers) if layers else None

    def _holistic_state(self, cache: Cache | None, view: Cache | None) -> HolisticCacheState:
        """What was kept beside a cache, empty for a new one; ValueError where an edit of the cache made it wrong."""
        state = getattr(cache, "holistic_state", None)
        if state is None or (torch.compiler.is_compiling() and view is not None):
            return state or HolisticCacheState()
        if cache is None or view is None or (not view.is_compileable and not view.get_seq_length()):
            return HolisticCacheState()
        if not view.is_compileable:
            # The language model's layers are empty when the holistic layers were run alone.
            state.follow_crop(cache.get_seq_length() or state.short_length, view.get_seq_length())
        state.check_rows(view.layers[0].keys)
        state.keys = None  # their memory is free as soon as longer ones take their place
        return state

    def _refuse_padding_within_a_window(self, layout: HolisticLayout | None, cache: Cache | None) -> None:
        """Raise ValueError where HD's own padding would come to lie between cached tokens and a sliding window's end.

        Windows count slots, so that padding would push tokens out of them.
        """
        if layout is None or cache is None or len(layout.is_token) == 1:
            return
        if "sliding_attention" not in self.attention_types:
            return
        if torch.compiler.is_compiling():  # cannot look: a static cache tells its length as a tensor
            is_wrong = cache.is_compileable or cache.get_seq_length() > 0
        else:
            is_wrong = bool(cache.get_seq_length() > 0) and not bool(layout.is_token.all())
        if is_wrong:
            raise ValueError(
                "HoVLE-HD with a sliding window cannot continue a cache with rows that gain different numbers of "
                "image tokens: give the whole conversation at once, or one row at a time."
            )

    def _make_room_in_static_cache(self, view: Cache | None, num_new: int, num_added: int) -> None:
        """Lengthen HD's holistic layers of a static cache by what the pictures add to the longest row.

        Whoever makes a static cache counts tokens as the language model sees them. The layers take their memory at
        their first update, which comes later, so they get exactly what these prompts need.

        Args:
            view: Holistic layers of the cache.
            num_new: L, slots this forward pass fills.
            num_added: L - T.

        Raises:
            ValueError: When the layers have their memory already and it is too short for this pass; compiled code
                cannot look.
        """
        for layer in [] if view is None else view.layers:
            if not layer.is_compileable:
                return
            if layer.is_initialized and not layer.is_sliding and not torch.compiler.is_compiling():
                needed = int(layer.get_seq_length()) + num_new
                if needed > layer.max_cache_len:
                    raise ValueError(
                        f"The static cache has {layer.max_cache_len} slots in HoVLE-HD's holistic layers, but the "
                        f"sequence with its pictures needs {needed}: make it for {needed - layer.max_cache_len} more "
                        "tokens, or anew for these prompts."
                    )
            elif not layer.is_initialized:
                longest = self.config.text_config.sliding_window if layer.is_sliding else math.inf
                layer.max_cache_len = int(min(layer.max_cache_len + num_added, longest))

    def _long_attention_mask(self, embeds, layout, attention_mask, view, past_mask):
        """Padding mask of HD's long sequence including what is cached, `(B, past + L)`; None when nothing is padded.

        A later step sees new tokens only, so the mask of the earlier ones is kept with the cache it describes.
        """
        batch_size, length = embeds.shape[:2]
        past_length = 0 if view is None else view.get_seq_length()
        if past_mask is not None and not torch.compiler.is_compiling() and not past_length:
            past_mask = None  # of what a static cache held before it was reset
        if attention_mask is not None and (isinstance(attention_mask, dict) or attention_mask.dim() != 2):
            raise ValueError(
                "HoVLE-HD builds its own masks for two sequences: give a 2-D attention_mask (batch, tokens), or none."
            )
        if attention_mask is None and past_mask is None and (layout is None or batch_size == 1):
            return None
        if attention_mask is None:
            new_mask = embeds.new_ones((batch_size, length), dtype=torch.bool)
        else:
            num_new = length if layout is None else layout.last_slot.shape[1]
            new_mask = attention_mask[:, -num_new:].bool()
            new_mask = new_mask if layout is None else layout.spread(new_mask)
        if layout is not None:
            new_mask = new_mask & layout.is_token
        if past_mask is None and past_length:
            past_mask = embeds.new_ones((batch_size, past_length), dtype=torch.bool)
        if past_mask is not None:
            new_mask = torch.cat([past_mask, new_mask], dim=1)
        # Looking at its values would break a graph; so would making the mask up later, from a static cache's length.
        if torch.compiler.is_compiling() or (view is not None and view.is_compileable):
            return new_mask
        return None if bool(new_mask.all()) else new_mask

    def _long_positions(self, embeds, layout, long_mask, inputs, view):
        """Position ids of HD's long sequence, `(B, L)`: counted per row, restarting where the short ones restart."""
        length = embeds.shape[1]
        if long_mask is not None:
            # A later step may have lost its mask, which `generate` drops where the prompts were not padded.
            is_prefill = length > 1 and inputs.attention_mask is None
            if is_prefill and torch.compiler.is_compiling():
                raise ValueError(
                    "HoVLE-HD compiled as one graph cannot tell whether a batch without attention_mask is packed: "
                    "give one, of ones where nothing is padded, or pack into one row."
                )
            if is_prefill and bool((inputs.position_ids == 0).sum(dim=1).max() > 1):
                raise ValueError(
                    "Packed rows of HoVLE-HD must hold the same number of image tokens each: rows of different long "
                    "lengths need a padding mask, which would let documents see each other. Pack into one row."
                )
            return positions_from_mask(long_mask)[:, -length:]
        past_length = 0 if view is None else view.get_seq_length()
        positions = (torch.arange(length, device=embeds.device) + past_length)[None]
        # Documents packed into one row start again at 0: subtract each document's first long slot.
        starts = inputs.position_ids == 0
        if length == 1 or past_length:
            return positions
        last_slot = torch.arange(length, device=embeds.device)[None] if layout is None else layout.last_slot
        first_slot = torch.cat([torch.zeros_like(last_slot[:, :1]), last_slot[:, :-1] + 1], dim=1)
        document_start = torch.where(starts, first_slot, 0).cummax(dim=1).values
        return positions - (document_start if layout is None else layout.spread(document_start))

    def get_holistic_embeddings(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        **kwargs,
    ) -> HolisticEmbeddingOutput:
        """Run the stem and the holistic layers only; the language model's layers are not touched.

        Args:
            input_ids: Prompts with `tokens_per_tile` placeholders per tile, shape `(B, T)`.
            pixel_values: All tiles of the batch in prompt order, shape `(N, C, s, s)`.
            attention_mask: 1 at real tokens, 0 at padding, shape `(B, past + T)`; or who may look at whom, bool,
                shape `(B, 1, T, past + T)` (not for HD).
            position_ids: Shape `(B, T)`; restarting ids mark documents packed into one row, which needs
                `attention_mask=None` (any mask lets them see each other) and no cache but an empty dynamic one. Those
                of HD go on by 1 or restart at 0.
            cache: Cache of earlier tokens, extended in place; `past_key_values` is the same.
            inputs_embeds: Text embeddings instead of `input_ids`, shape `(B, T, D)`; then without pictures.
            image_features: What `get_image_features` made of the tiles, instead of `pixel_values`.
            output_hidden_states: Also return what each holistic layer gives.
            **kwargs: Handed down to the attention function.

        Raises:
            ValueError: When placeholders and tiles do not match, with both counts.
        """
        cache = given_cache(cache, kwargs)
        inputs = self._prepare(
            input_ids, pixel_values, attention_mask, position_ids, cache, inputs_embeds, image_features
        )
        run = self._run_holistic_layers_hd if self.is_hd else self._run_holistic_layers
        if not output_hidden_states:
            return run(inputs, cache, **kwargs)
        layer_outputs: list[torch.Tensor] = []
        outputs = run(inputs, cache, layer_outputs=layer_outputs, **kwargs)
        outputs.hidden_states = tuple(layer_outputs)
        return outputs

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs,
    ) -> HoVLEModelOutputWithPast:
        """Run stem, holistic layers and language model; arguments as in `get_holistic_embeddings`.

        `use_cache` defaults to the text config's outside training; in training nothing is cached.
        """
        cache = given_cache(cache, kwargs)
        if use_cache is None:
            use_cache = bool(getattr(self.config.text_config, "use_cache", True)) and not self.training
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        inputs = self._prepare(
            input_ids, pixel_values, attention_mask, position_ids, cache, inputs_embeds, image_features
        )
        run = self._run_holistic_layers_hd if self.is_hd else self._run_holistic_layers
        holistic = run(inputs, cache, **kwargs)
        assert holistic.inputs_embeds is not None
        hidden_states = self._run_layers(
            self.language_layers,
            self.attention_types[self.config.num_embedding_layers :],
            self.language_model.rotary_emb,
            holistic.inputs_embeds,
            inputs.causal_masks,
            inputs.position_ids,
            cache,
            **kwargs,
        )
        return HoVLEModelOutputWithPast(
            last_hidden_state=final_norm(self.language_model)(hidden_states),
            image_hidden_states=holistic.image_hidden_states,
            **{CACHE: cache},
        )


class HoVLEForConditionalGeneration(HoVLEPreTrainedModel, HoVLEGenerationMixin):
    """HoVLE with the language model's head: next-token logits, loss and `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: HoVLEConfig):
        super().__init__(config)
        self.model = HoVLEModel(config)
        self.lm_head = nn.Linear(
            config.text_config.hidden_size, config.text_config.vocab_size, bias=config.language_head_bias
        )
        self.post_init()

    def compute_logits(self, hidden_states):
        """Next-token logits of final hidden states, `(..., D)` to `(..., V)`, scaled as the backbone's family does."""
        return scale_logits(self.lm_head(hidden_states), self.config.text_config)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Run the patch stem; see `HoVLEModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_holistic_embeddings(self, *args, **kwargs) -> HolisticEmbeddingOutput:
        """Run stem and holistic layers only; see `HoVLEModel.get_holistic_embeddings`."""
        return self.model.get_holistic_embeddings(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        **kwargs,
    ) -> HoVLECausalLMOutputWithPast:
        """Predict the next token.

        Args:
            input_ids: Prompts with `tokens_per_tile` placeholders per tile, shape `(B, T)`; the short sequence for
                HD too.
            pixel_values: All tiles of the batch in prompt order, shape `(N, C, s, s)`.
            attention_mask: 1 at real tokens, 0 at padding, shape `(B, past + T)`; or who may look at whom, bool,
                shape `(B, 1, T, past + T)` (not for HD).
            position_ids: Shape `(B, T)`; restarting ids mark documents packed into one row, which needs
                `attention_mask=None` (any mask lets them see each other) and no cache but an empty dynamic one. Those
                of HD go on by 1 or restart at 0.
            cache: Cache of earlier tokens, extended in place; `past_key_values` is the same.
            inputs_embeds: Text embeddings instead of `input_ids`, shape `(B, T, D)`; then without pictures.
            labels: Ids to predict, shape `(B, T)`; -100 and every image position are ignored.
            use_cache: Whether to return a cache; by default outside training only.
            logits_to_keep: Compute only the last so many logits; 0 for all; a tensor names positions.
            mm_encoder_outputs: `{"image": get_image_features(...)}`, which `generate` prepares since transformers
                5.18, instead of `pixel_values`.
            **kwargs: `num_items_in_batch` divides the loss; the rest is handed down to the attention function.

        Raises:
            ValueError: When placeholders and tiles do not match, with both counts; for `output_router_logits`, because
                mixtures of experts train without the routers' auxiliary loss.
        """
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if image_outputs is not None and pixel_values is not None:
            raise ValueError("Give pixel_values or mm_encoder_outputs, not both.")
        refuse_router_losses(self.config.text_config, kwargs.pop("output_router_logits", None))
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            image_features=None if image_outputs is None else image_outputs.pooler_output,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.compute_logits(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            is_image = None if input_ids is None else input_ids == self.config.image_token_id
            loss = self.loss_function(
                logits=logits,
                labels=labels if is_image is None else labels.masked_fill(is_image, IGNORE_INDEX),
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return HoVLECausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )

    @classmethod
    def from_language_model(
        cls,
        name_or_path: str | PreTrainedModel,
        num_embedding_layers: int = 8,
        *,
        image_token_id: int | None = None,
        untie_text_embeddings: bool = False,
        **kwargs,
    ) -> "HoVLEForConditionalGeneration":
        """Build a new HoVLE around a pretrained language model.

        The language model's layers are copied untouched. The new layers start as the identity (their output
        projections are zero), so text gives the bare model's logits until training begins. Special picture tokens
        the tokenizer lacks get new rows; no existing row changes.

        Args:
            name_or_path: Hub id or folder of a Llama-family causal language model, or such a model; of a
                vision-language model, its language model is taken. InternLM2's own files are read without their code.
                The new model is in its mode, evaluation when it is loaded here.
            num_embedding_layers: Holistic layers to put below it.
            image_token_id: Id of the placeholder; by default that of `<IMG_CONTEXT>`, which joins the tokenizer's
                vocabulary as `HoVLEProcessor.from_language_model` adds it. Without a tokenizer beside the model,
                three new rows follow the vocabulary and the placeholder is the last one.
            untie_text_embeddings: Give the holistic layers a text table of their own (a copy, as in the paper)
                where the language model ties its table to its head.
            **kwargs: Fields of `HoVLEConfig` (`image_size`, `patch_size`, `pixel_shuffle_loc`, ...); all others go
                to `AutoModelForCausalLM.from_pretrained` (`dtype`, `gguf_file`, ...).
        """
        return build_around_language_model(
            cls,
            name_or_path,
            num_embedding_layers,
            image_token_id=image_token_id,
            untie_text_embeddings=untie_text_embeddings,
            **kwargs,
        )


__all__ = ["HoVLEForConditionalGeneration", "HoVLEModel", "HoVLEPreTrainedModel"]
