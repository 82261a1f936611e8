"""What a new patch stem looks for before it has learnt anything: edges, waves and colors at places of a token.

A stem drawn at random mixes all pixels of a token in each number, and letters are learnt from it late: nothing in it
shares weights between places, so each place has to find out by itself that an edge is an edge. Here the first layer
with a nonlinearity begins as windowed cosine waves on a grid of places, brought to about the same size by what
pictures have of each frequency. All of it is learnt further.
"""

import itertools
import math
from typing import Any

import torch

WINDOW = 8
"""Side of a filter in pixels, where places are no further apart."""

MOST_PLACES, STEP = 6, 4
"""Along each side of a token, at most; pixels from one to the next, at least."""

FEWEST_WAVES = 8
"""At each place, where the width has room for them: others get fewer places."""

COLOR_WAVES = ((1, 0, 0), (2, 0, 0), (1, 0, 1), (1, 1, 0))
"""Of each place's filters as (color, row frequency, column frequency); all others see luminance."""

GAIN = (0.2, 0.4, 0.4)
"""By color. Responses to normalised pixels fall as 7.5 / (frequency + 0.6), those to colors as about 3: measured on
pages of text, with waves of length 1."""

SPREAD = 1.5
"""Deviation of what enters the nonlinearity."""

GELU_MEAN, GELU_STD = 0.499, 0.895
"""Of GELU of normal numbers with that deviation."""


@torch.no_grad()
def start_stem(model: Any) -> None:
    """Give the stem of a new model its first filters; one that joins no patches, or after the layers, keeps its own.

    Args:
        model: A `HoVLEModel` with the language model's text table in place; its stem is changed in place.
    """
    config = model.config
    if config.pixel_shuffle_loc != "pre" or config.num_channels != len(GAIN):
        return
    patch, factor = config.patch_size, config.shuffle_factor
    projection, projector = model.patch_embedding.projection, model.projector
    width = projection.weight.shape[0]
    waves = patch_waves(patch, width)  # (D, C, patch, patch): all there is in a patch, or its low frequencies
    put(projection, waves.new_zeros(width, *waves.shape[1:]))
    projection.weight[: len(waves)].copy_(waves)
    wanted = token_filters(patch * factor, width).unflatten(-1, (factor, patch)).unflatten(-3, (factor, patch))
    per_patch = torch.einsum("dcypxq,wcpq->dyxw", wanted, waves)  # as sums of a patch's waves
    first = wanted.new_zeros(width, factor, factor, width)
    first[..., : len(waves)] = per_patch
    put(projector.linear_1, first.flatten(1))
    embeds = model.get_input_embeddings().weight.float()
    second = torch.randn(width, width) * embeds.std().item() / (GELU_STD * math.sqrt(width))
    put(projector.linear_2, second, -GELU_MEAN * second.sum(dim=1))


def put(layer: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Set weights and biases, without one to 0."""
    layer.weight.copy_(weight)
    layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)


def patch_waves(side: int, count: int) -> torch.Tensor:
    """Cosine waves over a patch, orthogonal and of length 1, lowest first; shape `(count or all, 3, side, side)`.

    Colors come last among equals, since pictures have less of them.
    """
    order = sorted(
        itertools.product(range(len(GAIN)), range(side), range(side)),
        key=lambda wave: (1 + 2 * (wave[0] > 0)) * math.hypot(wave[1], wave[2]),
    )
    lines = cosines(side)
    return torch.stack([wave_filter(wave, lines) for wave in order[:count]])


def token_filters(side: int, count: int) -> torch.Tensor:
    """Windowed waves at places of a token, every other one upside down; shape `(count, 3, side, side)`.

    What is left after the last whole set sees nothing yet.
    """
    places = max(1, min(MOST_PLACES, 1 + (side - WINDOW) // STEP, math.isqrt(count // FEWEST_WAVES)))
    window = min(side, max(WINDOW, math.ceil(side / places)))
    starts = [round(place * (side - window) / max(1, places - 1)) for place in range(places)]
    waves = waves_of_a_place(window, count // places**2)
    lines = cosines(window) * torch.hann_window(window + 2, periodic=False)[1:-1].sqrt()
    filters = torch.zeros(count, len(GAIN), side, side)
    numbers = itertools.product(enumerate(starts), enumerate(starts), enumerate(waves))
    for number, ((row, top), (column, left), (kind, wave)) in enumerate(numbers):
        color, *frequency = wave
        shape = wave_filter(wave, lines)
        if any(frequency):
            shape = shape - shape.mean(dim=(1, 2), keepdim=True)
        sign = 1 if (row + column + kind) % 2 else -1
        gain = SPREAD * GAIN[color] * (math.hypot(*frequency) + 0.6) * WINDOW / window
        filters[number, :, top : top + window, left : left + window] = sign * gain * shape
    return filters


def waves_of_a_place(window: int, count: int) -> list[tuple[int, int, int]]:
    """So many filters of a place, or all there are, as (color, row frequency, column frequency)."""
    frequencies = sorted(itertools.product(range(window), range(window)), key=lambda pair: math.hypot(*pair))
    gray = [(0, row, column) for row, column in frequencies]
    colored = [(color, row, column) for row, column in frequencies for color in (1, 2)]
    first = (*gray[: max(1, count - len(COLOR_WAVES))], *COLOR_WAVES)
    return [*first, *(wave for wave in colored if wave not in COLOR_WAVES)][:count]


def cosines(side: int) -> torch.Tensor:
    """Waves along a line by their frequency, shape `(side, side)`."""
    places = torch.arange(side) + 0.5
    return torch.cos(math.pi * places * torch.arange(side)[:, None] / side)


def wave_filter(wave: tuple[int, int, int], lines: torch.Tensor) -> torch.Tensor:
    """A wave of (color, row frequency, column frequency) with length 1, shape `(3, side, side)`."""
    color, row, column = wave
    channels = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])[color]
    filters = channels[:, None, None] * lines[row][:, None] * lines[column]
    return filters / filters.norm()
