"""Drawings of where a token looks."""

import torch
from PIL import Image

from hovle.app.looks import SIDE, draw_heat


def brightness(drawing: Image.Image, x: int, y: int) -> int:
    return sum(drawing.getpixel((x, y)))


def test_the_drawing_is_bright_where_the_weight_is():
    weights = torch.tensor([[0.0, 0.0], [0.0, 0.5]])
    drawing = draw_heat(Image.new("RGB", (64, 32), "gray"), weights, peak=0.5)
    assert drawing.size == (SIDE, SIDE // 2)
    corners = {(x, y): brightness(drawing, x, y) for x in (10, SIDE - 10) for y in (10, SIDE // 2 - 10)}
    assert max(corners, key=corners.__getitem__) == (SIDE - 10, SIDE // 2 - 10)
    assert len(set(corners.values())) == 2


def test_a_token_that_looks_at_no_picture_is_drawn_dark():
    drawing = draw_heat(Image.new("RGB", (8, 8), "gray"), torch.zeros(2, 2), peak=0.0)
    assert drawing.getcolors() is not None
    assert len(drawing.getcolors()) == 1
