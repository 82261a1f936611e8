"""Configuration of HoVLE: one stock decoder of N + M layers with a patch stem in front."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlamaConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .backbones import rotating_layers
from .config_values import ADVICE, MOST_LAYERS, check_decoder_values, check_statistics, check_whole_number
from .remote_code import AUTO_MAP, copy_code, register_names
from .rotary import ROPE_TYPES, check_own_rope, check_rope_values

PIXEL_SHUFFLE_LOCATIONS = ("pre", "post", "none")
IMAGE_ATTENTIONS = ("causal", "bidirectional")

MOST_CHANNELS = 256
LARGEST = {"num_embedding_layers": MOST_LAYERS, "image_size": 2**14, "patch_size": 2**14}
"""Field -> its most, far beyond what anyone trains."""

MALFORMED = (LookupError, TypeError, AttributeError, ArithmeticError)
"""What configs of transformers raise where a field holds something else than its name says."""

TOO_DEEP = "Lists and objects are nested too deeply to be read, as nothing but damage or malice makes them, in"


class LayerParts(NamedTuple):
    """One value per layer, by part of the model."""

    holistic: Sequence
    """Those of the holistic layers."""
    language: Sequence
    """Those of the language model."""


def count_tile_tokens(tile_size: int, pixels_per_token_side: int, name: str = "tile_size") -> int:
    """Count the tokens of a square tile.

    Args:
        tile_size: Side of the tile in pixels.
        pixels_per_token_side: Side of the square of pixels that becomes one token.
        name: What an error calls the size.

    Raises:
        ValueError: When the tile does not divide into whole tokens; the nearest sizes that do are named.
    """
    if tile_size <= 0 or tile_size % pixels_per_token_side:
        lower = max(tile_size // pixels_per_token_side, 1) * pixels_per_token_side
        nearest = f"{lower}" if tile_size < lower else f"{lower} and {lower + pixels_per_token_side}"
        raise ValueError(
            f"{name} ({tile_size}) must be a positive multiple of {pixels_per_token_side} pixels, the side of one "
            f"token; the nearest valid sizes: {nearest}."
        )
    return (tile_size // pixels_per_token_side) ** 2


@strict
class HoVLEConfig(PreTrainedConfig):
    r"""Describe a HoVLE model.

    The first `num_embedding_layers` layers of `text_config` are the holistic embedding; the rest is the language
    model. Both live in one stock decoder, so whatever runs the language model runs HoVLE.

    Args:
        text_config: Configuration of the whole decoder, `num_hidden_layers` = holistic layers + language model layers.
            A dict is turned into the class its `model_type` names.
        num_embedding_layers: Number of holistic layers (N), counted from the bottom of the decoder.
        embedding_rope_parameters: Rotary parameters of the holistic layers where they differ from
            `text_config.rope_parameters` (`rope_type`, `rope_theta`, `factor`, ...; `max_position_embeddings` for
            dynamic scaling). Another `rope_type` keeps nothing of the language model's scaling.
        normalize_encoder_output: Divide what the holistic layers hand to the language model by its L2 norm.
        image_size: Side of one square picture tile in pixels.
        patch_size: Kernel and stride of the patch convolution in pixels.
        num_channels: Colour channels of a tile.
        image_mean: Of each channel, from 0 to 1: what the model normalises tiles of bytes (uint8) with. Tiles that an
            image processor has normalised already are taken as they are.
        image_std: Deviation of the same.
        pixel_shuffle_loc: Where groups of neighbouring patches become one token: `"pre"` before the holistic layers
            (HoVLE), `"post"` after them (HoVLE-HD), `"none"` nowhere (a plain convolution).
        downsample_ratio: Tokens per patch along one side after the shuffle; 0.5 joins 2 x 2 patches.
        image_attention: How tokens of one picture see each other in the holistic layers: `"causal"` as in the paper,
            or `"bidirectional"`. Text and the language model's layers stay causal.
        image_token_id: Id of the placeholder that marks where image tokens go.
        language_head_bias: Whether the language model's head has a bias (Phi).
        initializer_range: Standard deviation of new weights.
    """

    model_type = "hovle"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - the base class declares it this way
    keys_to_ignore_at_inference = ["cache", "past_key_values", "image_hidden_states"]  # noqa: RUF012 - for `Trainer.evaluate`

    text_config: Any = None  # a dict or a config; type checkers cannot know that it is a config once built
    num_embedding_layers: int = 8
    embedding_rope_parameters: dict | None = None
    normalize_encoder_output: bool = False
    image_size: int = 448
    patch_size: int = 14
    num_channels: int = 3
    image_mean: list[float] | tuple[float, ...] = tuple(IMAGENET_DEFAULT_MEAN)
    image_std: list[float] | tuple[float, ...] = tuple(IMAGENET_DEFAULT_STD)
    pixel_shuffle_loc: str = "pre"
    downsample_ratio: float = 0.5
    image_attention: str = "causal"
    image_token_id: int = 92546
    language_head_bias: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.text_config is None:
            self.text_config = LlamaConfig()
        elif isinstance(self.text_config, dict):
            self.text_config = _decoder_config(self.text_config)
        elif not isinstance(self.text_config, PreTrainedConfig):
            raise ValueError(f"text_config must be a config or its fields, got {self.text_config!r:.80}.")
        # The language model decides; a second opinion at the top level is a common source of untied heads.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)
        self._check_values()  # here, as what a validator raises arrives as no ValueError

    def _check_values(self) -> None:
        """Raise ValueError for a value that cannot work by itself, naming the field."""
        check_decoder_values(self.text_config, "text_config.")
        known = (*ROPE_TYPES, getattr(self.text_config, "default_rope_type", "default"))
        check_rope_values(getattr(self.text_config, "rope_parameters", None), "text_config.rope_parameters", known)
        check_own_rope(self.embedding_rope_parameters or {})
        check_decoder_values({"initializer_range": self.initializer_range})
        check_whole_number("num_channels", self.num_channels, 1, MOST_CHANNELS)
        check_statistics(self.image_mean, self.image_std)
        for name, most in LARGEST.items():  # what is too small for the others is told below, with what would work
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)!r:.40}. {ADVICE}")

    def validate_architecture(self):
        """Refuse sizes that cannot work together, naming the nearest ones that do."""
        self._check_values()
        num_layers = self.text_config.num_hidden_layers
        if not 0 <= self.num_embedding_layers < num_layers:
            raise ValueError(
                f"num_embedding_layers ({self.num_embedding_layers}) must lie between 0 and "
                f"text_config.num_hidden_layers - 1 ({num_layers - 1}): text_config counts the holistic layers too."
            )
        if self.image_token_id < 0:
            raise ValueError(f"image_token_id ({self.image_token_id}) must be the id of a token, 0 or more.")
        rotating = rotating_layers(self.text_config)[: self.num_embedding_layers]
        if self.embedding_rope_parameters is not None and rotating and not any(rotating):
            raise ValueError(
                f"embedding_rope_parameters would have no effect: the first {len(rotating)} layers of this "
                f"{self.text_config.model_type} use no rotary positions. Leave them out, or give these layers "
                "another attention pattern."
            )
        if self.pixel_shuffle_loc not in PIXEL_SHUFFLE_LOCATIONS:
            raise ValueError(
                f"pixel_shuffle_loc must be one of {', '.join(PIXEL_SHUFFLE_LOCATIONS)}, "
                f"got {self.pixel_shuffle_loc!r}."
            )
        if self.image_attention not in IMAGE_ATTENTIONS:
            raise ValueError(
                f"image_attention must be one of {', '.join(IMAGE_ATTENTIONS)}, got {self.image_attention!r}."
            )
        if (
            not 0 < self.downsample_ratio <= 1
            or abs(1 / self.downsample_ratio - round(1 / self.downsample_ratio)) > 1e-6
        ):
            raise ValueError(
                f"downsample_ratio ({self.downsample_ratio}) must be 1 divided by a whole number, for instance 0.5."
            )
        if self.patch_size < 1:
            raise ValueError(f"patch_size ({self.patch_size}) must be positive.")
        self.tokens_per_tile(self.image_size)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read a saved configuration as the base class does; `ValueError` for that of another type of model.

        transformers only warns, and a HoVLE of random weights would follow.
        """
        try:
            content, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except RecursionError:
            raise ValueError(f"{TOO_DEEP} {pretrained_model_name_or_path}/config.json.") from None
        if (found := content.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type {found!r}, not {cls.model_type!r}. To build a "
                "HoVLE around a language model, use HoVLEForConditionalGeneration.from_language_model; "
                "`hovle convert` reads released checkpoints."
            )
        return content, rest

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Build a configuration of its fields as the base class does; `ValueError` for fields that cannot work.

        Nor may a file name code of the Hub to run; whoever loads it may, as an argument of `from_pretrained`.
        """
        text_config = config_dict.get("text_config")
        for fields in (config_dict, text_config if isinstance(text_config, dict) else {}):
            for name in ("attn_implementation", "experts_implementation"):
                if "/" in str(fields.get(name)):
                    raise ValueError(
                        f"config.json asks for code of the Hub: {name} is {fields[name]!r:.80}. Remove it; if you "
                        f"trust that code, give {name} to from_pretrained."
                    )
        try:
            return super().from_dict(config_dict, **kwargs)
        except (StrictDataclassError, *MALFORMED) as error:
            raise ValueError(f"config.json describes no valid model: {error.__cause__ or error}") from error
        except RecursionError:
            raise ValueError(f"{TOO_DEEP} config.json.") from None

    def save_pretrained(self, save_directory, **kwargs):
        """Save the configuration, with the code that loads a model under `trust_remote_code=True`; models call it."""
        self.auto_map = dict(AUTO_MAP)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        copy_code(save_directory)
        super().save_pretrained(save_directory, **kwargs)

    @property
    def shuffle_factor(self) -> int:
        """Patches joined into one token along one side (1 when nothing is shuffled)."""
        return 1 if self.pixel_shuffle_loc == "none" else max(1, round(1 / self.downsample_ratio))

    @property
    def slots_per_placeholder(self) -> int:
        """Slots that one image token takes in the holistic layers: as many as patches for HoVLE-HD, else one."""
        return self.shuffle_factor**2 if self.pixel_shuffle_loc == "post" else 1

    @property
    def image_seq_length(self) -> int:
        """Placeholders in the prompt for one tile of `image_size`."""
        return self.tokens_per_tile(self.image_size)

    def check_image_token_id(self) -> None:
        """Raise ValueError unless the placeholder has a row in the input embedding matrix; for who builds a model."""
        if self.image_token_id >= (vocab_size := self.text_config.vocab_size):
            raise ValueError(
                f"image_token_id ({self.image_token_id}) must lie below text_config.vocab_size ({vocab_size}): the "
                f"placeholder is an input embedding. Set another, or vocab_size to {self.image_token_id + 1}."
            )

    def tokens_per_tile(self, tile_size: int) -> int:
        """Count the tokens the language model sees for one square tile.

        Args:
            tile_size: Side of the tile in pixels.

        Raises:
            ValueError: When the tile does not divide into whole tokens; the nearest sizes that do are named.
        """
        return count_tile_tokens(tile_size, self.patch_size * self.shuffle_factor, name="image_size")

    def split_layers(self, values: Sequence) -> LayerParts:
        """Split one value per layer into those of the holistic layers and those of the language model.

        Args:
            values: `attentions` (one per layer), or `hidden_states` (the input, then one per layer). Of hidden states
                both parts get N + 1 and M + 1: the holistic layers' last output is what enters the language model.

        Returns:
            The two parts, named `holistic` and `language`.
        """
        num_holistic, num_layers = self.num_embedding_layers, self.text_config.num_hidden_layers
        if len(values) == num_layers + 1:
            return LayerParts(values[: num_holistic + 1], values[num_holistic:])
        if len(values) != num_layers:
            raise ValueError(
                f"Expected {num_layers + 1} hidden states or {num_layers} values of one per layer, got {len(values)}."
            )
        return LayerParts(values[:num_holistic], values[num_holistic:])

    @property
    def num_language_layers(self) -> int:
        """Layers of the language model (M)."""
        return self.text_config.num_hidden_layers - self.num_embedding_layers


def _decoder_config(fields: dict) -> PreTrainedConfig:
    """Build the decoder's config; ValueError, with a field's name where one is at fault, for what describes none."""
    check_decoder_values(fields, "text_config.")
    for name in ("rope_parameters", "rope_scaling"):
        check_rope_values(fields.get(name), f"text_config.{name}")
    fields = copy.deepcopy(fields)
    model_type = fields.pop("model_type", "llama")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (StrictDataclassError, ValueError, *MALFORMED) as error:
        cause = error.__cause__ or error  # the first line of a strict config's error only names a validator
        raise ValueError(
            f"text_config describes no decoder of model_type {model_type!r:.40}: {cause!s:.300}"
        ) from error


# Here, because a server that trusts a folder's code imports this file before any other.
register_names(HoVLEConfig.model_type)

__all__ = ["HoVLEConfig"]
