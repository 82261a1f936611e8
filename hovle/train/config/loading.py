"""Recipes: StageConfig from YAML, `key=value` overrides and the recipes of earlier runs."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, to_json

from ...files.documents import load_yaml, parse_yaml
from .data import DataSource
from .objective import NamedObjective
from .section import RENAMED, Kind, field_names, listed
from .stage import StageConfig

RECIPES = Path(__file__).parents[2] / "recipes"
"""Recipes that ship with the package; `hovle train demo/alignment` finds `demo/alignment.yaml` here."""

OVERRIDE = re.compile(r"[a-z_.0-9]+=")
"""How a `key=value` argument starts; a path with an equals sign has a slash before it or is given as ./PATH."""

STAGE = TypeAdapter(StageConfig)

WORDS = {"Input should": "must", "valid array": "list", "an object": "a mapping"}
"""What pydantic says of JSON -> what that is in a recipe."""

TAGGED: dict[tuple[str, str], type[Kind]] = {
    ("data", "source"): DataSource,
    ("validation", "source"): DataSource,
    ("objective", "name"): NamedObjective,
}
"""Section and key by which an override makes it one of another kind -> its kinds."""

TAGS = {*DataSource.kinds(), *NamedObjective.kinds()}
"""What pydantic puts into the path of a key where there are several kinds; recipes have no such level."""


def find_recipe(name_or_path: str) -> Path:
    """Locate a recipe: a YAML file, or the name of one that ships with the package."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = RECIPES / f"{name_or_path.removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(str(file.relative_to(RECIPES).with_suffix("")) for file in RECIPES.rglob("*.yaml")))
    raise ValueError(f"No recipe {name_or_path!r}: it is neither a file nor one of the shipped recipes ({names}).")


def load_stage(name_or_path: str, overrides: Sequence[str] = ()) -> StageConfig:
    """Read one stage from YAML.

    Args:
        name_or_path: YAML file or the name of a shipped recipe.
        overrides: `key=value` strings that replace fields, dots for nested ones: `model.image_size=224`,
            `data.0.weight=2` for the first of a list. `data.source=chat` makes a source one of that kind: what
            only the former kind has goes, what both have stays.

    Raises:
        ValueError: For unknown or missing keys and values of the wrong type, naming the key.
    """
    path = find_recipe(name_or_path)
    values = load_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of fields to values.")
    for override in overrides:
        _override(values, override)
    return _build(values, str(path))


def with_new_fields(values: dict) -> dict:
    """A recipe that an older version wrote, as this one would write it; one that cannot be read stays as it is.

    Fields that are new since have their defaults. Renamed ones have their new names. Fields of other kinds of source
    or objective, which stood beside a kind's own, are left out where they had their defaults.
    """
    current = {RENAMED.get(key, key): value for key, value in values.items()}
    try:
        current["objective"] = _without_other_kinds(NamedObjective, current["objective"])
        current["data"] = [_without_other_kinds(DataSource, source) for source in listed(current["data"])]
        if current.get("validation"):
            current["validation"] = _without_other_kinds(DataSource, current["validation"])
        return _build(current, "recipe of a run").to_dict()
    except (ValueError, KeyError, TypeError, AttributeError):
        return values


def _without_other_kinds(base: type[Kind], values: dict) -> dict:
    kinds = base.kinds()
    own = field_names(kinds[values[base.TAG]])
    fields = [field for kind in kinds.values() for field in dataclasses.fields(kind)]
    defaults: dict[str, list] = {field.name: [] for field in fields}  # kinds differ in them
    for field in fields:
        defaults[field.name].append(field.default)
    return {key: value for key, value in values.items() if key in own or value not in defaults.get(key, [])}


def _override(values: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise ValueError(f"Overrides read key=value, got {override!r}.")
    *parents, last = key.split(".")
    for parent in parents:
        if isinstance(values, dict) and values.get(parent) is None:
            values[parent] = {}
        values = values[_place(values, parent, key)]
        if not isinstance(values, (dict, list)):
            raise ValueError(f"{key}: {parent} has no fields to override.")
    values[_place(values, last, key)] = parse_yaml(text, override)
    if isinstance(values, dict) and (base := TAGGED.get((parents[0] if parents else "", last))) is not None:
        _forget_other_kinds(values, base)


def _forget_other_kinds(values: dict, base: type[Kind]) -> None:
    """Drop what belongs to the kind that a section was, now that an override has named another."""
    kind = base.kinds().get(values[base.TAG])
    if kind is not None:
        of_others = {name for other in base.kinds().values() for name in field_names(other)} - {*field_names(kind)}
        for name in of_others & values.keys():
            del values[name]


def _place(values: dict | list, name: str, key: str) -> str | int:
    """A field of a mapping, or the number of an item of a list."""
    if isinstance(values, dict):
        return name
    if not name.isdecimal() or int(name) >= len(values):
        raise ValueError(f"{key}: {name!r} is none of the list's {len(values)} items; they count from 0.")
    return int(name)


def _build(values: dict, where: str) -> StageConfig:
    """Make a stage of plain values; ValueError that names every key at fault."""
    try:
        # As JSON: there, types are strict without a list being refused for a tuple, or a mapping for a section.
        return STAGE.validate_json(to_json(values, inf_nan_mode="constants"))
    except ValidationError as error:
        has_one_teacher = isinstance(values.get("teacher"), dict)
        faults = [_describe(fault, has_one_teacher) for fault in error.errors(include_url=False)]
        raise ValueError(f"{where}: {'; '.join(faults)}") from error


def _describe(fault: ErrorDetails, has_one_teacher: bool) -> str:
    """What is wrong with a key, named as overrides name it."""
    context = fault.get("ctx", {})
    path = [str(part) for part in fault["loc"] if part not in TAGS]
    if has_one_teacher and path[:2] == ["teacher", "0"]:  # most recipes have one, and no list
        del path[1]
    if "discriminator" in context:
        path.append(context["discriminator"].strip("'"))
    match fault["type"]:
        case "value_error":
            message = str(context["error"])
        case "missing" | "union_tag_not_found":
            message = "missing"
        case "union_tag_invalid":
            message = f"must be one of {context['expected_tags']}, got {context['tag']!r}"
        case _:
            message = f"{fault['msg']}, got {fault['input']!r:.80}"
            for theirs, ours in WORDS.items():
                message = message.replace(theirs, ours)
    return f"{'.'.join(path)}: {message}" if path else message
