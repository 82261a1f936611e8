"""What every part of a recipe is: frozen fields whose types pydantic checks, and no others."""

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, Strict, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from ...errors import printable_name

RENAMED = {"blind_check": "image_ablation", "stop_when_blind": "stop_when_images_ignored"}
"""Key of earlier versions -> what it is called now."""

Item = TypeVar("Item")


def number_in(value: Any) -> Any:
    """The number a text stands for: YAML reads 3e-4 as text. Anything else stays."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def listed(value: Any) -> Any:
    """A single section needs no list."""
    return [value] if isinstance(value, dict) else value


MOST = 10**9
"""More than any number of a recipe can mean, and less than what overflows on the way."""

Number = Annotated[float, BeforeValidator(number_in), Field(allow_inf_nan=False)]
"""A field that holds one says between what it must lie."""
Positive = Annotated[Number, Field(gt=0, le=MOST)]
PositiveOrZero = Annotated[Number, Field(ge=0, le=MOST)]
Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrNone = Annotated[int, Field(ge=0, le=MOST)]
"""Where 0 stands for none, or never."""
Side = Annotated[int, Field(ge=1, le=16_384)]
"""Of a picture or patch, in pixels."""
Place = Annotated[int, Field(ge=-MOST, le=MOST)]
"""An index as in Python lists."""
Many = Annotated[tuple[Item, ...], Strict(False), BeforeValidator(listed)]
"""A list in YAML, a tuple once it is loaded."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def section(cls: type) -> Any:
    """Make a class of annotated fields a part of recipes; where a value has another type, `ValidationError`."""
    return dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))(cls)


class Section:
    """A part of a recipe, which refuses keys that are none of its fields."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        return refuse_unknown_keys(cls, values)


class Kind(Section):
    """A section of which there are several kinds, each with fields of its own; one of them names the kind."""

    TAG: ClassVar[str]
    """Field that names the kind."""

    @classmethod
    def kinds(cls) -> dict[str, type]:
        """All kinds by their names, whichever is asked."""
        base = next(item for item in cls.__mro__ if Kind in item.__bases__)
        return {getattr(kind, cls.TAG): kind for kind in _below(base) if hasattr(kind, cls.TAG)}


def _below(cls: Any) -> Iterator[type]:
    """Classes derived from one, at any distance, in the order in which they were made."""
    for kind in cls.__subclasses__():
        yield kind
        yield from _below(kind)


def field_names(cls: type) -> list[str]:
    """Fields of a section."""
    return [field.name for field in dataclasses.fields(cls)]


def refuse_unknown_keys(cls: type, values: Any) -> Any:
    """Return what a section is made of; ValueError where it has a key that the section lacks."""
    given = values.kwargs if isinstance(values, ArgsKwargs) else values
    unknown = [key for key in given if key not in field_names(cls)] if isinstance(given, dict) else []
    if unknown:
        raise ValueError("; ".join(_advice(cls, key) for key in unknown))
    return values


def _advice(cls: type, key: str) -> str:
    """Where a key that a section lacks may have been meant to stand."""
    if RENAMED.get(key) in field_names(cls):
        return f"unknown key {key!r}: it is called {RENAMED[key]} now"
    kinds = cls.kinds() if issubclass(cls, Kind) else {}
    owners = [name for name, kind in kinds.items() if key in field_names(kind)]
    if owners:
        [own] = [name for name, kind in kinds.items() if kind is cls]
        return f"{key} belongs to {', '.join(owners)}; {own} does not read it"
    meant = [name for section in (cls, *kinds.values()) for name in field_names(section)]
    *others, last = difflib.get_close_matches(str(key), dict.fromkeys(meant), n=3, cutoff=0)
    nearest = f"{', '.join(others)} or {last}" if others else last
    return f"unknown key {printable_name(repr(key))}; did you mean {nearest}?"
