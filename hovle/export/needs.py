"""Packages of single formats, asked for before a model is loaded."""

import importlib.util


def need(what: str, requirement: str, *modules: str) -> None:
    """Raise ValueError, with what installs them, unless modules are there.

    Args:
        what: What they are for.
        requirement: What pip installs, for instance `hovle[onnx]`.
        *modules: Names to import; those of transformers came with a later version.
    """
    for name in modules:
        if importlib.util.find_spec(name) is None:
            remedy = (
                "pip install -U transformers" if name.startswith("transformers.") else f"pip install '{requirement}'"
            )
            raise ValueError(f"{what} needs {name}, which is not installed: {remedy}")
