"""Is there a model in this folder, or is it a Hub id? Checks before a long load, with advice."""

import os
import re
from pathlib import Path

from .documents import load_json


def is_hub_id(model: str | os.PathLike) -> bool:
    """Whether a name is taken for one of the Hub: `owner/name`, unless a folder `owner` makes a path of it."""
    name = os.fspath(model)
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).parent.is_dir()


def refuse_missing_folder(model: str | os.PathLike) -> None:
    """Raise for a folder without a model; a mistyped path would be taken for a Hub id and asked for over the network.

    Raises:
        ValueError: For what is no Hub id, where there is no folder, or no config.json in it, and for a damaged JSON
            file there.
    """
    name = os.fspath(model)
    refuse_unreadable_documents(name)
    if (Path(name) / "config.json").is_file() or is_hub_id(name):
        return
    expected = "expected a folder with config.json, or a Hub id such as owner/name."
    if Path(name).is_dir():
        raise ValueError(f"No model in {name}: {expected}")
    parent = Path(name).parent
    there = sorted(path.parent.name for path in parent.glob("*/config.json")) if parent.is_dir() else []
    beside = f" In {parent} there are {', '.join(there[:8])}{', ...' if there[8:] else ''}." if there else ""
    raise ValueError(f"No model in {name}, as there is no such folder: {expected}{beside}")


def refuse_unreadable_documents(folder: str | os.PathLike) -> None:
    """Raise ValueError, with the file's name, where JSON of a folder is damaged or nested without end.

    transformers reads config, tokenizer and processor with Python's own reader, which such files make fail anyhow.
    """
    for path in sorted(Path(folder).glob("*.json")):
        if path.is_file():
            load_json(path)


def refuse_missing_processor(model: str | os.PathLike) -> None:
    """Raise for a folder with a model whose tokenizer or picture settings were not saved beside it."""
    wanted = ("tokenizer_config.json", "preprocessor_config.json")
    if Path(model).is_dir() and not (Path(model) / "processor_config.json").is_file():
        missing = [name for name in wanted if not (Path(model) / name).is_file()]
        if missing:
            raise ValueError(
                f"{os.fspath(model)} holds a model but no processor ({', '.join(missing)} missing): save one there, "
                "processor.save_pretrained(folder), or name the folder that has both."
            )


def short_name(path: str) -> str:
    """What to call a model in charts: its folder, or the folder around `model`."""
    parts = Path(path).resolve().parts if Path(path).is_dir() else Path(path).parts
    name = parts[-2] if parts[-1] == "model" and len(parts) > 1 else parts[-1]
    return name.replace("_", " ")
