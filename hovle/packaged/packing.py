"""Make a shipped model of a trained one, and say what storing it cost."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..assets.manifest import load_manifest
from ..files.atomic import appear_when_complete
from ..model.configuration_hovle import HoVLEConfig
from ..model.modeling_hovle import HoVLEForConditionalGeneration
from ..model.processing_hovle import HoVLEProcessor
from .assembling import DESCRIPTION, FORMAT, WEIGHTS, fingerprint, fresh_model, write_documents
from .storage import Tensors, restore, store

DOCUMENTS = ("config.json", "generation_config.json")
"""Files of a model folder that always ship; of the processor's those that training changed."""

ATTRIBUTION = "ATTRIBUTION.md"
"""Whose work the weights were trained on; ships with them and lies in the model's folder."""

NUM_POSITIONS = 256
"""Of random text and of pictures, at which logits are compared."""


@dataclass(frozen=True)
class Loss:
    """What storing cost: the stored model against the trained one, on pictures and text of random numbers."""

    divergence: float
    """Mean KL divergence of the next token from the trained model's, in nats."""
    same_likeliest: float
    """Share of positions at which the likeliest token is the same."""
    largest_difference: float
    """Of a logit, over the largest logit."""


def pack(
    trained: Path,
    language_model: Path,
    asset: str,
    name: str,
    out: Path,
    rank: int = 16,
    learnt_from: Collection[str] = (),
) -> dict[str, Any]:
    """Write a shipped model.

    Args:
        trained: Folder of the trained HoVLE.
        language_model: Folder of the language model it was built around.
        asset: What `hovle fetch` calls that.
        name: Of the shipped model.
        out: Folder that does not exist yet.
        rank: Of the adapters that the language model was trained with; 0: none.
        learnt_from: What `hovle fetch` calls the data and teachers; who made them is told in `ATTRIBUTION.md`.

    Returns:
        What `package.json` says.

    Raises:
        ValueError: When `trained` was not built around `language_model`.
    """
    if out.exists():
        raise ValueError(f"{out} is there already; name a folder that is not, or delete it.")
    whose = attribution([asset, *learnt_from]) if learnt_from else ""
    config = HoVLEConfig.from_pretrained(trained)
    processor = HoVLEProcessor.from_pretrained(trained)
    model = HoVLEForConditionalGeneration.from_pretrained(trained, dtype=torch.float32).eval()
    fresh, base = fresh_model(language_model, config)
    state = model.state_dict()
    if state.keys() != base.keys() or any(state[key].shape != base[key].shape for key in base):
        raise ValueError(
            f"{trained} has other tensors than a HoVLE around {language_model}: name the one it began with."
        )
    stored = store(state, base, rank)
    fresh.load_state_dict(restore(stored, base))
    loss = measure_loss(model, fresh.eval())
    with appear_when_complete(out) as folder:
        save_file(stored, folder / WEIGHTS)
        for path in changed_documents(trained, language_model, config, processor.image_processor.max_patches):
            shutil.copyfile(path, folder / path.name)
        if whose:
            (folder / ATTRIBUTION).write_text(whose, encoding="utf-8")
        files = sorted(path.name for path in folder.iterdir())
        described = {
            "format": FORMAT,
            "name": name,
            "language_model": asset,
            "language_model_hash": fingerprint(base),
            "max_tiles": processor.image_processor.max_patches,
            "dtype": str(config.dtype or "float32").removeprefix("torch."),
            "assembled_bytes": sum(path.stat().st_size for path in trained.iterdir() if path.is_file()),
            "weights_by_kind": bytes_by_kind(stored),
            "loss": vars(loss),
            "files": {name: _facts(folder / name) for name in files},
        }
        (folder / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return described


def changed_documents(trained: Path, language_model: Path, config: HoVLEConfig, max_tiles: int) -> Iterator[Path]:
    """Small files of the trained folder that differ from what is made of the language model; code is never its own."""
    with tempfile.TemporaryDirectory(prefix="hovle-pack-") as temporary:
        write_documents(Path(temporary), language_model, config, max_tiles)
        made = {path.name: path.read_bytes() for path in Path(temporary).iterdir() if path.suffix != ".py"}
    for path in sorted(trained.iterdir()):
        if path.name in DOCUMENTS or (path.name in made and path.read_bytes() != made[path.name]):
            yield path


def attribution(names: Collection[str]) -> str:
    """Whose work some assets are, under which licenses and from where."""
    manifest = load_manifest()
    unknown = [name for name in names if name not in manifest]
    if unknown:
        raise ValueError(f"No asset of `hovle fetch` is called {', '.join(unknown)}.")
    parts = ["# What these weights were made from"]
    for asset in (manifest[name] for name in dict.fromkeys(names)):
        origin = f"{asset.archive.registry} package `{asset.archive.package}` {asset.archive.version}"
        parts.append(
            f"- {asset.description}. {asset.attribution}. License: {asset.licence}. {origin}, {asset.homepage}"
        )
    return "\n\n".join(parts) + "\n"


def bytes_by_kind(stored: Tensors) -> dict[str, int]:
    """How many bytes each kind of tensor takes, scales with what they scale."""
    sizes: dict[str, int] = {}
    for key, part in stored.items():
        kind = key.rpartition(":")[2].removesuffix("_scale")
        sizes[kind] = sizes.get(kind, 0) + part.nbytes
    return sizes


def _facts(path: Path) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}


@torch.no_grad()
def measure_loss(trained: nn.Module, stored: nn.Module) -> Loss:
    """Compare two models on the same random pictures and text."""
    inputs = random_inputs(trained.config)  # type: ignore[arg-type]
    ours, theirs = (model(**inputs).logits[0].float() for model in (stored, trained))
    expected = theirs.log_softmax(dim=-1)
    divergence = nn.functional.kl_div(ours.log_softmax(dim=-1), expected, log_target=True, reduction="sum")
    return Loss(
        divergence=float(divergence / len(ours)),
        same_likeliest=float((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).float().mean()),
        largest_difference=float((ours - theirs).abs().max() / theirs.abs().max()),
    )


def random_inputs(config: HoVLEConfig) -> dict[str, torch.Tensor]:
    """A prompt of a picture and text, half of the positions each."""
    generator = torch.Generator().manual_seed(0)
    num_tiles = max(1, NUM_POSITIONS // 2 // config.image_seq_length)
    tokens = torch.randint(config.image_token_id - 2, (1, NUM_POSITIONS // 2), generator=generator)
    image = torch.full((1, num_tiles * config.image_seq_length), config.image_token_id)
    pixels = torch.randn(num_tiles, config.num_channels, config.image_size, config.image_size, generator=generator)
    return {"input_ids": torch.cat([image, tokens], dim=1), "pixel_values": pixels}
