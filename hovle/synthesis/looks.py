"""Pairs of colors in which what is drawn can be seen: letters and icons, and what is behind them."""

import random
from dataclasses import dataclass

from .colors import NAMED_COLORS, Rgb, name_of, to_lab, vary

CLEAR_LIGHTNESS = 38
"""Least difference of lightness (CIE 1976) between ink and ground."""


@dataclass(frozen=True)
class Looks:
    """A color to draw with, and one to draw on."""

    ink: Rgb
    ground: Rgb

    @property
    def ink_name(self) -> str | None:
        return name_of(self.ink)

    @property
    def ground_name(self) -> str | None:
        return name_of(self.ground)


def draw_looks(rng: random.Random) -> Looks:
    """Two colors that differ clearly in lightness; often black and white."""
    if rng.random() < 0.35:
        dark, light = vary("black", rng), vary("white", rng)
        return Looks(light, dark) if rng.random() < 0.25 else Looks(dark, light)
    while True:
        ink, ground = (
            vary(rng.choice(list(NAMED_COLORS)), rng)
            if rng.random() < 0.7
            else (rng.randrange(256), rng.randrange(256), rng.randrange(256))
            for _ in range(2)
        )
        if abs(to_lab(ink)[0] - to_lab(ground)[0]) >= CLEAR_LIGHTNESS:
            return Looks(ink, ground)
