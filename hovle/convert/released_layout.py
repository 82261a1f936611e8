"""The released layout of HoVLE (config `internvl_chat`, InternLM2 decoder) and what it is called in ours.

One table renames tensors both ways, one pair of functions translates the config.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..files.checkpoint_files import CONFIG
from ..model.config_values import MOST_LAYERS, MOST_POSITIONS, MOST_SIZE, check_decoder_values, check_whole_number
from ..model.configuration_hovle import MOST_CHANNELS, HoVLEConfig
from ..model.modeling_hovle import HoVLEForConditionalGeneration
from ..model.rotary import check_rope_values, embedding_rope_config

RENAMES = {
    "model.patch_embedding": "embedding_model.vision_embeddings",
    "model.patch_embedding.projection": "embedding_model.vision_embeddings.patch_embedding",
    "model.projector.linear_1": "embedding_model.pixel_shuffle_proj.0",
    "model.projector.linear_2": "embedding_model.pixel_shuffle_proj.2",
    "model.language_model.embed_tokens": "embedding_model.llm_text_embeddings",
    "model.language_model.norm": "language_model.model.norm",
    "lm_head": "language_model.output",
}
"""Module of ours -> module of the released layout."""

LAYER_RENAMES = {
    "self_attn.q_proj": "attention.wqkv",
    "self_attn.k_proj": "attention.wqkv",
    "self_attn.v_proj": "attention.wqkv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""The same inside one layer; three modules of ours share the released `wqkv`, in this order."""

TEXT_TABLE = "embedding_model.llm_text_embeddings.weight"
UNUSED_TABLE = "language_model.model.tok_embeddings.weight"
HEAD = "language_model.output.weight"
POSITIONS = "embedding_model.vision_embeddings.position_embedding"
OUR_POSITIONS = "model.patch_embedding.position_embedding"
CLASS_EMBEDDING = "embedding_model.vision_embeddings.class_embedding"

DECODER_FIELDS: dict[str, tuple[str, str, type]] = {
    "vocab_size": ("vocab_size", "llm_vocab_size", int),
    "hidden_size": ("hidden_size", "hidden_size", int),
    "intermediate_size": ("intermediate_size", "intermediate_size", int),
    "num_attention_heads": ("num_attention_heads", "num_attention_heads", int),
    "num_key_value_heads": ("num_key_value_heads", "num_key_value_heads", int),
    "hidden_act": ("hidden_act", "hidden_act", str),
    "rms_norm_eps": ("rms_norm_eps", "rms_norm_eps", float),
    "attention_bias": ("bias", "attention_bias", bool),
}
"""Field of our text config -> (field of llm_config, field of embedding_config, type): one decoder, so both agree."""

UNSUPPORTED_OPTIONS = ("mlp_bias", "use_ls", "use_2d_sincos_pos_embed", "special_token_maps")
"""Options of embedding_config that would change the model and that no published checkpoint sets."""

COMPARED_FIELDS = (
    *("num_embedding_layers", "normalize_encoder_output", "image_size", "patch_size", "num_channels"),
    *("pixel_shuffle_loc", "shuffle_factor", "image_token_id"),
    *("image_attention", "language_head_bias"),
)
COMPARED_TEXT_FIELDS = (
    *DECODER_FIELDS,
    *("model_type", "num_hidden_layers", "head_dim", "mlp_bias", "rope_parameters", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
)


def hovle_config(released: dict, tie_word_embeddings: bool = False) -> HoVLEConfig:
    """Describe a released checkpoint as a hovle model; every value comes from its config.json.

    `image_size` is that of the position table (`embedding_config.image_size`). The tile size of inference may differ
    (see `tile_size`): the model then interpolates the table as the released code does.

    Args:
        released: Content of the released config.json.
        tie_word_embeddings: Whether the head is the holistic text table. The released code ties its head to another
            table, so this holds only where both are the same, which only the tensors tell.

    Raises:
        ValueError: When a field is missing or has the wrong type, and when the released model is not one decoder
            (the holistic layers' sizes differ from the language model's), naming fields and values.
    """
    _check_model_types(released)
    embedding_rope, language_rope = (_rope_parameters(released, name) for name in ("embedding_config", "llm_config"))
    same_rope = embedding_rope == language_rope
    text_config = decoder_fields(released, "llm_config")
    _check_supported(released)
    num_embedding_layers = read_number(released, "embedding_config.num_hidden_layers", 0, MOST_LAYERS)
    text_config["num_hidden_layers"] += num_embedding_layers
    text_config["tie_word_embeddings"] = tie_word_embeddings
    location, ratio = _shuffle(released)
    config = HoVLEConfig.from_dict(
        {
            "text_config": text_config,
            "num_embedding_layers": num_embedding_layers,
            "embedding_rope_parameters": None if same_rope else embedding_rope,
            "normalize_encoder_output": read_field(released, "normalize_encoder_output", bool),
            "image_size": read_number(released, "embedding_config.image_size", 1, MOST_SIZE),
            "patch_size": read_number(released, "embedding_config.patch_size", 1, MOST_SIZE),
            "num_channels": read_number(released, "embedding_config.num_channels", 1, MOST_CHANNELS),
            "pixel_shuffle_loc": location,
            "downsample_ratio": ratio,
            "image_token_id": read_field(released, "embedding_config.img_context_token_id", int),
            "initializer_range": text_config["initializer_range"],
        }
    )
    config.tokens_per_tile(tile_size(released))
    return config


def decoder_fields(released: dict, section: str = "") -> dict[str, Any]:
    """Describe an InternLM2 decoder as fields of a Llama config, which it is once its projection is taken apart.

    Args:
        released: Content of a config.json.
        section: Where in it the decoder is described; by default the file describes nothing else.

    Raises:
        ValueError: When a field is missing, has the wrong type or says what Llama cannot do.
    """
    fields = {name: read_field(released, _at(section, llm), kind) for name, (llm, _, kind) in DECODER_FIELDS.items()}
    rope = _rope_parameters(released, section)
    rope.pop("max_position_embeddings", None)
    more = {
        "num_hidden_layers": int,
        "max_position_embeddings": int,
        "tie_word_embeddings": bool,
        "initializer_range": float,
    }
    fields |= {name: read_field(released, _at(section, name), kind) for name, kind in more.items()}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields[name] = read_field(released, _at(section, name), int, list, None)
    check_decoder_values(fields, _at(section, ""))
    return fields | {"model_type": "llama", "rope_parameters": rope}


def _at(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def tile_size(released: dict) -> int:
    """Side of one tile at inference in pixels: `force_image_size`, or the position table's where that is null."""
    forced = read_field(released, "force_image_size", int, None)
    return read_number(released, "embedding_config.image_size" if forced is None else "force_image_size", 1, MOST_SIZE)


def released_config(config: HoVLEConfig) -> dict:
    """Describe a hovle model in the released layout; the reverse of `hovle_config`.

    What a hovle config does not say gets the published models' value: 1 to 12 tiles plus thumbnail, the conversation
    template `internlm2-chat`. `convert` checks that `hovle_config` gives the model back.

    Args:
        config: A hovle model with a Llama decoder.

    Raises:
        ValueError: When the released code has no such decoder or rotary embedding.
    """
    text: Any = config.text_config
    if text.model_type != "llama":
        raise ValueError(
            f"The released layout holds an InternLM2 decoder, which equals Llama; this one is {text.model_type!r}."
        )
    llm = {llm: getattr(text, name) for name, (llm, _, _) in DECODER_FIELDS.items()}
    embedding = {name: getattr(text, ours) for ours, (_, name, _) in DECODER_FIELDS.items()}
    embedding_rope = _embedding_rope(config)
    llm |= {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "num_hidden_layers": config.num_language_layers,
        "max_position_embeddings": text.max_position_embeddings,
        "tie_word_embeddings": text.tie_word_embeddings,
        "initializer_range": text.initializer_range,
        "attn_implementation": "flash_attention_2",
        "use_cache": True,
        **{name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **_released_rope(text.rope_parameters),
    }
    embedding |= {
        "model_type": "holistic_embedding",
        "llm_hidden_size": text.hidden_size,
        "num_hidden_layers": config.num_embedding_layers,
        "max_position_embeddings": embedding_rope.pop("max_position_embeddings", text.max_position_embeddings),
        "num_channels": config.num_channels,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "pixel_shuffle_loc": "pre" if config.pixel_shuffle_loc == "none" else config.pixel_shuffle_loc,
        "use_pixel_shuffle_proj": config.pixel_shuffle_loc != "none",
        "downsample_ratio": config.downsample_ratio,
        "img_context_token_id": config.image_token_id,
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "mlp_bias": False,
        "use_ls": False,
        "use_2d_sincos_pos_embed": False,
        "use_autoregressive_loss": False,
        "use_img_start_end_tokens": True,
        "special_token_maps": {},
        "attn_implementation": "flash_attention_2",
        **_released_rope(embedding_rope),
    }
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "embedding_config": embedding,
        "llm_config": llm,
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": config.image_size,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "normalize_encoder_output": config.normalize_encoder_output,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "tie_word_embeddings": text.tie_word_embeddings,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
    }


def read_field(config: dict, path: str, *kinds: type | None) -> Any:
    """Read one value, for instance `llm_config.hidden_size`, or raise naming it. A float may be written as an int."""
    value: Any = config
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"{CONFIG} lacks {path}, and the conversion guesses no value.")
        value = value[name]
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in [type(None) if kind is None else kind for kind in kinds]:
        wanted = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
        raise ValueError(f"{path} in {CONFIG} must be {wanted}, got {value!r:.200}.")
    return value


def read_number(config: dict, path: str, lowest: int, highest: int) -> int:
    """Read a whole number as `read_field` does, or raise naming it unless it lies between two, both included."""
    value: int = read_field(config, path, int)
    check_whole_number(path, value, lowest, highest)
    return value


def _check_model_types(released: dict) -> None:
    """Raise unless the checkpoint calls itself a HoVLE in the released layout."""
    for path, expected in (("model_type", "internvl_chat"), ("llm_config.model_type", "internlm2")):
        found = read_field(released, path, str)
        if found != expected:
            raise ValueError(f"{path} in {CONFIG} is {found!r:.80}; the released layout has {expected!r}.")


def _check_supported(released: dict) -> None:
    """Raise unless the checkpoint's two sections can be one decoder."""
    options = {name: read_field(released, "embedding_config", dict).get(name) for name in UNSUPPORTED_OPTIONS}
    if any(options.values()):
        found = ", ".join(f"embedding_config.{name} = {value!r:.80}" for name, value in options.items() if value)
        raise ValueError(f"{found}: no published HoVLE sets this and the conversion does not support it.")
    pairs = [(f"llm_config.{llm}", f"embedding_config.{own}", kind) for llm, own, kind in DECODER_FIELDS.values()]
    pairs.append(("llm_config.hidden_size", "embedding_config.llm_hidden_size", int))
    values = [(a, read_field(released, a, kind), b, read_field(released, b, kind)) for a, b, kind in pairs]
    differing = [f"{a} = {left!r} but {b} = {right!r}" for a, left, b, right in values if left != right]
    if differing:
        raise ValueError(
            f"The holistic layers and the language model must be alike to form one decoder: {'; '.join(differing)}."
        )
    placeholder, vocab_size = (
        read_field(released, path, int) for path in ("embedding_config.img_context_token_id", "llm_config.vocab_size")
    )
    if not 0 <= placeholder < vocab_size:
        raise ValueError(f"img_context_token_id ({placeholder}) must lie below vocab_size ({vocab_size}).")


def _shuffle(released: dict) -> tuple[str, float]:
    """Location and ratio of the pixel shuffle; without the projector the released code does not shuffle at all."""
    if not read_field(released, "embedding_config.use_pixel_shuffle_proj", bool):
        return "none", 1.0
    location = read_field(released, "embedding_config.pixel_shuffle_loc", str)
    if location not in ("pre", "post"):
        raise ValueError(f"embedding_config.pixel_shuffle_loc must be 'pre' or 'post', got {location!r}.")
    paths = ("downsample_ratio", "embedding_config.downsample_ratio")
    ratios = [read_field(released, path, float) for path in paths]
    if ratios[0] != ratios[1]:
        raise ValueError(f"{paths[0]} ({ratios[0]}) and {paths[1]} ({ratios[1]}) must agree.")
    return location, ratios[0]


def _rope_parameters(released: dict, section: str) -> dict:
    """Rotary parameters of one section in transformers' words; dynamic scaling also needs the table's length."""
    rope = {"rope_type": "default", "rope_theta": read_field(released, _at(section, "rope_theta"), float)}
    scaling = _at(section, "rope_scaling")
    if read_field(released, scaling, dict, None) is not None:
        rope["rope_type"] = read_field(released, f"{scaling}.type", str)
        rope["factor"] = read_field(released, f"{scaling}.factor", float)
        if rope["rope_type"] not in ("dynamic", "linear"):
            raise ValueError(f"{scaling}.type must be 'dynamic' or 'linear', got {rope['rope_type']!r}.")
        check_rope_values({"factor": rope["factor"]}, scaling)
    check_decoder_values({"rope_theta": rope["rope_theta"]}, _at(section, ""))
    if rope["rope_type"] == "dynamic":
        length = _at(section, "max_position_embeddings")
        rope["max_position_embeddings"] = read_number(released, length, 1, MOST_POSITIONS)
    return rope


def _released_rope(rope: dict) -> dict:
    """The same in the released layout's words."""
    if rope["rope_type"] == "default":
        return {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    if rope["rope_type"] not in ("dynamic", "linear"):
        raise ValueError(f"The released code knows dynamic and linear rotary scaling, not {rope['rope_type']!r}.")
    return {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": rope["rope_type"], "factor": rope["factor"]}}


def _embedding_rope(config: HoVLEConfig) -> dict:
    """Rotary parameters that hold in the holistic layers, with `max_position_embeddings` where it matters."""
    merged = embedding_rope_config(config.text_config, config.embedding_rope_parameters)
    is_dynamic = merged.rope_parameters["rope_type"] == "dynamic"
    return merged.rope_parameters | ({"max_position_embeddings": merged.max_position_embeddings} if is_dynamic else {})


def _differences(ours: HoVLEConfig, theirs: HoVLEConfig) -> list[str]:
    """Name what differs between two descriptions of a model, with both values."""
    pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in COMPARED_FIELDS]
    for name in COMPARED_TEXT_FIELDS:
        left, right = (getattr(config.text_config, name, None) for config in (ours, theirs))
        pairs.append((f"text_config.{name}", left, right))
    pairs.append(("embedding_rope_parameters", _embedding_rope(ours), _embedding_rope(theirs)))
    return [f"{name} ({left!r} against {right!r})" for name, left, right in pairs if left != right]


def check_same_model(name: str, described: HoVLEConfig, config: HoVLEConfig) -> None:
    """Raise unless what a document or layout describes is the model at hand."""
    differences = _differences(described, config)
    if differences:
        raise ValueError(f"{name} describes or allows another model than {CONFIG}: {'; '.join(differences)}.")


@dataclass(frozen=True)
class Row:
    """One released tensor and the tensors it becomes; parts named as in the released layout go to the extra file."""

    released: str
    shape: tuple[int, ...]
    parts: dict[str, tuple[int, ...]]
    """Name -> shape."""

    split: Callable[[torch.Tensor], Sequence[torch.Tensor]] = lambda tensor: [tensor]
    """Cut the released tensor; each piece reshapes to its part."""

    join: Callable[[Sequence[torch.Tensor]], torch.Tensor] = lambda parts: parts[0]
    """Put the parts together; the result reshapes to `shape`."""


def tensor_rows(config: HoVLEConfig, released_ties: bool) -> list[Row]:
    """List every tensor of both layouts, each claimed once.

    Args:
        config: The hovle model.
        released_ties: `llm_config.tie_word_embeddings`: the head is the language model's own text table.
    """
    with torch.device("meta"):
        state = HoVLEForConditionalGeneration(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    table = shapes["lm_head.weight"]
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    grouped: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        released = _released_name(name, config.num_embedding_layers)
        grouped.setdefault(UNUSED_TABLE if released_ties and released == HEAD else released, {})[name] = shape
    rows = [_row(released, parts, config.text_config) for released, parts in grouped.items()]
    unused = [(CLASS_EMBEDDING, (1, 1, table[1])), (UNUSED_TABLE, table)][: 1 if released_ties else 2]
    return rows + [Row(name, shape, {name: shape}) for name, shape in unused]


def _released_name(name: str, num_embedding_layers: int) -> str:
    """Rename one tensor of ours."""
    module, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"model\.language_model\.layers\.(\d+)\.(.+)", module)
    if layer is None:
        return f"{RENAMES[module]}.{kind}"
    index = int(layer[1])
    section = "embedding_model.encoder" if index < num_embedding_layers else "language_model.model.layers"
    index -= 0 if index < num_embedding_layers else num_embedding_layers
    return f"{section}.{index}.{LAYER_RENAMES[layer[2]]}.{kind}"


def _row(released: str, parts: dict[str, tuple[int, ...]], text: Any) -> Row:
    shape = next(iter(parts.values()))
    if released == POSITIONS:  # slot 0 belongs to the class embedding
        slots, width = shape[1:]
        return Row(
            released,
            (1, 1 + slots, width),
            {POSITIONS: (1, 1, width), **parts},
            split=lambda tensor: tensor.split([1, slots], dim=1),
            join=lambda pieces: torch.cat(list(pieces), dim=1),
        )
    if len(parts) == 1:
        return Row(released, shape, parts)
    # wqkv: rows are (key-value head, [its queries, key, value], head size)
    groups = text.num_key_value_heads
    queries = text.num_attention_heads // groups
    return Row(
        released,
        (sum(part[0] for part in parts.values()), *shape[1:]),
        parts,
        split=lambda tensor: tensor.unflatten(0, (groups, queries + 2, -1)).split([queries, 1, 1], dim=1),
        join=lambda pieces: torch.cat([piece.unflatten(0, (groups, -1, text.head_dim)) for piece in pieces], dim=1),
    )


def decoder_rows(config: LlamaConfig) -> list[Row]:
    """List every tensor of a bare InternLM2 language model and the tensors of `LlamaForCausalLM` it becomes.

    Args:
        config: The Llama config that `decoder_fields` describes.
    """
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    grouped: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in state.items():
        inner = f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name
        released = UNUSED_TABLE if name == "model.embed_tokens.weight" else _released_name(inner, 0)
        grouped.setdefault(released.removeprefix("language_model."), {})[name] = tuple(tensor.shape)
    if config.tie_word_embeddings:
        del grouped[HEAD.removeprefix("language_model.")]
    return [_row(released, parts, config) for released, parts in grouped.items()]


def is_extra(name: str) -> bool:
    """Whether a part has no place in the flat model."""
    return not name.startswith(("model.", "lm_head."))
