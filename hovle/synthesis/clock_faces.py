"""Clocks of many looks: hands on a face, or digits on a display."""

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from PIL import Image, ImageDraw, ImageFont

from .colors import Rgb, stands_out
from .grounds import choose_ground, draw_ground
from .layouts import Box, Size

_FINER = 4
"""Pictures are drawn so many times larger and then made smaller, for smooth edges."""

MARKS = ("numbers", "four numbers", "roman", "ticks", "many ticks", "dots", "none")
HANDS = ("line", "tapered", "tailed", "bar", "lance")
SHAPES = ("round", "square", "bare")

_ROMAN = ("XII", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI")


@dataclass(frozen=True)
class Look:
    """What a face looks like, apart from sizes and colors."""

    marks: str
    hands: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.marks} {self.hands} {self.shape}"

    @property
    def is_held_out(self) -> bool:
        """Whether it comes in tests only: one in six; each of its parts is in training elsewhere."""
        return zlib.crc32(self.name.encode()) % 6 == 0


LOOKS = tuple(Look(*parts) for parts in product(MARKS, HANDS, SHAPES))


def looks(split: str) -> list[Look]:
    """Looks of a part; validation has those of training."""
    return [look for look in LOOKS if look.is_held_out == (split == "test")]


@dataclass(frozen=True)
class Time:
    """What a clock shows."""

    hour: int
    minute: int

    @property
    def text(self) -> str:
        """As an answer: `7:05`."""
        return f"{self.hour}:{self.minute:02d}"


def draw_face(time: Time, look: Look, size: Size, rng: random.Random) -> tuple[Image.Image, Box]:
    """Draw an analog clock on a ground.

    Args:
        time: What it shows; the short hand moves on with the minutes.
        look: What its face looks like.
        size: Width and height of the picture in pixels.
        rng: Draws sizes, colors and places.

    Returns:
        The picture, and the box of the clock.
    """
    face, ink = _face_and_ink(rng)
    rim = rng.choice((ink, _color(rng), _color(rng)))
    ground = face if look.shape == "bare" else choose_ground(rng, [face, rim])
    image = draw_ground(size, ground, rng).resize((size[0] * _FINER, size[1] * _FINER), Image.Resampling.NEAREST)
    radius = min(size) * rng.uniform(0.34, 0.47)
    center = tuple(rng.uniform(radius + 2, length - radius - 2) for length in size)
    dial = _Dial(ImageDraw.Draw(image), (center[0] * _FINER, center[1] * _FINER), radius * _FINER)
    _draw_plate(dial, look.shape, face, rim, rng)
    _draw_marks(dial, look, ink, rng)
    _draw_hands(dial, time, look.hands, face, ink, rng)
    box = (
        max(0, math.floor(center[0] - radius)),
        max(0, math.floor(center[1] - radius)),
        min(size[0], math.ceil(center[0] + radius)),
        min(size[1], math.ceil(center[1] + radius)),
    )
    return image.resize(size, Image.Resampling.BOX), box


@dataclass(frozen=True)
class _Dial:
    draw: ImageDraw.ImageDraw
    center: tuple[float, float]
    radius: float

    def at(self, turn: float, reach: float) -> tuple[float, float]:
        """A point: turns of a full circle from twelve on, share of the radius."""
        angle = 2 * math.pi * turn
        x, y = self.center
        return x + self.radius * reach * math.sin(angle), y - self.radius * reach * math.cos(angle)

    def beside(self, turn: float, reach: float, aside: float) -> tuple[float, float]:
        """A point as `at`, so many shares of the radius off to the right of the ray."""
        x, y = self.at(turn, reach)
        angle = 2 * math.pi * turn
        return x + self.radius * aside * math.cos(angle), y + self.radius * aside * math.sin(angle)

    def disc(self, reach: float, color: Rgb) -> None:
        (x, y), radius = self.center, self.radius * reach
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)

    def square(self, reach: float, color: Rgb, corner: float) -> None:
        (x, y), radius = self.center, self.radius * reach
        self.draw.rounded_rectangle((x - radius, y - radius, x + radius, y + radius), corner * self.radius, fill=color)


def _color(rng: random.Random) -> Rgb:
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


def _face_and_ink(rng: random.Random) -> tuple[Rgb, Rgb]:
    if rng.random() < 0.5:
        return ((255, 255, 255), (0, 0, 0)) if rng.random() < 0.75 else ((15, 15, 15), (245, 245, 245))
    while True:
        face, ink = _color(rng), _color(rng)
        if stands_out(face, ink):
            return face, ink


def _draw_plate(dial: _Dial, shape: str, face: Rgb, rim: Rgb, rng: random.Random) -> None:
    thickness = rng.choice((0.03, 0.06, 0.12))
    if shape == "round":
        dial.disc(1, rim)
        dial.disc(1 - thickness, face)
    elif shape == "square":
        corner = rng.choice((0.0, 0.2, 0.4))
        dial.square(1, rim, corner)
        dial.square(1 - thickness, face, max(0.0, corner - thickness))


def _draw_marks(dial: _Dial, look: Look, ink: Rgb, rng: random.Random) -> None:
    if look.marks in ("numbers", "four numbers", "roman"):
        _draw_numerals(dial, look.marks, ink, rng)
    elif look.marks in ("ticks", "many ticks"):
        width = rng.uniform(0.03, 0.06)
        for tick in range(60 if look.marks == "many ticks" else 12):
            is_hour = look.marks == "ticks" or tick % 5 == 0
            turn = tick / (60 if look.marks == "many ticks" else 12)
            _ray(dial, turn, 0.76 if is_hour else 0.81, 0.86, width if is_hour else 0.016, ink)
    elif look.marks == "dots":
        for tick in range(12):
            (x, y), radius = dial.at(tick / 12, 0.81), dial.radius * (0.06 if tick % 3 == 0 else 0.035)
            dial.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)


def _draw_numerals(dial: _Dial, marks: str, ink: Rgb, rng: random.Random) -> None:
    scale = {
        "numbers": rng.uniform(0.2, 0.26),
        "four numbers": rng.uniform(0.26, 0.34),
        "roman": rng.uniform(0.15, 0.19),
    }
    font = ImageFont.load_default(dial.radius * scale[marks])
    for hour in range(12):
        if marks == "four numbers" and hour % 3:
            _ray(dial, hour / 12, 0.8, 0.86, 0.03, ink)
            continue
        text = _ROMAN[hour] if marks == "roman" else str(hour or 12)
        dial.draw.text(dial.at(hour / 12, 0.76), text, fill=ink, font=font, anchor="mm")


def _ray(dial: _Dial, turn: float, start: float, end: float, width: float, color: Rgb) -> None:
    corners = [dial.beside(turn, reach, aside) for reach, aside in _corners(start, end, width)]
    dial.draw.polygon(corners, fill=color)


def _corners(start: float, end: float, width: float) -> list[tuple[float, float]]:
    return [(start, -width / 2), (end, -width / 2), (end, width / 2), (start, width / 2)]


def _draw_hands(dial: _Dial, time: Time, style: str, face: Rgb, ink: Rgb, rng: random.Random) -> None:
    minute_reach = rng.uniform(0.68, 0.84)
    hour_reach = minute_reach * rng.uniform(0.52, 0.66)
    hour_width = rng.uniform(0.09, 0.13)
    minute_width = hour_width * rng.uniform(0.45, 0.7)
    hour_color = minute_color = ink
    if rng.random() < 0.4:
        hour_color, minute_color = _clear_of(face, rng), _clear_of(face, rng)
        minute_color = minute_color if rng.random() < 0.5 else hour_color
    minutes = time.minute / 60
    _draw_hand(dial, (time.hour + minutes) / 12, hour_reach, hour_width, style, hour_color)
    _draw_hand(dial, minutes, minute_reach, minute_width, style, minute_color)
    if rng.random() < 0.25:
        _ray(dial, rng.random(), -0.15, 0.88, 0.018, rng.choice(((215, 30, 30), ink)))
    dial.disc(max(0.045, hour_width * 0.6), rng.choice((hour_color, minute_color)))


def _clear_of(face: Rgb, rng: random.Random) -> Rgb:
    while True:
        color = _color(rng)
        if stands_out(color, face):
            return color


def _draw_hand(dial: _Dial, turn: float, reach: float, width: float, style: str, color: Rgb) -> None:
    half = width / 2
    outlines: dict[str, Sequence[tuple[float, float]]] = {
        "line": _corners(0, reach, width * 0.75),
        "bar": _corners(-0.12, reach, width * 1.1),
        "tapered": [(-0.05, -half * 1.3), (reach, -half * 0.25), (reach, half * 0.25), (-0.05, half * 1.3)],
        "tailed": [(-0.2, -half * 1.2), (reach, -half * 0.3), (reach, half * 0.3), (-0.2, half * 1.2)],
        "lance": [
            (0, -half * 0.4),
            (reach * 0.72, -half * 1.5),
            (reach, 0),
            (reach * 0.72, half * 1.5),
            (0, half * 0.4),
        ],
    }
    dial.draw.polygon([dial.beside(turn, along, aside) for along, aside in outlines[style]], fill=color)


_SEGMENTS = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")
"""Digit -> its lit segments; a is the top one, on with the clock, g is the middle one."""


def draw_display(time: Time, padded: bool, size: Size, rng: random.Random) -> tuple[Image.Image, Box]:
    """Draw a digital clock on a ground.

    Args:
        time: What it shows.
        padded: Whether hours below ten begin with a zero.
        size: Width and height of the picture in pixels.
        rng: Draws sizes, colors and places.

    Returns:
        The picture, and the box of the clock.
    """
    panel, ink = _face_and_ink(rng)
    image = draw_ground(size, choose_ground(rng, [panel]), rng)
    image = image.resize((size[0] * _FINER, size[1] * _FINER), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    text = f"{time.hour:02d}:{time.minute:02d}" if padded else time.text
    width = min(size) * rng.uniform(0.6, 0.92)
    height = width * rng.uniform(0.36, 0.5)
    left, top = rng.uniform(2, size[0] - width - 2), rng.uniform(2, size[1] - height - 2)
    corners = [_FINER * edge for edge in (left, top, left + width, top + height)]
    draw.rounded_rectangle(corners, rng.choice((0, 0.1, 0.2)) * height * _FINER, fill=panel)
    inner = (left + 0.1 * width, top + 0.18 * height, left + 0.9 * width, top + 0.82 * height)
    if rng.random() < 0.6:
        _draw_segments(draw, text, [_FINER * edge for edge in inner], ink, rng)
    else:
        font = ImageFont.load_default(_FINER * min(0.62 * height, 0.3 * width))
        draw.text((_FINER * (left + width / 2), _FINER * (top + height / 2)), text, fill=ink, font=font, anchor="mm")
    box = (math.floor(left), math.floor(top), math.ceil(left + width), math.ceil(top + height))
    return image.resize(size, Image.Resampling.BOX), box


def _draw_segments(draw: ImageDraw.ImageDraw, text: str, box: Sequence[float], ink: Rgb, rng: random.Random) -> None:
    left, top, right, bottom = box
    advance = (right - left) / sum(0.45 if letter == ":" else 1 for letter in text)
    advance = min(advance, (bottom - top) * 0.8)
    thickness = advance * rng.uniform(0.1, 0.17)
    slant = rng.choice((0.0, 0.0, 0.1))
    x = (left + right - advance * sum(0.45 if letter == ":" else 1 for letter in text)) / 2
    for letter in text:
        if letter == ":":
            for share in (0.32, 0.68):
                y = top + share * (bottom - top)
                middle = x + 0.225 * advance + slant * (bottom - y)
                draw.rectangle(
                    (middle - thickness / 2, y - thickness / 2, middle + thickness / 2, y + thickness / 2), ink
                )
            x += 0.45 * advance
        else:
            for segment in _SEGMENTS[int(letter)]:
                _draw_segment(
                    draw, segment, (x + 0.12 * advance, top, x + 0.88 * advance, bottom), thickness, slant, ink
                )
            x += advance


def _draw_segment(
    draw: ImageDraw.ImageDraw,
    name: str,
    box: tuple[float, float, float, float],
    thickness: float,
    slant: float,
    ink: Rgb,
) -> None:
    left, top, right, bottom = box
    middle, half = (top + bottom) / 2, thickness / 2
    places = {
        "a": (left, top, right, top + thickness),
        "b": (right - thickness, top, right, middle + half),
        "c": (right - thickness, middle - half, right, bottom),
        "d": (left, bottom - thickness, right, bottom),
        "e": (left, middle - half, left + thickness, bottom),
        "f": (left, top, left + thickness, middle + half),
        "g": (left, middle - half, right, middle + half),
    }
    x0, y0, x1, y1 = places[name]
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    draw.polygon([(x + slant * (bottom - y), y) for x, y in corners], fill=ink)
