"""A flat HoVLE as GGUF files of its decoder, which llama.cpp runs, and its stem beside them.

llama.cpp takes embeddings in the place of tokens, so it needs to know nothing of pictures: `llama_cpp.py` runs such a
folder. Tensors are written one after the other; quantizing is the `gguf` package's.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from ..files.checkpoint_files import check_finite
from ..model.backbones import attention_types
from .flat import FlatModel
from .gguf_vocabulary import Vocabulary
from .write_stem import write_stem

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Model type of transformers -> what llama.cpp calls it."""

QUANTIZATIONS = ("f16", "q8_0", "q4_1")
"""One file each. The package has no quantizer of k-types, whose rows must hold a multiple of 256 values besides."""

LARGEST_F16 = 65504.0

NEEDS = ("hovle[llamacpp]", "gguf")
"""What installs the modules, and the modules."""

NEVER_SCALED = ("default", "linear", "llama3", "dynamic")
"""Kinds of rope that change frequencies only. Dynamic ones change none within the trained positions, and llama.cpp is
told of no more."""


def file_name(quantization: str) -> str:
    """Name of the decoder's file."""
    return f"model-{quantization}.gguf"


def write(flat: FlatModel, folder: Path) -> list[str]:
    """Write the decoder once for each of `QUANTIZATIONS`, the stem, tokenizer, processor and config.

    Args:
        flat: The model.
        folder: An empty folder.

    Returns:
        What the user should know.

    Raises:
        ValueError: For a decoder that llama.cpp does not run as transformers does, with what stands in the way.
    """
    decoder = flat.decoder
    _refuse_unless_known(decoder.config)
    vocabulary, remarks = Vocabulary.of(flat.processor, decoder.config.vocab_size)
    context_length = decoder.config.max_position_embeddings
    if "sliding_attention" in attention_types(decoder.config) and decoder.config.sliding_window < context_length:
        context_length = decoder.config.sliding_window
        remarks.append(
            f"llama.cpp is told of {context_length} positions, the sliding window: beyond it, it would see all."
        )
    tensors = dict(_tensors(decoder))
    for quantization in QUANTIZATIONS:
        file = DecoderFile(folder / file_name(quantization), quantization, tensors)
        file.write(decoder.config, flat.name, context_length, vocabulary)
        if file.kept:
            remarks.append(
                f"In {file.path.name} {len(file.kept)} tensors stay f16, as their rows are no multiple of 32 values: "
                f"{file.kept[0]}{', ...' if file.kept[1:] else ''}."
            )
    write_stem(flat, folder)
    flat.config.save_pretrained(folder)
    flat.generation_config.save_pretrained(folder)
    (flat.processor or flat.image_processor).save_pretrained(folder)
    return remarks


def _refuse_unless_known(config: PreTrainedConfig) -> None:
    """Raise ValueError for a decoder that llama.cpp would run otherwise than transformers."""
    reasons = []
    if config.model_type not in ARCHITECTURES:
        reasons.append(f"decoders of model_type {config.model_type!r} (known: {', '.join(ARCHITECTURES)})")
    if getattr(config, "hidden_act", "silu") != "silu":
        reasons.append(f"hidden_act {config.hidden_act!r}; llama.cpp takes silu")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in NEVER_SCALED:
        reasons.append(f"rope_type {rope['rope_type']!r} (known: {', '.join(NEVER_SCALED)})")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        reasons.append("a partial_rotary_factor")
    if reasons:
        raise ValueError(
            f"GGUF is not written for {'; '.join(reasons)}. `--to llama` writes a folder of transformers; llama.cpp's "
            "own conversion may know such decoders, and stem/stem.py there makes the embeddings of pictures."
        )


def _tensors(decoder: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in GGUF and tensor of each weight, rotary frequencies last where they are scaled one by one."""
    import gguf

    config = decoder.config
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in decoder.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the input embeddings then
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise ValueError(f"llama.cpp's {ARCHITECTURES[config.model_type]!r} has no place for {name}.")
        check_finite(name, tensor)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None and ARCHITECTURES[config.model_type] == "llama":
            tensor = _interleave(tensor, heads)
        yield new_name, tensor
    factors = _rope_factors(decoder)
    if factors.max() - factors.min() > 1e-6 * factors.max():
        if ARCHITECTURES[config.model_type] != "llama":
            raise ValueError("llama.cpp scales single rotary frequencies of Llama only, not of this decoder's family.")
        yield "rope_freqs.weight", factors


def _interleave(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Put the two halves of each head that rotate together side by side, as llama.cpp's Llama wants them."""
    return tensor.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _rope_factors(decoder: PreTrainedModel) -> torch.Tensor:
    """By how much each rotary frequency is divided, shape `(head size / 2,)`."""
    frequencies = decoder.base_model.rotary_emb.inv_freq.float().cpu()
    exponents = torch.arange(len(frequencies), dtype=torch.float32) / len(frequencies)
    return decoder.config.rope_parameters["rope_theta"] ** -exponents / frequencies


class DecoderFile:
    """One GGUF file.

    Args:
        path: File to create.
        quantization: Type of its matrices. Table and head are never less than 8 bits: every token depends on them.
        tensors: Weights by their names in GGUF.

    Attributes:
        kept: Matrices that stay f16, as their rows do not divide into blocks.
    """

    def __init__(self, path: Path, quantization: str, tensors: dict[str, torch.Tensor]):
        import gguf

        self.path, self.quantization, self.tensors = path, quantization, tensors
        self.kept: list[str] = []
        self.kinds = {name: self._kind(name, tensor, gguf.GGMLQuantizationType) for name, tensor in tensors.items()}

    def _kind(self, name: str, tensor: torch.Tensor, kinds: Any) -> "GGMLQuantizationType":
        if tensor.dim() == 1:
            return kinds.F32
        wanted = kinds[self.quantization.upper()]
        if name in ("token_embd.weight", "output.weight") and self.quantization.startswith("q4"):
            wanted = kinds.Q8_0
        if wanted != kinds.F16 and tensor.shape[-1] % 32:
            self.kept.append(name)
            return kinds.F16
        return wanted

    def write(self, config: PreTrainedConfig, name: str, context_length: int, vocabulary: Vocabulary | None) -> None:
        """Write what llama.cpp must know of the decoder, then tensor by tensor."""
        import gguf

        writer = gguf.GGUFWriter(self.path, ARCHITECTURES[config.model_type])
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{self.quantization.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, config, context_length)
        if vocabulary is None:
            writer.add_tokenizer_model("none")
        else:
            vocabulary.add_to(writer)
        try:
            self._write_tensors(writer)
        finally:
            writer.close()

    def _write_tensors(self, writer: "GGUFWriter") -> None:
        """Write the header, which tells of all tensors, then each; ValueError for one that f16 cannot hold."""
        import gguf

        for name, tensor in self.tensors.items():
            kind = self.kinds[name]
            shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), kind)
            plain = {kind.F32: np.float32, kind.F16: np.float16}.get(kind)
            if plain is None:
                writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), kind)
            else:
                size = math.prod(tensor.shape) * np.dtype(plain).itemsize
                writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(plain), size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in self.tensors.items():
            values, kind = tensor.detach().float().numpy(), self.kinds[name]
            if kind == kind.F16 and np.abs(values).max() > LARGEST_F16:
                raise ValueError(f"{name} reaches {np.abs(values).max():.3g}, beyond f16's {LARGEST_F16:g}.")
            writer.write_tensor_data(gguf.quantize(values, kind))


def _add_shape(writer: "GGUFWriter", config: PreTrainedConfig, context_length: int) -> None:
    """Sizes, rope and norm of the decoder."""
    import gguf

    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
