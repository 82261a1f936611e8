"""Mix two models of one shape linearly, part by part: stem, holistic layers, language model.

Two models that learned from one start often lie in one basin, and between them lie some that can do what both can
(WiSE-FT, arXiv 2109.01903). So a tuned language model can be moved back towards the bare one.
"""

import functools
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..files.atomic import appear_when_complete
from ..files.checkpoint_files import CONFIG, INDEX, LICENCE, Checkpoint, Output, local_folder, read_json, write_weights
from ..loading import load_bare_model, load_config, reading
from ..model.configuration_hovle import HoVLEConfig
from ..model.language_model import config_around, load_language_config

PARTS = ("stem", "holistic", "language")
"""What can have a weight of its own."""

LAYERS = "model.language_model.layers."
TABLE = "model.language_model.embed_tokens.weight"

COPIED = ("*.json", "*.jinja", "*.py", "tokenizer.model", LICENCE)
"""Files beside the weights that go with the mixture, from the first model."""

LEFT_BEHIND = (INDEX, "released_config.json", "hovle_config.json", "adapter_config.json")
"""Such files that describe the first model's weights."""

NO_MATTER = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Fields of a config in which models that can be mixed may differ."""


@dataclass(frozen=True)
class Weights:
    """Share of the second model in each part: 0 is the first model, 1 the second."""

    stem: float
    holistic: float
    language: float

    def __post_init__(self):
        for part in PARTS:
            if not 0 <= getattr(self, part) <= 1:
                raise ValueError(f"The weight of the {part} must lie in 0..1, got {getattr(self, part)}.")


class Merger:
    """Two models that can be mixed.

    Args:
        first: HoVLE folder or Hub id.
        second: The same, or the bare language model, of which only the language part can be mixed.

    Raises:
        ValueError: When shapes or configs differ, by their names.
    """

    def __init__(self, first: str | os.PathLike, second: str | os.PathLike):
        self.folder = local_folder(first)
        if read_json(self.folder, CONFIG).get("model_type") != HoVLEConfig.model_type:
            raise ValueError(f"{first} is no HoVLE, whose parts could be mixed: name the HoVLE first.")
        self.config = load_config(self.folder)
        self.source = Checkpoint(self.folder)
        self.is_bare = read_json(local_folder(second), CONFIG).get("model_type") != HoVLEConfig.model_type
        self.second = self._bare(second) if self.is_bare else self._other(second)
        language = {name for name in self.source.names if self.part_of(name) == "language"}
        if unlike := sorted((language ^ self.second.keys()) if self.is_bare else ()):
            raise ValueError(f"{first} and {second} cannot be mixed: one of them only has {', '.join(unlike[:3])}.")
        for name, (shape, _) in self.second.items():
            own = self.source.shape(name)
            fits = own[1:] == shape[1:] and (own[0] == shape[0] or (self.is_bare and shape[0] <= own[0]))
            if not fits:
                raise ValueError(f"{name} has shape {own} in {first} and {shape} in {second}: they cannot be mixed.")

    def write(self, dst: str | os.PathLike, weights: Weights) -> None:
        """Write a mixture as a model folder, which appears when it is complete; ValueError where there is one."""
        dst = Path(dst).resolve()
        if dst.exists():
            raise ValueError(f"{dst} exists already: name another folder, or remove it first.")
        outputs = [self._output(name, weights) for name in self.source.names]
        with appear_when_complete(dst) as folder:
            write_weights(folder, outputs)
            for path in sorted({path for pattern in COPIED for path in self.folder.glob(pattern)}):
                if path.name not in LEFT_BEHIND:
                    shutil.copyfile(path, folder / path.name)

    def part_of(self, name: str) -> str:
        """Part a tensor belongs to; a text table that is tied to the head is the language model's."""
        if name.startswith(("model.patch_embedding.", "model.projector.")):
            return "stem"
        if name == TABLE:
            return "language" if self.config.tie_word_embeddings else "holistic"
        layer = re.match(re.escape(LAYERS) + r"(\d+)\.", name)
        return "holistic" if layer and int(layer[1]) < self.config.num_embedding_layers else "language"

    def _output(self, name: str, weights: Weights) -> Output:
        weight = getattr(weights, self.part_of(name))
        mix = functools.partial(self._mix, name, weight)
        return Output(name, self.source.shape(name), self.source.dtype(name), mix)

    @torch.no_grad()
    def _mix(self, name: str, weight: float) -> torch.Tensor:
        own = self.source.tensor(name)
        if name not in self.second or not weight:
            return own
        other = self.second[name][1]().float()
        mixed = own.float()
        # Rows that the bare model lacks, of the tokens of pictures, stay.
        mixed[: len(other)] = torch.lerp(mixed[: len(other)], other, weight)
        return mixed.to(own.dtype)

    def _other(self, second: str | os.PathLike) -> Mapping:
        folder = local_folder(second)
        check_same(self.config.to_dict(), load_config(folder).to_dict(), self.folder, second)
        other = Checkpoint(folder)
        other.claim({name: self.source.shape(name) for name in self.source.names})
        return {name: (self.source.shape(name), functools.partial(other.tensor, name)) for name in other.names}

    def _bare(self, second: str | os.PathLike) -> Mapping:
        config = self.config
        with reading(second):
            language_config = load_language_config(second)
        around = config_around(
            language_config,
            config.num_embedding_layers,
            image_token_id=config.image_token_id,
            vocab_size=config.text_config.vocab_size,
            untie_text_embeddings=not config.tie_word_embeddings,
        )
        check_same(config.text_config.to_dict(), around.text_config.to_dict(), self.folder, second)
        return {
            name: (tuple(tensor.shape), functools.partial(torch.Tensor.detach, tensor))
            for name, tensor in language_tensors(load_bare_model(second, torch.float32), config).items()
        }


def language_tensors(model: nn.Module, config: HoVLEConfig) -> dict[str, torch.Tensor]:
    """Weights of a bare language model under the names they have in a HoVLE around it."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()  # type: ignore[operator]
    tensors = {}
    for name, tensor in decoder.state_dict().items():
        place = re.match(r"layers\.(\d+)\.(.*)", name)
        if place:
            tensors[f"{LAYERS}{int(place[1]) + config.num_embedding_layers}.{place[2]}"] = tensor
        elif name != "embed_tokens.weight":
            tensors[f"model.language_model.{name}"] = tensor
    if config.tie_word_embeddings:
        return {**tensors, TABLE: head.weight}
    return tensors | {f"lm_head.{name}": tensor for name, tensor in head.state_dict().items()}


def check_same(first: dict, second: dict, first_name: str | os.PathLike, second_name: str | os.PathLike) -> None:
    """Raise ValueError, with the fields, unless two configs describe models of one kind."""
    differing = [name for name in sorted({*first, *second} - {*NO_MATTER}) if first.get(name) != second.get(name)]
    for name in list(differing):
        if isinstance(first.get(name), dict) and isinstance(second.get(name), dict):
            differing.remove(name)
            check_same(first[name], second[name], first_name, second_name)
    if differing:
        shown = "; ".join(f"{name}: {first.get(name)!r:.60} and {second.get(name)!r:.60}" for name in differing)
        raise ValueError(f"{first_name} and {second_name} cannot be mixed, their configs differ in {shown}.")
