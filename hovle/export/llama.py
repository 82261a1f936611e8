"""A flat HoVLE as a folder of a stock decoder, which transformers and what builds on it load without hovle."""

from pathlib import Path

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
    flat.save_tokenizer(folder)
    write_stem(flat, folder)
    return [f"The decoder is a {type(decoder).__name__} of {decoder.config.num_hidden_layers} layers."]
