"""Clothing: product photographs of Fashion-MNIST, larger, in gray or in a color, on all kinds of grounds."""

import gzip
import random
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..colors import Rgb, stands_out
from ..encoding import to_png
from ..english import as_sentence, with_article
from ..grounds import choose_ground, draw_ground
from ..layouts import Box, Size
from ..samples import Question, Region, Sample
from ..skill import AssetFolders, Skill, fetched

NAMES = (
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
"""Class number -> name; the data set calls T-shirts `T-shirt/top`."""

ACCEPTED = MappingProxyType({"T-shirt": ("top", "t-shirt", "T-shirt/top"), "trousers": ("trouser", "pants")})

WORN = MappingProxyType(
    {
        "T-shirt": "upper body", "trousers": "legs", "pullover": "upper body", "dress": "whole body",
        "coat": "upper body", "sandal": "feet", "shirt": "upper body", "sneaker": "feet", "bag": "hand",
        "ankle boot": "feet",
    }
)  # fmt: skip
"""Name -> where it is worn or held."""

WORDINGS = MappingProxyType(
    {
        "name": (
            "What piece of clothing is this?",
            "What is this?",
            "Name this piece of clothing.",
            "What do you see?",
        ),
        "check": ("Is this {an}?", "Do you see {an}?", "Does the picture show {an}?"),
        "worn": ("Where is it worn or held?", "Which part of the body is it for?"),
        "shoe": ("Is it a kind of shoe?", "Is this worn on the feet?"),
        "caption": ("Describe the picture.", "What does the picture show?", "Describe this picture in one sentence."),
    }
)

CAPTIONS = ("{an}", "{an} on a plain ground", "a photograph of {an}", "this picture shows {an}")

_NUM_TRAIN, _NUM_VALIDATION, _NUM_TEST = 58_000, 2_000, 10_000
_SIDE = 28
_SIZES = ((112, 112), (112, 112), (224, 224))


class _Photographs:
    """Photographs and class numbers of one of the data set's two parts.

    Args:
        folder: Of the four files.
        part: `train` or `t10k`.
        count: How many there must be.
    """

    def __init__(self, folder: Path, part: str, count: int):
        self.pixels = _read_idx(folder / f"{part}-images-idx3-ubyte.gz", (count, _SIDE, _SIDE))
        self.labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", (count,))


def _read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An array of bytes in the format of MNIST; ValueError when it has another shape."""
    content = gzip.decompress(path.read_bytes())
    header = 4 + 4 * len(shape)
    found = tuple(np.frombuffer(content[4:header], ">u4"))
    if content[:4] != bytes((0, 0, 8, len(shape))) or found != shape or len(content) != header + np.prod(shape):
        raise ValueError(f"{path} holds bytes of the shape {found}; expected {shape}. Fetch the data set again.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


class Clothing(Skill):
    """Photographs of single pieces of clothing."""

    name = "clothing"
    description = "product photographs of ten kinds of clothing (Fashion-MNIST) on many grounds"
    revision = 1
    sizes = MappingProxyType(
        {
            "small": MappingProxyType({"train": 400, "validation": 40, "test": 100}),
            "full": MappingProxyType({"train": 20_000, "validation": 500, "test": 2_000}),
        }
    )
    held_out = ("photograph",)
    sources = (fetched("dataset-fashion-mnist"),)

    def __init__(self, folders: AssetFolders):
        super().__init__(folders)
        self._folder = folders["dataset-fashion-mnist"] / "usr/share/datasets/fashion-mnist"

    @cached_property
    def _learned(self) -> _Photographs:
        return _Photographs(self._folder, "train", _NUM_TRAIN + _NUM_VALIDATION)

    @cached_property
    def _tested(self) -> _Photographs:
        return _Photographs(self._folder, "t10k", _NUM_TEST)

    def limit(self, split: str) -> int | None:
        """Every photograph of the standard test part once; those to learn from come again on other grounds."""
        return {"validation": _NUM_VALIDATION, "test": _NUM_TEST}.get(split)

    def draw(self, index: int, split: str, seed: int) -> Sample:
        """Put a photograph on a ground and ask what it is."""
        rng = self.rng(index, split, seed)
        count = {"train": _NUM_TRAIN, "validation": _NUM_VALIDATION, "test": _NUM_TEST}[split]
        place = self.place(index, count, split, seed)
        source, number = (self._tested, place) if split == "test" else (self._learned, place)
        if split == "validation":
            number += _NUM_TRAIN
        name = NAMES[source.labels[number]]
        size = rng.choice(_SIZES)
        image, box = draw_piece(source.pixels[number], size, rng)
        part = "test" if split == "test" else "train"
        source_ids = (f"photograph:{part}/{number}", f"name:{name}")
        return Sample(to_png(image), size, ask(name, rng), (Region(box, name),), source_ids, {"name": name})


def draw_piece(pixels: NDArray[np.uint8], size: Size, rng: random.Random) -> tuple[Image.Image, Box]:
    """Draw a photograph on a ground, as it is, negative, in gray or in a color.

    Args:
        pixels: Light piece on black, shape `(28, 28)`.
        size: Width and height of the picture.
        rng: Draws place, extent and colors.

    Returns:
        The picture, and the box of the piece.
    """
    side = round(min(size) * rng.uniform(0.6, 1.0))
    left, top = rng.randint(0, size[0] - side), rng.randint(0, size[1] - side)
    large = (side, side)
    resample = Image.Resampling.BICUBIC
    gray = np.asarray(Image.fromarray(pixels).resize(large, resample), dtype=np.float32) / 255
    outline = _outline(pixels)
    alpha = outline.resize(large, resample)
    dark, light, ground = _tones(rng)
    toned = np.asarray(dark) + gray[..., None] * (np.asarray(light, dtype=np.float32) - np.asarray(dark))
    piece = Image.fromarray(toned.clip(0, 255).round().astype(np.uint8))
    image = draw_ground(size, ground, rng)
    image.paste(piece, (left, top), alpha)
    inner = alpha.point(lambda value: 255 * (value > 127)).getbbox() or (0, 0, side, side)
    return image, (left + inner[0], top + inner[1], left + inner[2], top + inner[3])


def _outline(pixels: NDArray[np.uint8]) -> Image.Image:
    """255 where the piece is: whatever black does not reach from the edge; mode L."""
    framed = Image.fromarray(np.pad(np.where(pixels > 6, 255, 0).astype(np.uint8), 1)).copy()  # a mutable one
    ImageDraw.floodfill(framed, (0, 0), 128)
    return framed.point(lambda value: 0 if value == 128 else 255).crop((1, 1, _SIDE + 1, _SIDE + 1))


def _tones(rng: random.Random) -> tuple[Rgb, Rgb, Rgb]:
    """Colors of the piece's darkest and lightest parts, and of the ground."""
    kind = rng.choice(("original", "negative", "gray", "color", "color"))
    if kind == "original":
        return (0, 0, 0), (255, 255, 255), (0, 0, 0)
    if kind == "negative":
        return (255, 255, 255), (0, 0, 0), (255, 255, 255)
    while True:
        light = (rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255))
        if kind == "gray":
            light = (light[0], light[0], light[0])
        red, green, blue = light
        dark = (red // 5, green // 5, blue // 5)
        if stands_out(dark, light):
            return dark, light, choose_ground(rng, [dark, light])


def ask(name: str, rng: random.Random) -> tuple[Question, ...]:
    """Questions about a piece of this name, what it is first."""
    answer = rng.choice(("yes", "no"))
    asked = name if answer == "yes" else rng.choice([other for other in NAMES if other != name])
    questions = [_ask("check", answer, rng, an=_an(asked)), _ask("worn", WORN[name], rng)]
    is_shoe = WORN[name] == "feet"
    if is_shoe or rng.random() < 3 / 7:  # as many shoes as others
        questions.append(_ask("shoe", "yes" if is_shoe else "no", rng))
    text = as_sentence(rng.choice(CAPTIONS).format(an=_an(name)))
    named = Question(rng.choice(WORDINGS["name"]), name, "name", ACCEPTED.get(name, ()))
    return (named, *rng.sample(questions, 2), Question(rng.choice(WORDINGS["caption"]), text, "caption"))


def _ask(kind: str, answer: str, rng: random.Random, **parts: str) -> Question:
    return Question(rng.choice(WORDINGS[kind]).format(**parts), answer, kind)


def _an(name: str) -> str:
    return "a pair of trousers" if name == "trousers" else with_article(name)
