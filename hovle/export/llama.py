"""A flat HoVLE as a folder of a stock decoder, which transformers and what builds on it load without hovle."""

import json
from pathlib import Path

from transformers import PreTrainedConfig

from ..files.documents import load_json
from .flat import FlatModel
from .write_stem import write_stem

NEEDS = ("hovle",)
"""What installs the modules it cannot do without: none."""


def write(flat: FlatModel, folder: Path) -> list[str]:
    """Write the decoder as `LlamaForCausalLM`, or its own family's class, with tokenizer, chat template and stem.

    Args:
        flat: The model.
        folder: An empty folder.

    Returns:
        What the user should know.
    """
    decoder = flat.decoder
    decoder.generation_config = flat.generation_config
    decoder.save_pretrained(folder)
    add_older_names(decoder.config, folder / "config.json")
    flat.save_tokenizer(folder)
    write_stem(flat, folder)
    return [f"The decoder is a {type(decoder).__name__} of {decoder.config.num_hidden_layers} layers."]


def add_older_names(config: PreTrainedConfig, path: Path) -> None:
    """Name rotary parameters as transformers 4 did, too: MLX-LM knows no others and would take a base of 10,000.

    Parameters of their own for each kind of layer had no such names.
    """
    rotary = dict(getattr(config, "rope_parameters", None) or {})
    if "rope_theta" not in rotary:
        return
    written = load_json(path)
    written["rope_theta"] = rotary.pop("rope_theta")
    if "partial_rotary_factor" in rotary:
        written["partial_rotary_factor"] = rotary["partial_rotary_factor"]
    if rotary.get("rope_type", "default") != "default":
        written["rope_scaling"] = rotary
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
