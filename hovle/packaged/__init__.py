"""Trained models that ship in the package: what a language model that is fetched lacks to see.

A shipped model is a folder here, named as the model, made by `packing.py` from a trained one: `package.json` (what it
belongs to, sizes and hashes of its files, what storing it cost), `weights.safetensors` (`storage.py`: only what
differs from the language model, in 8 bits), and the small files of a model folder. `assembling.py` puts language model
and weights together, once, into a plain model folder of the cache.
"""

import os
from pathlib import Path

from .assembling import Assembler

__all__ = ["NAMES", "SHIPPED", "pretrained", "resolve_model"]

SHIPPED = Path(__file__).parent
"""Folder whose subfolders are the shipped models."""

NAMES = ("smol",)
"""Names that stand for shipped models."""


def pretrained(name: str) -> Path:
    """Give a shipped model as a plain model folder, which every class and command takes.

    The first call fetches the language model it was built around (`hovle fetch`) and puts both together in the cache;
    later ones find the folder there.

    Args:
        name: Of a shipped model: `smol`.

    Raises:
        ValueError: For a name that is none, and for shipped files that are damaged.
    """
    if name not in NAMES:
        raise ValueError(f"There is no shipped model named {name!r}; there are {', '.join(NAMES)}.")
    return Assembler(SHIPPED / name).assemble()


def resolve_model(name: str | os.PathLike) -> str | os.PathLike:
    """Turn the name of a shipped model into its folder; paths and Hub ids stay, a folder of that name first of all.

    Args:
        name: What someone calls a model.

    Raises:
        ValueError: As `pretrained`.
    """
    return pretrained(os.fspath(name)) if name in NAMES and not Path(name).is_dir() else name
