"""Answers, fast: what was read is not read again, many answers grow together, and layers run compiled."""

from .batch import Batch, Row
from .compiled import optimize
from .prefixes import ImageSession, PrefixCache

__all__ = ["Batch", "ImageSession", "PrefixCache", "Row", "optimize"]
