"""Put a shipped model together with the language model it was built around."""

import hashlib
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..files.documents import load_json
from ..model.configuration_hovle import HoVLEConfig
from ..model.language_model import load_language_config
from ..model.modeling_hovle import HoVLEForConditionalGeneration
from ..model.processing_hovle import HoVLEProcessor
from .storage import Tensors, restore

DESCRIPTION, WEIGHTS = "package.json", "weights.safetensors"
"""Files of a shipped model beside those of a model folder."""

FORMAT = 1
"""Of shipped models; goes up when an older version could not read them."""


class Assembler:
    """A shipped model and where it is put together.

    Args:
        folder: Of the shipped files.

    Raises:
        ValueError: Where `package.json` is damaged or of another version.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.described: dict[str, Any] = load_json(folder / DESCRIPTION)
        if self.described.get("format") != FORMAT:
            raise ValueError(
                f"{folder / DESCRIPTION} has the format {self.described.get('format')}; this version of hovle reads "
                f"{FORMAT}. Install the hovle it came with."
            )

    def assemble(self) -> Path:
        """Give the plain model folder, from the cache or made now.

        Raises:
            ValueError: Where a shipped file or the language model is not the one that was packed.
        """
        from ..assets.cache import cache_folder, make_folder  # needs more than torch and transformers

        identity = {"package": self.described["name"], "files": self.described["files"]}
        digest = hashlib.sha256(repr(sorted(identity["files"].items())).encode()).hexdigest()[:12]
        target = cache_folder() / f"{self.described['name']}-{digest}"
        return make_folder(target, {"shipped": digest}, self._fill, needed=self.described["assembled_bytes"])

    def _fill(self, folder: Path) -> dict[str, Any]:
        self.check_files()
        self.model().save_pretrained(folder)
        write_documents(folder, self.language_model, self.config, self.described["max_tiles"])
        for name in self.described["files"]:
            if name != WEIGHTS:
                shutil.copyfile(self.folder / name, folder / name)
        return {}

    def check_files(self) -> None:
        """Compare every shipped file with its hash."""
        for name, expected in self.described["files"].items():
            found = hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
            if found != expected["sha256"]:
                raise ValueError(
                    f"{self.folder / name} is damaged (sha256 {found}, not {expected['sha256']}): install hovle again."
                )

    @cached_property
    def config(self) -> HoVLEConfig:
        """Of the assembled model."""
        return HoVLEConfig.from_pretrained(self.folder)

    @cached_property
    def language_model(self) -> Path:
        """Folder of the language model, fetched where it is not there."""
        from ..assets import language_model

        return language_model(name=self.described["language_model"])

    def model(self) -> HoVLEForConditionalGeneration:
        """The model in the number format of its config."""
        model, base = fresh_model(self.language_model, self.config)
        found = fingerprint(base)
        if found != self.described["language_model_hash"]:
            raise ValueError(
                f"{self.language_model} is not the language model that {self.described['name']} was built around (its "
                f"tensors hash to {found}, not {self.described['language_model_hash']}): fetch it again, `hovle fetch "
                f"{self.described['language_model']}`."
            )
        model.load_state_dict(restore(load_file(self.folder / WEIGHTS), base))
        for parameter in model.parameters():  # the rotary tables stay in float32
            parameter.data = parameter.data.to(getattr(torch, self.described["dtype"]))
        return model


def fresh_model(language_model: Path, config: HoVLEConfig) -> tuple[HoVLEForConditionalGeneration, Tensors]:
    """A HoVLE of this shape around a language model, before it is trained, in float32, and its state dict.

    What is new in it is zero, so that the state is the same on every machine.
    """
    model = HoVLEForConditionalGeneration.from_language_model(
        str(language_model),
        config.num_embedding_layers,
        dtype=torch.float32,
        **{
            name: getattr(config, name)
            for name in ("image_size", "patch_size", "pixel_shuffle_loc", "image_attention")
        },
        untie_text_embeddings=not config.tie_word_embeddings,
    )
    num_words = load_language_config(str(language_model)).vocab_size
    with torch.no_grad():
        for part in (model.model.patch_embedding, model.model.projector, model.model.embedding_layers):
            for parameter in () if part is None else part.parameters():
                parameter.zero_()
        for table in {model.get_input_embeddings(), model.get_output_embeddings()}:
            table.weight[num_words:] = 0
    return model, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def write_documents(folder: Path, language_model: Path, config: HoVLEConfig, max_tiles: int) -> None:
    """Tokenizer and processor as they are before training; what a trained model has otherwise is shipped."""
    HoVLEProcessor.from_language_model(str(language_model), config, max_tiles=max_tiles).save_pretrained(folder)


def fingerprint(state: Tensors) -> str:
    """Hash of tensors with their names."""
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(f"{name} {tuple(state[name].shape)}\n".encode())
        total.update(state[name].float().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]
