"""Answers, fast: what a model has read already is not read again, and many answers grow together."""

from .batch import Batch, Row
from .prefixes import ImageSession, PrefixCache

__all__ = ["Batch", "ImageSession", "PrefixCache", "Row"]
