"""Trained models that ship in the package: what a language model that is fetched lacks to see.

A shipped model is a folder here, named as the model, made by `packing.py` from a trained one: `package.json` (what it
belongs to, sizes and hashes of its files, what storing it cost), `weights.safetensors` (`storage.py`: only what
differs from the language model, in 8 bits), and the small files of a model folder. `assembling.py` puts language model
and weights together, once, into a plain model folder of the cache.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from .assembling import Assembler

__all__ = ["MAKE_ONE", "NAMES", "SHIPPED", "STARTS", "pretrained", "resolve_model", "shipped_names"]

SHIPPED = Path(__file__).parent
"""Folder whose subfolders are the shipped models."""

NAMES = ("smol",)
"""Names that stand for shipped models, whether or not this version ships them."""

STARTS = ("smol-distilled",)
"""Shipped models that training goes on from (`model.checkpoint`, `model.lower_layers`), not made to be asked."""

MAKE_ONE = (
    "train one (`hovle train smol/letters`, then smol/lines, smol/distillation, smol/alignment and "
    "smol/instruction_tuning) and name its folder, such as runs/smol/instruction_tuning/model"
)
"""Advice where a name has no weights yet."""


def shipped_names() -> list[str]:
    """Names of the models whose weights are in this package."""
    return [name for name in (*NAMES, *STARTS) if (SHIPPED / name / "package.json").is_file()]


def pretrained(name: str) -> Path:
    """Give a shipped model as a plain model folder, which every class and command takes.

    The first call fetches the language model it was built around (`hovle fetch`) and puts both together in the cache;
    later ones find the folder there.

    Args:
        name: Of a shipped model: `smol`; or of one that training goes on from: `smol-distilled`.

    Raises:
        ValueError: For a name that is none, for a model whose weights are not in this package, and for shipped files
            that are damaged.
    """
    if name not in (*NAMES, *STARTS):
        raise ValueError(f"There is no shipped model named {name!r}; there are {', '.join((*NAMES, *STARTS))}.")
    if name not in shipped_names():
        raise ValueError(f"{name}: no trained weights are in this package yet; make one: {MAKE_ONE}.")
    return Assembler(SHIPPED / name).assemble()


def resolve_model(name: str | os.PathLike, names: Sequence[str] = NAMES) -> str | os.PathLike:
    """Turn the name of a shipped model into its folder; paths and Hub ids stay, a folder of that name first of all.

    Args:
        name: What someone calls a model.
        names: Those that stand for what ships.

    Raises:
        ValueError: As `pretrained`.
    """
    return pretrained(os.fspath(name)) if name in names and not Path(name).is_dir() else name
