"""Build a new HoVLE around a pretrained language model: copy it untouched, put identity layers below it."""

import contextlib
import copy
import importlib
import logging
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import LocalEntryNotFoundError, StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import AddedToken, PreTrainedTokenizerBase

from .backbones import (
    add_layers_below,
    attention_types,
    check_backbone,
    only_sliding_layers_rotate,
    scale_embeddings,
    zero_residual_writers,
)
from .config_values import check_decoder_values
from .configuration_hovle import HoVLEConfig
from .first_filters import start_stem

logger = logging.getLogger(__name__)

Model = TypeVar("Model")

IMAGE_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
"""Special tokens of a picture: `<img>` + one `<IMG_CONTEXT>` per image token + `</img>`."""

DECIDED_FIELDS = ("text_config", "tie_word_embeddings", "language_head_bias")
"""Fields of `HoVLEConfig` that follow from the language model."""

LOCATION_OPTIONS = (
    "cache_dir",
    "gguf_file",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
"""Options of `from_pretrained` that a model shares with its tokenizer."""


OTHER_LAYOUTS = {"internlm2": "InternLM2's"}
"""Model types whose files transformers does not read without their own code -> whose layout it is."""

READERS: dict[str, str] = {}
"""Model type -> module with `load_model`, `load_config` and `load_tokenizer`; filled by an installed hovle, which
knows how to convert, while a checkpoint's copy of this file does not."""


class FromLanguageModelMixin:
    """`from_language_model` of `HoVLEForConditionalGeneration`."""

    @classmethod
    def from_language_model(
        cls: type[Model],
        name_or_path: str | PreTrainedModel,
        num_embedding_layers: int = 8,
        *,
        image_token_id: int | None = None,
        untie_text_embeddings: bool = False,
        **kwargs: Any,
    ) -> Model:
        """Build a new HoVLE around a pretrained language model.

        The language model's layers are copied untouched. The new layers start as the identity (their output
        projections are zero), so text gives the bare model's logits until training begins. Special image tokens
        the tokenizer lacks get new rows; no existing row changes.

        Args:
            name_or_path: Hub id or folder of a Llama-family causal language model, or such a model; of a
                vision-language model, its language model is taken. InternLM2's own files are read without their code.
                The new model is in its mode, evaluation when it is loaded here.
            num_embedding_layers: Holistic layers to put below it.
            image_token_id: Id of the placeholder; by default that of `<IMG_CONTEXT>`, which joins the tokenizer's
                vocabulary as `HoVLEProcessor.from_language_model` adds it. Without a tokenizer beside the model,
                three new rows follow the vocabulary and the placeholder is the last one.
            untie_text_embeddings: Give the holistic layers an input embedding matrix of their own (a copy, as in the
                paper) where the language model ties its matrix to its head.
            **kwargs: Fields of `HoVLEConfig` (`image_size`, `patch_size`, `pixel_shuffle_loc`, ...); all others go
                to `AutoModelForCausalLM.from_pretrained` (`dtype`, `gguf_file`, ...).
        """
        config_kwargs = _take_config_fields(kwargs)
        if isinstance(name_or_path, PreTrainedModel) and kwargs:
            raise ValueError(
                f"{', '.join(kwargs)}: no field of HoVLEConfig, and options of loading have no use beside a language "
                "model that is loaded already."
            )
        if isinstance(name_or_path, PreTrainedModel):
            language_model = name_or_path
        else:
            language_model = load_language_model(name_or_path, **kwargs)
        own_config = language_part(language_model.config)
        if type(own_config) is not type(language_model.config):
            logger.warning(
                "Of %s only the language model (%s) becomes part of HoVLE; the rest, such as a vision tower, is left "
                "out.",
                type(language_model).__name__,
                own_config.model_type,
            )
        _check_language_model(language_model)
        vocab_size = language_model.get_input_embeddings().num_embeddings
        if image_token_id is None:
            image_token_id, min_vocab_size = _image_token_for(
                name_or_path, vocab_size, **{key: kwargs[key] for key in LOCATION_OPTIONS if key in kwargs}
            )
        else:
            min_vocab_size = image_token_id + 1
        config = config_around(
            own_config,
            num_embedding_layers,
            image_token_id=image_token_id,
            vocab_size=max(vocab_size, min_vocab_size),
            untie_text_embeddings=untie_text_embeddings,
            language_head_bias=getattr(language_model.get_output_embeddings(), "bias", None) is not None,
            **config_kwargs,
        )
        with _name_in_errors(type(language_model).__name__):
            # Not `.to(dtype)` afterwards: that would round the rotary tables, which stay in float32.
            model: Any = cls._from_config(  # type: ignore[attr-defined]
                config,
                dtype=language_model.dtype,
                attn_implementation=own_config._attn_implementation,
            ).to(language_model.device)
        model.eval()  # dropout would hide what the checks below look for
        _copy_language_model(model, language_model)
        start_stem(model.model)
        _begin_as_language_model(model, language_model)
        model.generation_config = copy.deepcopy(language_model.generation_config)
        suppressed = model.generation_config.suppress_tokens or []
        model.generation_config.suppress_tokens = [*suppressed, image_token_id]  # it means a picture, never a word
        return model.train(language_model.training)  # a loaded one is in evaluation mode


def _check_language_model(language_model: PreTrainedModel) -> None:
    """Raise ValueError unless a model has the parts of a language model: a decoder that HoVLE can run, and a head."""
    decoder = language_model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):
        raise ValueError(
            f"{type(language_model).__name__} cannot be the backbone of HoVLE: it has no decoder built like Llama's."
        )
    check_backbone(decoder)
    if language_model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(language_model).__name__} cannot be the backbone of HoVLE: it lacks the head that makes logits. "
            "Load the language model with AutoModelForCausalLM."
        )


@contextlib.contextmanager
def _name_in_errors(name: str, more: type[Exception] = LookupError) -> Iterator[None]:
    """Turn what foreign code raises, of one `more` type as well, into a ValueError that names the language model."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, StrictDataclassError, more) as error:
        cause = error.__cause__ or error  # the first line of a strict config's error only names a validator
        raise ValueError(
            f"{name} cannot be the backbone of HoVLE: its layers need more than Llama's, or lack what those have "
            f"({type(cause).__name__}: {cause})."
        ) from error


def _take_config_fields(kwargs: dict) -> dict:
    """Take fields of `HoVLEConfig` out of keyword arguments; ValueError for those the language model decides."""
    if decided := [key for key in DECIDED_FIELDS if key in kwargs]:
        raise ValueError(
            f"{', '.join(decided)}: the language model decides; leave out what it says. To untie the holistic layers' "
            "text table from the head, use untie_text_embeddings=True."
        )
    # Its own fields only: those it inherits, such as dtype, are options of `from_pretrained` too.
    return {key: kwargs.pop(key) for key in list(kwargs) if key in HoVLEConfig.__annotations__}


def config_around(
    language_config: PreTrainedConfig,
    num_embedding_layers: int,
    *,
    image_token_id: int,
    vocab_size: int,
    untie_text_embeddings: bool = False,
    **kwargs,
) -> HoVLEConfig:
    """Describe the HoVLE of a bare language model's config; no weights are needed.

    Args:
        language_config: Config of the language model, or of a vision-language model that holds one; left as it is.
        num_embedding_layers: Holistic layers to put below it.
        image_token_id: Id of the placeholder.
        vocab_size: Rows of the input embedding matrix, image tokens included.
        untie_text_embeddings: Give the holistic layers an input embedding matrix of their own.
        **kwargs: Other fields of `HoVLEConfig`.
    """
    text_config = language_part(language_config)
    add_layers_below(text_config, num_embedding_layers, _new_layer_type(text_config))
    text_config.vocab_size = vocab_size
    if untie_text_embeddings:
        text_config.tie_word_embeddings = False
    with _name_in_errors(text_config.model_type, ValueError):
        fields = text_config.to_dict()
        fields.pop("_name_or_path", None)  # a folder of whoever builds the model, which saved ones would tell
        text_config = AutoConfig.for_model(**fields)
    config = HoVLEConfig(
        text_config=text_config,
        num_embedding_layers=num_embedding_layers,
        image_token_id=image_token_id,
        **kwargs,
    )
    config.check_image_token_id()
    return config


def language_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """Copy a language model's config, out of a vision-language model's where it is one (Gemma 3)."""
    _refuse_hovle(config.name_or_path or "The language model", config.model_type)
    part = copy.deepcopy(config.get_text_config(decoder=True))
    part.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)  # the outermost config decides
    return part


def _refuse_hovle(name: str | os.PathLike, model_type: str | None) -> None:
    if model_type == HoVLEConfig.model_type:
        raise ValueError(
            f"{name} is a HoVLE already, which cannot be the backbone of another: give the bare language model that "
            "it was built around."
        )


def load_language_model(name_or_path: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """Load a causal language model as `AutoModelForCausalLM` does; InternLM2's own files become a Llama.

    ValueError, before anything is built, for a value of its config that cannot work.
    """
    if (own := _own_reader(name_or_path, **kwargs)) is not None:
        return own.load_model(name_or_path, **kwargs)
    stored = _stored_config(name_or_path, **kwargs)
    _refuse_hovle(name_or_path, stored.get("model_type"))
    _check_values(stored)
    return AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)


def load_language_config(name_or_path: str | os.PathLike, **kwargs) -> PreTrainedConfig:
    """Load the config of a language model, or of a vision-language model's; InternLM2's own becomes a Llama's.

    ValueError for a value that cannot work.
    """
    if (own := _own_reader(name_or_path, **kwargs)) is not None:
        return own.load_config(name_or_path, **kwargs)
    _check_values(_stored_config(name_or_path, **kwargs))
    return language_part(AutoConfig.from_pretrained(name_or_path, **kwargs))


def load_tokenizer(name_or_path: str | os.PathLike, **kwargs) -> PreTrainedTokenizerBase:
    """Load a language model's tokenizer as `AutoTokenizer` does; InternLM2's own becomes a fast one."""
    if (own := _own_reader(name_or_path, **kwargs)) is not None:
        return own.load_tokenizer(name_or_path, **kwargs)
    return AutoTokenizer.from_pretrained(name_or_path, **kwargs)


def _own_reader(name_or_path: str | os.PathLike, **kwargs) -> ModuleType | None:
    """The module that reads this language model's files, where transformers would need the files' own code."""
    model_type = _stored_config(name_or_path, **kwargs).get("model_type")
    if model_type not in OTHER_LAYOUTS:
        return None
    if model_type not in READERS:
        raise ValueError(
            f"{name_or_path} is in {OTHER_LAYOUTS[model_type]} own layout, which only an installed hovle reads."
        )
    return importlib.import_module(READERS[model_type])


def _check_values(stored: dict) -> None:
    """Raise ValueError where the config.json of a language model, or of one with more parts, says what cannot work."""
    check_decoder_values(stored)
    if isinstance(stored.get("text_config"), dict):
        check_decoder_values(stored["text_config"], "text_config.")


def _stored_config(name_or_path: str | os.PathLike, **kwargs) -> dict:
    """The config.json of a folder or Hub id; empty where it has none, none that can be read, or one in GGUF.

    OSError where the Hub could not be asked: whoever asks next would wait as long.
    """
    location = {key: kwargs[key] for key in LOCATION_OPTIONS if key in kwargs and key != "trust_remote_code"}
    if "gguf_file" in location:
        return {}
    try:
        content, _ = PreTrainedConfig.get_config_dict(name_or_path, **location)
    except (OSError, ValueError) as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
        return {}  # transformers says what is wrong with its own words
    return content


@torch.no_grad()
def _copy_language_model(model, language_model: PreTrainedModel) -> None:
    """Copy layers, norm, table and head of a bare language model below and above the holistic layers."""
    num_new = model.config.num_embedding_layers
    decoder = language_model.get_decoder()
    target = model.model.language_model.state_dict()
    for name, tensor in decoder.state_dict().items():
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(int(parts[1]) + num_new)
        new_name = ".".join(parts)
        if new_name not in target:
            raise ValueError(f"{type(decoder).__name__} cannot be the backbone of HoVLE: no place for its {name}.")
        if name == "embed_tokens.weight":
            continue
        if target[new_name].shape != tensor.shape:
            raise ValueError(
                f"{type(decoder).__name__} cannot be the backbone of HoVLE: with more layers or rows its {name} has "
                f"shape {tuple(target[new_name].shape)} instead of {tuple(tensor.shape)}."
            )
        target[new_name].copy_(tensor)
    table = language_model.get_input_embeddings().weight
    model.get_input_embeddings().weight[: len(table)].copy_(table)
    _fill_new_rows(model.get_input_embeddings().weight, table)
    if not model.config.tie_word_embeddings:
        head = language_model.get_output_embeddings()
        model.lm_head.weight[: len(head.weight)].copy_(head.weight)
        _fill_new_rows(model.lm_head.weight, head.weight)
    if model.config.language_head_bias:
        bias = language_model.get_output_embeddings().bias
        model.lm_head.bias[: len(bias)].copy_(bias)
        model.lm_head.bias[len(bias) :] = bias.mean()


def _begin_as_language_model(model, language_model: PreTrainedModel) -> None:
    """Make the holistic layers the identity; ValueError unless text then gives the bare model's logits."""
    # Normalised output cannot give the bare model's logits, but the rest of the forward pass must.
    normalizes, model.config.normalize_encoder_output = model.config.normalize_encoder_output, False
    try:
        with _name_in_errors(type(language_model).__name__, RuntimeError):
            _start_as_identity(model)
            _check_positions(model)
            _check_same_text_logits(model, language_model)
    finally:
        model.config.normalize_encoder_output = normalizes


@torch.no_grad()
def _start_as_identity(model) -> None:
    """Zero what the holistic layers add to the residual stream; ValueError where that is not all they do."""
    for layer in model.model.embedding_layers:
        zero_residual_writers(layer)
    input_ids = _some_token_ids(model)
    found = model.get_holistic_embeddings(input_ids).last_hidden_state
    expected = scale_embeddings(model.get_input_embeddings()(input_ids), model.config.text_config)
    if not torch.equal(found, expected):
        raise ValueError(
            f"{type(model.model.language_model).__name__} cannot be the backbone of HoVLE: its layers change their "
            "input even with zero output projections of attention and MLP, so new ones cannot start as the identity."
        )


def _check_positions(model) -> None:
    """Raise ValueError unless the holistic layers use their rotary table, which then has a gradient."""
    if not model.config.num_embedding_layers:
        return
    tables: list[torch.Tensor] = []

    def watch(_module, _inputs, output):
        parts = [part.detach().requires_grad_() for part in (output if isinstance(output, tuple) else (output,))]
        tables.extend(parts)
        return tuple(parts) if isinstance(output, tuple) else parts[0]

    hook = model.model.embedding_rotary_emb.register_forward_hook(watch)
    with torch.enable_grad():
        states = model.get_holistic_embeddings(_some_token_ids(model)).last_hidden_state
        gradients = torch.autograd.grad(states.sum(), tables, allow_unused=True)
    hook.remove()
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            f"{type(model.model.language_model).__name__} cannot be the backbone of HoVLE: new layers of it would not "
            "know the order of words and patches, because they use no rotary positions."
        )


def _some_token_ids(model) -> torch.Tensor:
    """Random ids of the vocabulary without the placeholder, shape `(1, about 32)`."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.config.text_config.vocab_size, (1, 32), generator=generator)
    return input_ids[input_ids != model.config.image_token_id][None].to(model.device)


@torch.no_grad()
def _check_same_text_logits(model, language_model: PreTrainedModel) -> None:
    """Raise unless text gives the bare model's logits; a family may scale or cap what this file does not."""
    vocab_size = language_model.get_input_embeddings().num_embeddings
    input_ids = _some_token_ids(model) % vocab_size
    training = model.training, language_model.training
    model.eval()
    language_model.eval()
    with _narrow_window(language_model.get_decoder(), model.model.language_model, model) as window:
        expected = language_model(input_ids, use_cache=False).logits.float()
        found = model(input_ids, use_cache=False).logits[..., :vocab_size].float()
    model.train(training[0])
    language_model.train(training[1])
    difference, scale = (found - expected).abs().max(), expected.abs().max().clamp(min=1)
    if not difference <= (1e-5 if model.dtype == torch.float32 else 2e-2) * scale:
        raise ValueError(
            f"{type(language_model).__name__} cannot be the backbone of HoVLE: text logits differ from the bare "
            f"model's by {difference:.3g}, because its forward does more than Llama's"
            + (f", or does not use sliding_window={window} of its config: then set it to None." if window else ".")
        )


@contextlib.contextmanager
def _narrow_window(*models: PreTrainedModel) -> Iterator[int | None]:
    """Let sliding windows, whose size masks read from the config, be shorter than the text that is compared.

    Yields the window, None where there is none.
    """
    configs = [model.config.get_text_config(decoder=True) for model in models]
    windows = [getattr(config, "sliding_window", None) for config in configs]
    for config, window in zip(configs, windows, strict=True):
        if window is not None:
            config.sliding_window = min(window, 16)
    try:
        yield windows[0]
    finally:
        for config, window in zip(configs, windows, strict=True):
            if window is not None:
                config.sliding_window = window


def _new_layer_type(text_config: PreTrainedConfig) -> str:
    """Attention pattern of the holistic layers: full where that knows positions, else sliding, else the first one."""
    if only_sliding_layers_rotate(text_config):
        logger.warning(
            "The holistic layers see %d tokens back, pictures included: in %s only layers of sliding attention know "
            "positions.",
            text_config.sliding_window,
            text_config.model_type,
        )
        return "sliding_attention"
    types = attention_types(text_config)
    return "full_attention" if "full_attention" in types else types[0]


def add_image_tokens(tokenizer) -> None:
    """Teach a tokenizer the picture tokens under their transformers names; ids it already has stay.

    Sets `start_image_token`, `end_image_token` and `context_image_token`, which are saved with the tokenizer.
    """
    tokens = [AddedToken(token, normalized=False, special=True) for token in IMAGE_TOKENS.values()]
    tokenizer.add_tokens(tokens, special_tokens=True)
    # `add_special_tokens` refuses the names of a model's own tokens, and `from_pretrained` comes too early here.
    tokenizer._set_model_specific_special_tokens(special_tokens=dict(IMAGE_TOKENS))


def _image_token_for(name_or_path, vocab_size: int, **kwargs) -> tuple[int, int]:
    """Find the placeholder's id and the vocabulary size it needs, from the tokenizer beside the language model."""
    if isinstance(name_or_path, PreTrainedModel):
        return vocab_size + 2, vocab_size + 3
    try:
        tokenizer = load_tokenizer(name_or_path, **kwargs)
    except OSError:  # a folder with weights only
        return vocab_size + 2, vocab_size + 3
    except ValueError:  # the same, as transformers may put it; a reader of ours says what is wrong with a tokenizer
        if _own_reader(name_or_path, **kwargs) is not None:
            raise
        return vocab_size + 2, vocab_size + 3
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # the same, for model types that then get an empty one
        return vocab_size + 2, vocab_size + 3
    add_image_tokens(tokenizer)
    image_token_id = tokenizer.convert_tokens_to_ids([IMAGE_TOKENS["context_image_token"]])[0]
    return image_token_id, len(tokenizer)


def _fill_new_rows(weight: torch.Tensor, known: torch.Tensor) -> None:
    """Start rows beyond the known vocabulary near the mean row, each a little different, from a fixed seed."""
    num_new = len(weight) - len(known)
    if num_new:
        known = known.float()
        noise = torch.randn(num_new, known.shape[1], generator=torch.Generator().manual_seed(0))
        rows = known.mean(dim=0) + 0.1 * known.std(dim=0) * noise.to(known.device)
        if torch.equal(known.bfloat16().float(), known):  # so that the frozen table can still be stored in bfloat16
            rows = rows.bfloat16()
        weight[len(known) :] = rows.to(weight.dtype)
