"""Fonts to write with: which families there are, and what each can write."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from PIL import ImageFont

SIZES_KEPT = 400
"""Fonts of a size that are kept open in a process."""

_TOO_FAINT = ("Thin", "ExtraLight", "100", "200")
"""Parts of the names of files whose strokes vanish in small letters."""

_CASE_PAIRS = (("a", "A"), ("e", "E"), ("r", "R"))


@dataclass(frozen=True)
class FontFile:
    """One style of a family."""

    family: str
    path: Path

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """The font with letters of this size in pixels."""
        return _open(self.path, size)

    @property
    def has_capitals_only(self) -> bool:
        """Whether small letters look like capitals, so that nobody could tell how a text was written."""
        return _has_capitals_only(self.path)

    def can_write(self, text: str) -> bool:
        """Whether the font has a shape for every character."""
        return all(character.isspace() or _has_shape(self.path, character) for character in set(text))


@functools.lru_cache(maxsize=SIZES_KEPT)
def _open(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _characters(path: Path) -> frozenset[int]:
    from fontTools.ttLib import TTFont  # an extra

    with TTFont(path, lazy=True) as font:
        return frozenset(font.getBestCmap())


@functools.cache
def _has_shape(path: Path, character: str) -> bool:
    return ord(character) in _characters(path) and _open(path, 40).getmask(character).getbbox() is not None


@functools.cache
def _has_capitals_only(path: Path) -> bool:
    font = _open(path, 40)
    return all(bytes(font.getmask(small)) == bytes(font.getmask(capital)) for small, capital in _CASE_PAIRS)


def font_files(folder: Path, family: str) -> list[FontFile]:
    """Upright and slanted styles of a family that can be read at small sizes; ValueError where there are none."""
    paths = [path for path in sorted(folder.rglob("*.ttf")) if not any(part in path.name for part in _TOO_FAINT)]
    if not paths:
        raise ValueError(f"{folder} holds no font files (.ttf) of {family} that are bold enough to read.")
    return [FontFile(family, path) for path in paths]


FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "train": (
            # without serifs
            "barlow", "cabin", "exo-2", "fira-sans", "inter", "josefin-sans", "karla", "lato", "montserrat", "nunito",
            "open-sans", "oswald", "poppins", "pt-sans", "raleway", "rubik", "source-sans-3", "titillium-web",
            # with serifs
            "bitter", "cormorant-garamond", "crimson-text", "domine", "eb-garamond", "libre-baskerville",
            "merriweather", "noto-serif", "playfair-display", "pt-serif",
            # of one width
            "courier-prime", "ibm-plex-mono", "inconsolata", "space-mono",
            # drawn, for display
            "abril-fatface", "bebas-neue", "comfortaa", "righteous",
            # by hand
            "caveat", "dancing-script", "lobster", "patrick-hand",
        ),
        "test": (
            "alegreya", "anton", "dm-sans", "kalam", "libre-franklin", "lora", "quicksand", "roboto-mono", "work-sans",
            "zilla-slab",
        ),
    }
)  # fmt: skip
"""Part -> families of `@expo-google-fonts`; validation writes with those of training."""
