"""What lies behind things: plain colors and simple textures that hide nothing."""

import random
from collections.abc import Iterable

import numpy as np
from PIL import Image

from .colors import Rgb, stands_out

_CLOSEST = 14
"""How far a texture strays from the ground's color, in steps of 255."""


def choose_ground(rng: random.Random, things: Iterable[Rgb]) -> Rgb:
    """A color that each of the things stands out from.

    Raises:
        ValueError: When no color of 400 does; give fewer colors.
    """
    things = list(things)
    for _ in range(400):
        low, high = rng.choice(((0, 255), (170, 255), (225, 255), (0, 90)))
        color = (rng.randint(low, high), rng.randint(low, high), rng.randint(low, high))
        if all(stands_out(color, thing) for thing in things):
            return color
    raise ValueError(f"No ground stands out from all of {len(things)} colors ({things}); give fewer.")


def draw_ground(size: tuple[int, int], color: Rgb, rng: random.Random) -> Image.Image:
    """A picture of one color, often with a faint gradient, stripes, checks, dots or grain."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    texture = rng.choice(("plain", "plain", "plain", "gradient", "stripes", "checks", "dots", "grain"))
    strength = rng.uniform(0.4, 1) * _CLOSEST
    period = rng.uniform(8, 40)
    angle = rng.uniform(0, np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    if texture == "gradient":
        shift = along / np.hypot(width, height)
    elif texture == "stripes":
        shift = np.sign(np.sin(2 * np.pi * along / period))
    elif texture == "checks":
        shift = np.sign(np.sin(2 * np.pi * along / period) * np.sin(2 * np.pi * across / period))
    elif texture == "dots":
        shift = (np.sin(2 * np.pi * along / period) * np.sin(2 * np.pi * across / period) > 0.7).astype(np.float32)
    elif texture == "grain":
        shift = np.random.default_rng(rng.getrandbits(32)).normal(0, 0.4, (height, width)).clip(-1, 1)
    else:
        shift = np.zeros((height, width))
    pixels = np.asarray(color, dtype=np.float32) + strength * shift[..., None]
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
