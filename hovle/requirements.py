"""What hovle cannot do without, as its installed metadata says; nothing heavy is needed to ask.

`import hovle` and `hovle doctor` look here first, so that a missing torch or an old transformers ends in advice.
"""

import importlib
import importlib.metadata

from packaging.requirements import Requirement

TRIED = ("torch", "transformers")
"""Packages that are imported to see whether they can be: a broken installation has a version, too."""


def required() -> list[Requirement]:
    """The packages hovle always needs; without versions where hovle itself is not installed."""
    try:
        lines = importlib.metadata.requires("hovle") or []
    except importlib.metadata.PackageNotFoundError:
        lines = list(TRIED)
    return [requirement for requirement in map(Requirement, lines) if requirement.marker is None]  # no extras


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
