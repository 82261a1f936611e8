"""Colors that can be named without doubt, and how far apart two of them look."""

import random
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rgb = tuple[int, int, int]

NAMED_COLORS = MappingProxyType(
    {
        "red": (214, 30, 36),
        "orange": (245, 138, 20),
        "yellow": (250, 220, 40),
        "green": (40, 150, 50),
        "teal": (20, 150, 150),
        "blue": (35, 75, 215),
        "purple": (128, 40, 165),
        "pink": (250, 140, 190),
        "brown": (120, 70, 30),
        "black": (20, 20, 20),
        "gray": (135, 135, 135),
        "white": (250, 250, 250),
    }
)
"""What a name stands for; `vary` keeps within what nobody would call otherwise."""

_CLEAR_LIGHTNESS = 22.0
"""Difference of lightness, of 100, by which a color stands out from another whatever their hues."""

_CLEAR_DISTANCE, _LEAST_LIGHTNESS = 45.0, 35.0
"""Distance by which two colors that are not dark stand out from each other by their hues."""

_NEARER_BY = 1.8
"""How many times nearer a varied color is to its own name than to any other."""

_FARTHEST = 18.0
"""Distance of a varied color from what its name stands for, at most."""

_WITHOUT_HUE = ("black", "gray", "white")

_MOST_CHROMA = 12.0
"""Of what is called black, gray or white: a dark green is none of them."""

_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_WHITE = np.array([0.9505, 1.0, 1.089])


def to_lab(rgb: ArrayLike) -> NDArray[np.float64]:
    """CIE 1976 L*a*b* of sRGB colors under D65 (IEC 61966-2-1, CIE 15).

    Args:
        rgb: Shape `(..., 3)`, 0 to 255.

    Returns:
        Shape `(..., 3)`.
    """
    encoded = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    relative = linear @ _TO_XYZ.T / _WHITE
    root = np.where(relative > (6 / 29) ** 3, np.cbrt(relative), relative / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def distance(first: ArrayLike, second: ArrayLike) -> float:
    """How different two sRGB colors look, in CIE 1976 units: 2 is just visible, black and white are 100 apart."""
    return float(np.linalg.norm(to_lab(first) - to_lab(second)))


def stands_out(first: ArrayLike, second: ArrayLike) -> bool:
    """Whether a thing of one color is seen well on another: by its lightness, or by its hue where both are light."""
    lightness = sorted((to_lab(first)[0], to_lab(second)[0]))
    if lightness[1] - lightness[0] >= _CLEAR_LIGHTNESS:
        return True
    return bool(lightness[0] >= _LEAST_LIGHTNESS) and distance(first, second) >= _CLEAR_DISTANCE


_NAMES = tuple(NAMED_COLORS)
_LAB = to_lab([NAMED_COLORS[name] for name in _NAMES])


def name_of(color: ArrayLike) -> str | None:
    """The name a color clearly has, None for one between two names."""
    lab = to_lab(color)
    distances = np.linalg.norm(_LAB - lab, axis=-1)
    first, second = np.argsort(distances)[:2]
    has_hue = np.hypot(lab[1], lab[2]) > _MOST_CHROMA
    if distances[second] < _NEARER_BY * distances[first] or (has_hue and _NAMES[first] in _WITHOUT_HUE):
        return None
    return _NAMES[first]


def vary(name: str, rng: random.Random) -> Rgb:
    """A color of this name, each time another."""
    spread = 26
    while True:
        red, green, blue = (min(255, max(0, part + rng.randint(-spread, spread))) for part in NAMED_COLORS[name])
        color = (red, green, blue)
        if name_of(color) == name and distance(color, NAMED_COLORS[name]) <= _FARTHEST:
            return color
        spread = max(2, spread - 2)
