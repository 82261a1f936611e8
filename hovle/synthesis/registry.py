"""The skills there are, each imported only when it is asked for."""

import importlib
import importlib.util
from collections.abc import Mapping
from types import MappingProxyType

from .skill import AssetFolders, Skill

SKILLS: Mapping[str, str] = MappingProxyType(
    {
        "letters": "letters:Letters",
        "reading": "reading:Reading",
        "pictograms": "pictograms:Pictograms",
        "icons": "icons:Icons",
        "signs": "signs:Signs",
        "flags": "flags:Flags",
        "clipart": "clipart:ClipArt",
        "scenes": "scenes:Scenes",
        "charts": "charts:Charts",
        "clocks": "clocks:Clocks",
        "clothing": "clothing:Clothing",
        "replay": "replay:Replay",
        "objects": "objects:Objects",
    }
)
"""Name -> module below `skills` and class."""


def skill_class(name: str) -> type[Skill]:
    """The class of a skill; ValueError with the names there are, or with what to install."""
    if name not in SKILLS:
        raise ValueError(f"There is no skill named {name!r}; there are {', '.join(SKILLS)}.")
    module, _, attribute = SKILLS[name].partition(":")
    found: type[Skill] = getattr(importlib.import_module(f"{__package__}.skills.{module}"), attribute)
    missing = [module for module in found.extras if importlib.util.find_spec(module) is None]
    if missing:
        wanted = sorted({found.extras[module] for module in missing})
        raise ValueError(f"The skill {name} needs {', '.join(missing)}: pip install {' '.join(map(repr, wanted))}")
    return found


def open_skill(name: str, folders: AssetFolders) -> Skill:
    """A skill that draws from these assets."""
    return skill_class(name)(folders)
