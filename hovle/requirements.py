"""What hovle cannot do without, as its installed metadata says; nothing heavy is needed to ask.

`import hovle` and `hovle doctor` look here first, so that a missing torch or an old transformers ends in advice.
"""

import importlib
import importlib.metadata
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

TRIED = ("torch", "transformers")
"""Packages that are imported to see whether they can be: a broken installation has a version, too."""


def required() -> list[Requirement]:
    """The packages hovle always needs; without versions where hovle itself is not installed."""
    try:
        lines = importlib.metadata.requires("hovle") or []
    except importlib.metadata.PackageNotFoundError:
        lines = list(TRIED)
    return [requirement for requirement in map(Requirement, lines) if requirement.marker is None]  # no extras


def optional_specifier(package: str, requirement: str) -> SpecifierSet:
    """The versions of an optional package that go with hovle; any where no metadata speaks of it.

    Args:
        package: Its name on the index.
        requirement: What brings it, for instance `hovle[serve]`.
    """
    specifier = SpecifierSet()
    for wanted in _brought_by(Requirement(requirement)):
        if canonicalize_name(wanted.name) == canonicalize_name(package):
            specifier &= wanted.specifier
    return specifier


def _brought_by(requirement: Requirement) -> Iterator[Requirement]:
    """What the extras of a requirement bring; an extra may name extras of other packages."""
    try:
        lines = importlib.metadata.requires(requirement.name) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for wanted in map(Requirement, lines):
        if wanted.marker is not None and any(wanted.marker.evaluate({"extra": name}) for name in requirement.extras):
            yield wanted
            yield from _brought_by(wanted)


def installed_version(package: str) -> str | None:
    """Version of a package by its name on the index, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def problem_with(requirement: Requirement) -> str | None:
    """What to do about a package that is missing, too old or broken; None when all is well."""
    version = installed_version(requirement.name)
    if version is None or not requirement.specifier.contains(version, prereleases=True):
        return f"hovle needs {requirement}: pip install '{requirement}'"
    if requirement.name in TRIED:
        try:
            importlib.import_module(requirement.name)
        except (ImportError, OSError) as error:  # OSError: a shared library is missing
            return f"cannot be imported ({error}); install it, or what it names there, again"
    return None


def unmet() -> str | None:
    """The first package in the way of hovle, in a line; None when hovle can work."""
    for requirement in required():
        if problem := problem_with(requirement):
            return f"{requirement.name} {installed_version(requirement.name) or 'is missing'}: {problem}."
    return None
