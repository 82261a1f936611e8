"""The language model of a GGUF file as a Hugging Face folder."""

import importlib.util
import logging
import mmap
import struct
from pathlib import Path
from typing import Any

from .cache import cache_folder, make_folder
from .manifest import Asset, Member

logger = logging.getLogger(__name__)

CONVERTER_VERSION = 2
"""Raised when `write_folder` changes its output, so that folders converted before are made anew."""


def _member(asset: Asset) -> Member:
    (member,) = (member for member in asset.archive.members if member.to.endswith(".gguf"))
    return member


def place(asset: Asset) -> tuple[Path, dict[str, Any]]:
    """Say where the converted folder belongs and what its marker says."""
    identity = {"name": asset.name, "gguf": _member(asset).sha256, "converter": CONVERTER_VERSION}
    return cache_folder() / f"{asset.name}-{asset.archive.version}-bfloat16", identity


def convert(asset: Asset, folder: Path) -> Path:
    """Turn the one GGUF file of a fetched language model into a Hugging Face folder, once.

    Args:
        asset: Its entry in the manifest.
        folder: What `fetch_asset` gave.

    Returns:
        The folder beside it with config, bfloat16 safetensors, tokenizer, chat template and generation config.
    """
    member = _member(asset)

    def fill(target: Path) -> dict[str, Any]:
        write_folder(folder / member.to, target)
        return {"licence": asset.licence}

    return make_folder(*place(asset), fill, needed=4 * member.size)


def write_folder(gguf: Path, target: Path) -> None:
    """Write a Llama GGUF file as a Hugging Face folder."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"{gguf.name} is read with the gguf package, which is not installed: pip install 'hovle[demo]'"
        )
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    logger.info("Converting %s to safetensors", gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if not isinstance(loaded, LlamaForCausalLM):
        raise ValueError(f"{gguf.name} holds a {type(loaded).__name__}; expected a Llama.")
    fields = loaded.config.to_dict()
    fields.pop("quantization_config", None)  # the weights are not quantized any more, so they can be saved
    fields.pop("_model_name_or_path", None)
    fields["rms_norm_eps"] = float(f"{loaded.config.rms_norm_eps:.6g}")  # 1e-05 went through float32
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(loaded.state_dict())
    # Its own file, not one derived from the config at every load: the end of an answer is <|im_end|>.
    model.generation_config = GenerationConfig(
        bos_token_id=fields["bos_token_id"], eos_token_id=fields["eos_token_id"], pad_token_id=fields["pad_token_id"]
    )
    model.bfloat16().save_pretrained(target)
    read_tokenizer(gguf, loaded.config).save_pretrained(target)


def read_tokenizer(gguf: Path, config: Any) -> Any:
    """Read the tokenizer of a GGUF file, with the splitting of digits that transformers 5.23 leaves out.

    What the special tokens are is taken from the model's config: transformers 5.16 ends answers at <|im_start|>.

    `tokenizer.ggml.pre` of SmolLM is `smollm`: every digit is cut off before GPT-2's rule is applied. Without the
    first cut the blank lines before a number become other tokens than the model was trained on.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    rule = header_text(gguf, "tokenizer.ggml.pre")
    if rule != "smollm":
        raise ValueError(f"{gguf.name} splits text by the rule {rule!r}; only 'smollm' is converted.")
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, model_max_length=config.max_position_embeddings
    )
    tokenizer.clean_up_tokenization_spaces = False
    for kind in ("bos", "eos", "pad"):
        setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(getattr(config, f"{kind}_token_id")))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def header_text(gguf: Path, key: str) -> str:
    """Look one text up in the header, where `gguf.GGUFReader` would first decode 100,000 tokens and merges."""
    key_bytes = key.encode()
    with gguf.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = content.find(struct.pack("<Q", len(key_bytes)) + key_bytes + struct.pack("<I", 8))  # 8: a string
        if place < 0:
            raise ValueError(f"{gguf.name} has no text {key} in its header.")
        start = place + 8 + len(key_bytes) + 4
        (length,) = struct.unpack_from("<Q", content, start)
        return content[start + 8 : start + 8 + length].decode()
