"""HoVLE: pixels and words enter one embedding, and the language model sees a single sequence.

Read from top to bottom: patch stem -> holistic layers -> language model. `holistic_sequence.py` knows the longer
sequence of HoVLE-HD, `decoder.py` runs layers, `masks.py` says who may look at whom, `cache.py` what is special about
a cache, `checks.py` what is refused, `generation.py` what `generate` does differently.

The decoder is one stock stack of N + M layers. The first N are the holistic embedding, the last M the language
model; no norm stands between them. So a HoVLE is its stock decoder on embeddings of words and images, and runs as one
call of it, unless something happens between the two sections (`decoder.is_stock_decoder`).

Axis legend of this file (logical sizes, never a shard):
  B prompts in the batch   T tokens of one prompt as the language model sees them   L the same as the holistic
  layers see them (L = T unless HD)   N image tiles in the batch   S image tokens of one tile   D hidden size
"""

from dataclasses import dataclass
from typing import Any

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
from transformers.utils.output_capturing import capture_outputs, maybe_install_capturing_hooks

from .backbones import (
    CACHE,
    attention_types,
    check_backbone,
    final_norm,
    refuse_router_losses,
    scale_embeddings,
    scale_logits,
)
from .cache import given_cache, put_language_layers_first, remember_open_image
from .checks import (
    check_engine,
    check_image_source,
    check_images,
    check_layers_of_hd,
    check_loaded_weights,
    check_new_vocabulary,
    check_one_of,
    check_pixel_values,
    check_sequence,
)
from .configuration_hovle import HoVLEConfig
from .decoder import is_stock_decoder, run_section, run_stock_decoder
from .generation import HoVLEGenerationMixin
from .holistic_sequence import HolisticSequence, LanguageInputs, LongHolisticSequence, SectionInputs
from .image_tokens import pixel_shuffle
from .language_model import FromLanguageModelMixin
from .masks import Masks, count_positions
from .pixels import normalize_pixels
from .quantization import check_quantized, leave_stem_and_head, refuse_wrong_device
from .rotary import embedding_rope_config

IGNORE_INDEX = -100
"""Label of a position without a loss."""


class HoVLEPatchEmbedding(nn.Module):
    """Turn square tiles into patch vectors: convolution plus learned position embedding."""

    def __init__(self, config: HoVLEConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.patch_size = config.patch_size
        self.image_mean, self.image_std = config.image_mean, config.image_std
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
        """Embed tiles of shape `(N, C, s, s)` as row-major patches `(N, (s / patch_size) ** 2, D)`.

        Bytes are normalised first; floating-point numbers are normalised already.
        """
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize_pixels(pixel_values.contiguous(), self.image_mean, self.image_std)
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

    image_hidden_states: torch.Tensor | None = None
    """What the language model sees of the images, before normalisation, shape `(N, S, D)`."""


@dataclass
class HoVLECausalLMOutputWithPast(CausalLMOutputWithPast):
    """Outputs of `HoVLEForConditionalGeneration`, the cache called as in `HoVLEModelOutputWithPast`.

    `loss` is the mean next-token cross-entropy in nats per supervised token, when `labels` were given; `logits` have
    shape `(B, T, V)`, or the last `logits_to_keep` positions only.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class HolisticEmbeddingOutput(ModelOutput):
    """Outputs of the holistic layers alone."""

    last_hidden_state: torch.Tensor | None = None
    """The residual stream over the whole sequence before normalisation: `(B, T, D)`, or `(B, L, D)` for HD."""
    image_hidden_states: torch.Tensor | None = None
    """Its image part as the language model will see it (for HD after shuffle and MLP), shape `(N, S, D)`."""
    language_inputs_embeds: torch.Tensor | None = None
    """What enters the language model's first layer, shape `(B, T, D)`."""
    hidden_states: tuple[torch.Tensor, ...] | None = None
    """Output of each holistic layer, shapes as `last_hidden_state`, when `output_hidden_states` was given."""

    @property
    def inputs_embeds(self) -> None:
        raise AttributeError("inputs_embeds of the holistic layers' output is called language_inputs_embeds.")


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
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a saved HoVLE as the base class does, whole or not at all.

        ValueError for a model of another type, for missing weights, which `output_loading_info=True` reports, and for
        a `quantization_config` that is known to go wrong; stem and head keep their format unless it says otherwise.
        """
        wants_report = kwargs.pop("output_loading_info", False)
        leave_stem_and_head(kwargs.get("quantization_config"))
        refuse_wrong_device(kwargs.get("quantization_config"), kwargs.get("device_map"))
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        check_quantized(model)
        if wants_report:
            return model, report
        if pretrained_model_name_or_path is not None:
            check_loaded_weights(pretrained_model_name_or_path, report["missing_keys"])
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HoVLEPatchEmbedding):
            init.normal_(module.position_embedding, mean=0.0, std=self.config.initializer_range)
        elif module is getattr(self, "embedding_rotary_emb", None):
            self.language_model._init_weights(module)  # some families keep a table for each attention pattern

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """Resize the vocabulary as in the base class; `ValueError` when the placeholder would lose its row."""
        check_new_vocabulary(new_num_tokens, self.config)
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)


class HoVLEModel(HoVLEPreTrainedModel):
    """Patch stem and the decoder of holistic layers and language model, without the head."""

    def __init__(self, config: HoVLEConfig):
        super().__init__(config)
        config.check_image_token_id()
        check_engine(config)
        self.patch_embedding = HoVLEPatchEmbedding(config)
        self.projector = None if config.pixel_shuffle_loc == "none" else HoVLEPixelShuffleProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.attention_types = attention_types(config.text_config)
        check_backbone(self.language_model)
        # Dynamic rope keeps state, and HD's two sequences differ in length: each section has its own table.
        rope_config = embedding_rope_config(config.text_config, config.embedding_rope_parameters)
        self.embedding_rotary_emb = type(self.language_model.rotary_emb)(rope_config)
        self.has_one_rope = rope_config.to_dict() == config.text_config.to_dict()
        self.sequence_class = LongHolisticSequence if self.is_hd else HolisticSequence
        if self.is_hd:
            check_layers_of_hd(config)
            put_language_layers_first(self.language_model.layers, config.num_embedding_layers)
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
    def input_embedding_matrix(self) -> torch.Tensor:
        """What each token id enters the first layer as, scaled as the family scales it; a copy of shape `(V, D)`."""
        table = self.get_input_embeddings()
        weight: torch.Tensor = table.weight  # type: ignore[assignment]
        embeds = table(torch.arange(len(weight), device=weight.device))
        return scale_embeddings(embeds, self.config.text_config)

    def text_table(self) -> torch.Tensor:
        raise AttributeError("text_table() is called input_embedding_matrix().")

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Run the patch stem.

        Args:
            pixel_values: Tiles, normalised or bytes (uint8), shape `(N, C, s, s)`; any `s` that divides into whole
                tokens.
            **kwargs: Ignored; `generate` passes `return_dict`.

        Returns:
            `pooler_output` (and `last_hidden_state`): the tokens that enter the holistic layers, shape `(N, S, D)`;
            for HD the patches, `(N, S * shuffle_factor ** 2, D)`.
        """
        check_pixel_values(pixel_values, self.config)
        features = self.patch_embedding(pixel_values)
        if self.config.pixel_shuffle_loc == "pre":
            assert self.projector is not None
            features = self.projector(features)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=features)

    def _prepare(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        attention_mask: torch.Tensor | Masks | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        inputs_embeds: torch.Tensor | None,
        image_features: torch.Tensor | None,
    ) -> LanguageInputs:
        """Embed words and images and settle the positions of the language model's sequence."""
        check_one_of(input_ids, inputs_embeds, pixel_values, image_features)
        image_mask = None
        if input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            image_mask = input_ids == self.config.image_token_id
            is_encoded = pixel_values is None
            if pixel_values is not None:
                image_features = self.get_image_features(pixel_values).pooler_output
            check_images(image_mask, image_features, is_encoded, cache, self.config)
        assert inputs_embeds is not None
        check_sequence(inputs_embeds, attention_mask, position_ids, cache, self.config)
        if position_ids is None:
            position_ids = count_positions(inputs_embeds, attention_mask, cache)
        if self.config.image_attention == "bidirectional":
            remember_open_image(cache, image_mask if image_features is not None else None)
        return LanguageInputs(inputs_embeds, image_features, image_mask, attention_mask, position_ids)

    def _run_holistic_layers(
        self, inputs: LanguageInputs, cache: Cache | None, /, **kwargs: Any
    ) -> HolisticEmbeddingOutput:
        """Expand the sequence, run the holistic layers, shrink it again."""
        sequence = self.sequence_class(self.config, self.projector)
        section = sequence.expand(inputs, cache)
        section.embeds = scale_embeddings(section.embeds, self.config.text_config, self.training)
        patterns = self.config.split_layers(self.attention_types).holistic
        hidden_states = run_section(
            self.embedding_layers, patterns, self.embedding_rotary_emb, section, cache, self.config, **kwargs
        )
        return HolisticEmbeddingOutput(hidden_states, *sequence.shrink(hidden_states, inputs, cache))

    @capture_outputs
    def _run_sections(self, inputs: LanguageInputs, cache: Cache | None, /, **kwargs: Any) -> HoVLEModelOutputWithPast:
        """Run the holistic layers, then the language model."""
        masks = inputs.masks(self.config, cache)
        holistic = self._run_holistic_layers(inputs, cache, **kwargs)
        assert holistic.language_inputs_embeds is not None
        section = SectionInputs(holistic.language_inputs_embeds, masks, inputs.position_ids)
        patterns, rotary_emb = self.config.split_layers(self.attention_types).language, self.language_model.rotary_emb
        hidden_states = run_section(self.language_layers, patterns, rotary_emb, section, cache, self.config, **kwargs)
        last_hidden_state = final_norm(self.language_model)(hidden_states)
        images = holistic.image_hidden_states
        return HoVLEModelOutputWithPast(last_hidden_state, image_hidden_states=images, **{CACHE: cache})

    def _run_at_once(self, inputs: LanguageInputs, cache: Cache | None, /, **kwargs: Any) -> HoVLEModelOutputWithPast:
        """Run the decoder as its own family does, and take the images from what enters the language model."""
        flags = {name: f"output_{name}" for name in self._can_record_outputs}  # this config's count, not the decoder's
        wanted = [name for name, flag in flags.items() if kwargs.setdefault(flag, getattr(self.config, flag, False))]
        if wanted:  # before the decoder does so itself: other passes of this model would then capture all twice
            maybe_install_capturing_hooks(self)
        found, images = run_stock_decoder(self.language_model, inputs, cache, self.config, **kwargs)
        outputs = HoVLEModelOutputWithPast(found.last_hidden_state, image_hidden_states=images, **{CACHE: cache})
        for name in wanted:  # last, where `capture_outputs` puts them
            outputs[name] = found[name]
        return outputs

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
        **kwargs: Any,
    ) -> HolisticEmbeddingOutput:
        """Run the stem and the holistic layers only; the language model's layers are not touched.

        Arguments as in `HoVLEForConditionalGeneration.forward`; besides, `image_features` are what
        `get_image_features` made of the tiles, instead of `pixel_values`, and `output_hidden_states` asks for what
        each holistic layer gives.
        """
        cache = given_cache(cache, kwargs)
        inputs = self._prepare(
            input_ids, pixel_values, attention_mask, position_ids, cache, inputs_embeds, image_features
        )
        layer_outputs: list[torch.Tensor] | None = [] if output_hidden_states else None
        outputs = self._run_holistic_layers(inputs, cache, layer_outputs=layer_outputs, **kwargs)
        outputs.hidden_states = None if layer_outputs is None else tuple(layer_outputs)
        return outputs

    @can_return_tuple
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
        **kwargs: Any,
    ) -> HoVLEModelOutputWithPast:
        """Run stem, holistic layers and language model; arguments as in `get_holistic_embeddings`.

        `use_cache` defaults to the text config's outside training; in training nothing is cached. `run_layers` takes
        the place of `decoder.run_all`, once for the holistic layers and once for the language model's.
        """
        cache = given_cache(cache, kwargs)
        if use_cache is None:
            use_cache = bool(getattr(self.config.text_config, "use_cache", True)) and not self.training
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        inputs = self._prepare(
            input_ids, pixel_values, attention_mask, position_ids, cache, inputs_embeds, image_features
        )
        by_sections = not self.has_one_rope or "run_layers" in kwargs
        is_stock = not by_sections and is_stock_decoder(self.language_model, inputs, self.config)
        run = self._run_at_once if is_stock else self._run_sections
        return run(inputs, cache, return_dict=True, **kwargs)


class HoVLEForConditionalGeneration(HoVLEPreTrainedModel, HoVLEGenerationMixin, FromLanguageModelMixin):
    """HoVLE with the language model's head: next-token logits, loss, `generate` and `from_language_model`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: HoVLEConfig):
        super().__init__(config)
        self.model = HoVLEModel(config)
        self.lm_head = nn.Linear(
            config.text_config.hidden_size, config.text_config.vocab_size, bias=config.language_head_bias
        )
        self.post_init()

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Next-token logits of final hidden states, `(..., D)` to `(..., V)`, scaled as the backbone's family does."""
        return scale_logits(self.lm_head(hidden_states), self.config.text_config)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Run the patch stem; see `HoVLEModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_holistic_embeddings(self, *args: Any, **kwargs: Any) -> HolisticEmbeddingOutput:
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
        **kwargs: Any,
    ) -> HoVLECausalLMOutputWithPast:
        """Predict the next token.

        Args:
            input_ids: Prompts with `tokens_per_tile` placeholders per tile, shape `(B, T)`; the short sequence for
                HD too.
            pixel_values: All tiles of the batch in prompt order, shape `(N, C, s, s)`: normalised, or bytes (uint8),
                which are normalised here.
            attention_mask: 1 at real tokens, 0 at padding, shape `(B, past + T)`; or who may look at whom, bool,
                shape `(B, 1, T, past + T)` (not for HD).
            position_ids: Shape `(B, T)`; restarting ids mark documents packed into one row, which needs
                `attention_mask=None` (any mask lets them see each other) and no cache but an empty dynamic one. Those
                of HD go on by 1 or restart at 0.
            cache: Cache of earlier tokens, extended in place; `past_key_values` is the same.
            inputs_embeds: Text embeddings instead of `input_ids`, shape `(B, T, D)`; then without images.
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
        check_image_source(pixel_values, image_outputs)
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
            targets: torch.Tensor = labels
            if input_ids is not None:
                targets = labels.masked_fill(input_ids == self.config.image_token_id, IGNORE_INDEX)
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits, targets, vocab_size, num_items_in_batch=num_items_in_batch)
        return HoVLECausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )


__all__ = ["HoVLEForConditionalGeneration", "HoVLEModel", "HoVLEPreTrainedModel"]
