"""Answers, fast: what a model has read already is not read again."""

from .prefixes import ImageSession, PrefixCache

__all__ = ["ImageSession", "PrefixCache"]
