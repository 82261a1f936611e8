"""Errors that more than one part of the package knows."""


class StopRunError(RuntimeError):
    """A run that must not go on, with a message for the user; the command prints it without a traceback."""
