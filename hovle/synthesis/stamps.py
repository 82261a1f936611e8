"""Drawings of single named things on nothing, out of which scenes are composed."""

import io
import random
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

from .colors import Rgb
from .layouts import Size
from .shapes import SHAPE_NAMES, draw_shape
from .skill import AssetFolders
from .vector import rasterize

PICTOGRAMS = MappingProxyType(
    {
        "airplane": "2708-fe0f", "anchor": "2693", "apple": "1f34e", "axe": "1fa93", "backpack": "1f392",
        "balloon": "1f388", "banana": "1f34c", "basketball": "1f3c0", "bear": "1f43b", "bed": "1f6cf-fe0f",
        "bee": "1f41d", "bell": "1f514", "bicycle": "1f6b2", "birthday cake": "1f382", "broom": "1f9f9",
        "bucket": "1faa3", "bus": "1f68c", "butterfly": "1f98b", "cactus": "1f335", "camel": "1f42a",
        "camera": "1f4f7", "candle": "1f56f-fe0f", "car": "1f697", "carrot": "1f955", "cat": "1f408",
        "chair": "1fa91", "cookie": "1f36a", "cow": "1f404", "crab": "1f980", "croissant": "1f950",
        "crown": "1f451", "dog": "1f415", "doughnut": "1f369", "dress": "1f457", "drum": "1f941",
        "duck": "1f986", "egg": "1f95a", "elephant": "1f418", "envelope": "2709-fe0f", "fish": "1f41f",
        "frog": "1f438", "gift": "1f381", "giraffe": "1f992", "guitar": "1f3b8", "hamburger": "1f354",
        "hammer": "1f528", "hedgehog": "1f994", "helicopter": "1f681", "horse": "1f40e", "hot dog": "1f32d",
        "hourglass": "231b", "house": "1f3e0", "key": "1f511", "kite": "1fa81", "ladder": "1fa9c",
        "ladybug": "1f41e", "lemon": "1f34b", "light bulb": "1f4a1", "lion": "1f981", "lock": "1f512",
        "magnet": "1f9f2", "motorcycle": "1f3cd-fe0f", "mushroom": "1f344", "octopus": "1f419", "owl": "1f989",
        "parrot": "1f99c", "pear": "1f350", "pencil": "270f-fe0f", "penguin": "1f427", "pig": "1f416",
        "pineapple": "1f34d", "pizza": "1f355", "pretzel": "1f968", "rabbit": "1f407", "robot": "1f916",
        "rocket": "1f680", "sailboat": "26f5", "sheep": "1f411", "snail": "1f40c", "snake": "1f40d",
        "snowman": "26c4", "soccer ball": "26bd", "spider": "1f577-fe0f", "spoon": "1f944", "strawberry": "1f353",
        "sunflower": "1f33b", "teapot": "1fad6", "telephone": "260e-fe0f",
        "television": "1f4fa", "tennis ball": "1f3be", "tent": "26fa", "tiger": "1f405", "tomato": "1f345",
        "top hat": "1f3a9", "tractor": "1f69c", "tree": "1f333", "trophy": "1f3c6", "truck": "1f69a",
        "trumpet": "1f3ba", "tulip": "1f337", "turtle": "1f422", "umbrella": "2614", "violin": "1f3bb",
        "watermelon": "1f349", "whale": "1f433", "zebra": "1f993",
    }
)  # fmt: skip
"""Name -> code point as the emoji packages write it: things that nobody takes for another of the list."""

ICONS = (
    "airplane", "anchor", "backpack", "balloon", "bed", "bell", "bicycle", "bird", "book", "bus", "butterfly",
    "cactus", "camera", "car", "carrot", "cat", "chair", "cloud", "cookie", "cow", "crown", "dog", "fish", "flag",
    "flower", "gift", "guitar", "hammer", "horse", "house", "key", "leaf", "lock", "moon", "pizza", "rabbit",
    "rocket", "tree", "trophy", "truck", "umbrella",
)  # fmt: skip
"""Filled icons of one color whose file name is what they show."""

_EMOJI_STYLES = MappingProxyType(
    {
        "google": ("emoji-datasource-google", "img/google/64/{code}.png"),
        "twitter": ("emoji-datasource-twitter", "img/twitter/64/{code}.png"),
    }
)


@dataclass(frozen=True)
class Stamp:
    """A drawing of one named thing."""

    name: str
    pixels: Image.Image
    """RGBA, cropped to what is seen of it."""
    is_tinted: bool
    """Whether it takes any one color."""
    source_id: str

    def extent(self, length: float) -> Size:
        """Width and height with this length of the longer side, in pixels."""
        scale = length / max(self.pixels.size)
        return max(4, round(self.pixels.width * scale)), max(4, round(self.pixels.height * scale))

    @property
    def edge_color(self) -> Rgb:
        """Mean color of its outer parts, which a ground must differ from."""
        return _edge_color(self)

    def at_size(self, size: Size, color: Rgb | None) -> Image.Image:
        """The drawing at a size in pixels, in one color where it takes one."""
        image = self.pixels.resize(size, Image.Resampling.LANCZOS)
        if color is not None:
            image.paste(color, (0, 0, *image.size))
            image.putalpha(self.pixels.getchannel("A").resize(size, Image.Resampling.LANCZOS))
        return image


def _edge_color(stamp: Stamp) -> Rgb:
    pixels = np.asarray(stamp.pixels)
    opaque = np.pad(pixels[..., 3] > 128, 1)
    inner = opaque.copy()
    for axis in (0, 1):
        for step in range(1, 1 + max(1, max(stamp.pixels.size) // 20)):
            inner &= np.roll(opaque, step, axis) & np.roll(opaque, -step, axis)
    edge = (opaque & ~inner)[1:-1, 1:-1]
    red, green, blue = (int(part) for part in pixels[edge][:, :3].mean(axis=0))
    return red, green, blue


class StampBox:
    """All stamps of the families `shapes`, `icons` and `pictograms`."""

    def __init__(self, assets: AssetFolders):
        self._assets = assets

    def names(self, family: str) -> tuple[str, ...]:
        """What there is a drawing of in a family."""
        return {"shapes": SHAPE_NAMES, "icons": ICONS, "pictograms": tuple(PICTOGRAMS)}[family]

    def draw(self, family: str, name: str, rng: random.Random) -> Stamp:
        """A drawing of a name, in one of the styles there are."""
        if family == "shapes":
            return _shape(name)
        if family == "icons":
            path = self._assets["phosphor-icons"] / "assets" / "fill" / f"{name}-fill.svg"
            return _icon(path, name)
        style = rng.choice(tuple(_EMOJI_STYLES))
        asset, pattern = _EMOJI_STYLES[style]
        return _pictogram(self._assets[asset] / pattern.format(code=PICTOGRAMS[name]), name, style)


@cache
def _shape(name: str) -> Stamp:
    mask = draw_shape(name)
    return Stamp(name, _tintable(mask), True, "style:shape")


@lru_cache(maxsize=256)
def _icon(path: Path, name: str) -> Stamp:
    image = rasterize(path.read_bytes(), 256)
    return Stamp(name, _tintable(_cropped(image).getchannel("A")), True, "style:phosphor")


@lru_cache(maxsize=512)
def _pictogram(path: Path, name: str, style: str) -> Stamp:
    image = Image.open(io.BytesIO(path.read_bytes())).convert("RGBA")
    return Stamp(name, _cropped(image), False, f"style:{style}")


def _tintable(mask: Image.Image) -> Image.Image:
    image = Image.new("RGBA", mask.size)
    image.putalpha(mask)
    return image


def _cropped(image: Image.Image) -> Image.Image:
    return image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 40)).getbbox())
