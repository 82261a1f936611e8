"""Errors that more than one part of the package knows, and how they are told."""

import contextlib
from collections.abc import Iterator

LONGEST_NAME = 200
"""Characters shown of a name that a file gives."""


class StopRunError(RuntimeError):
    """A run that must not go on, with a message for the user; the command prints it without a traceback."""


@contextlib.contextmanager
def foreign_errors(what: str) -> Iterator[None]:
    """Turn whatever other people's code raises on a file into a ValueError of one line that begins with `what`.

    A panic of a library in Rust is no `Exception` but a `BaseException` of its own. Interrupts pass, and so does
    `ImportError`: a package is missing, no file is wrong.
    """
    try:
        yield
    except (ImportError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        message = printable(" ".join(str(error).split()))
        raise ValueError(f"{what}: {message or type(error).__name__}") from error


def printable(text: str, kept: str = "\n\t") -> str:
    """Write characters that move a terminal's cursor, colour it or reverse its text as escapes, as `repr` does.

    Args:
        text: Something a file of unknown origin has a part in.
        kept: Such characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in kept else char.encode("unicode_escape").decode() for char in text
    )


def printable_name(name: object) -> str:
    """A name that a file gives, on one line and not too long."""
    shown = printable(str(name), kept="")
    return shown if len(shown) <= LONGEST_NAME else f"{shown[:LONGEST_NAME]}... ({len(shown)} characters)"
