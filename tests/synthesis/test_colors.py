"""Names of colors: none where people would not agree."""

import random

import pytest

from hovle.synthesis.colors import NAMED_COLORS, name_of, vary


@pytest.mark.parametrize(
    ("color", "name"),
    [
        ((0, 40, 10), None),  # nearer to black than to green, and green to everybody
        ((45, 10, 10), None),
        ((20, 22, 20), "black"),
        ((140, 132, 130), "gray"),
        ((252, 250, 246), "white"),
        ((30, 140, 45), "green"),
    ],
)
def test_dark_and_pale_colors_with_a_hue_are_not_called_black_gray_or_white(color, name):
    assert name_of(color) == name


@pytest.mark.parametrize("name", NAMED_COLORS)
def test_varied_colors_keep_their_name_and_differ(name):
    rng = random.Random(0)
    found = {vary(name, rng) for _ in range(20)}
    assert {name_of(color) for color in found} == {name}
    assert len(found) > 10
