"""Drawings of single things on nothing: cut out, turned, brought to a size and put onto a ground."""

import random

import numpy as np
from PIL import Image

from .colors import Rgb, to_lab
from .grounds import draw_ground
from .samples import Box

FAINTEST = 40
"""Least opacity, of 255, that counts as part of a thing."""

_LOST_DISTANCE = 30.0
"""Colors nearer than this (CIE 1976) do not stand out from each other."""

_MOST_LOST = 0.25
"""Share of a thing's outline that may have the ground's color."""


def box_of(cutout: Image.Image) -> Box:
    """The smallest box around what is seen; ValueError where nothing is."""
    box = cutout.getchannel("A").point(lambda alpha: 255 * (alpha >= FAINTEST)).getbbox()
    if box is None:
        raise ValueError("a drawing that shows nothing.")
    return box


def trim(cutout: Image.Image) -> Image.Image:
    """Cropped to what is seen of it."""
    return cutout.crop(box_of(cutout))


def to_extent(cutout: Image.Image, extent: int) -> Image.Image:
    """Resized so that its longer side has so many pixels."""
    scale = extent / max(cutout.size)
    size = (max(1, round(cutout.width * scale)), max(1, round(cutout.height * scale)))
    return cutout.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def turn(cutout: Image.Image, degrees: float) -> Image.Image:
    """Turned against the clock, on a canvas that holds all of it."""
    return cutout.convert("RGBa").rotate(degrees, Image.Resampling.BICUBIC, expand=True).convert("RGBA")


def slant(cutout: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    """As seen a little from the side: each corner moves inward by up to so large a share of the sides."""
    width, height = cutout.size
    away = [(-1, -1), (-1, 1), (1, 1), (1, -1)]  # what is drawn there shrinks, so that nothing is cut off
    corners = [(0, 0), (0, height), (width, height), (width, 0)]
    source: list[float] = []
    for (x, y), (across, down) in zip(corners, away, strict=True):
        source.append(width + x + across * rng.uniform(0, 2 * strength) * width)
        source.append(height + y + down * rng.uniform(0, 2 * strength) * height)
    surrounded = Image.new("RGBa", (3 * width, 3 * height))
    surrounded.paste(cutout.convert("RGBa"), (width, height))
    return surrounded.transform((width, height), Image.Transform.QUAD, source, Image.Resampling.BICUBIC).convert(
        "RGBA"
    )


def tint(cutout: Image.Image, color: Rgb) -> Image.Image:
    """The same shape in one color."""
    image = Image.new("RGBA", cutout.size, color)
    image.putalpha(cutout.getchannel("A"))
    return image


def outline_colors(cutout: Image.Image) -> np.ndarray:
    """Colors along the outer edge, shape `(N, 3)`."""
    pixels = np.asarray(cutout)
    seen = np.pad(pixels[..., 3] > 128, 2)
    inner = seen.copy()
    for axis in (0, 1):
        for step in (1, 2):
            inner &= np.roll(seen, step, axis) & np.roll(seen, -step, axis)
    edge = (seen & ~inner)[2:-2, 2:-2]
    return pixels[edge][:, :3] if edge.any() else pixels.reshape(-1, 4)[:, :3]


def clear_ground(cutout: Image.Image, rng: random.Random) -> Rgb:
    """A color that the outline of a thing stands out from: mostly white or light."""
    outline = to_lab(outline_colors(cutout))
    best: tuple[float, Rgb] = (2.0, (255, 255, 255))
    for attempt in range(40):
        low, high = rng.choice(((255, 255), (255, 255), (215, 255), (150, 255), (0, 255), (0, 80)))
        color = (rng.randint(low, high), rng.randint(low, high), rng.randint(low, high))
        lost = float((np.linalg.norm(outline - to_lab(color), axis=-1) < _LOST_DISTANCE).mean())
        best = min(best, (lost, color))
        if best[0] <= _MOST_LOST or (attempt > 20 and best[0] < 0.5):
            break
    return best[1]


def show(
    cutout: Image.Image, size: tuple[int, int], rng: random.Random, ground: Rgb | None = None
) -> tuple[Image.Image, Box]:
    """Put a thing somewhere on a ground of a size.

    Args:
        cutout: Trimmed; no larger than the picture.
        size: Of the picture.
        rng: Draws the place and the ground.
        ground: Its color; None: one that the thing stands out from.

    Returns:
        The picture, mode RGB, and the box around the thing.
    """
    image = draw_ground(size, clear_ground(cutout, rng) if ground is None else ground, rng)
    left = rng.randint(0, size[0] - cutout.width)
    top = rng.randint(0, size[1] - cutout.height)
    image.paste(cutout, (left, top), cutout)
    box = box_of(cutout)
    return image, (left + box[0], top + box[1], left + box[2], top + box[3])
