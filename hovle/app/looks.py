"""Where each token of an answer looked, over each picture of the chat."""

from dataclasses import dataclass

import torch
from PIL import Image, ImageOps

from ..chat.conversation import Conversation
from ..chat.tiles import TilePlan
from ..eval.analyses.attention_reading import read_layers
from ..eval.analyses.grids import TokenGrid
from ..eval.analyses.model_under_test import ModelUnderTest

SIDE = 640
"""Longer side of a drawing in pixels."""

DARK, MIDDLE, BRIGHT = "#000004", "#bb3754", "#fcffa4"
"""Colours from no attention to the most; as matplotlib's inferno, which the figures of `hovle eval attention` have."""


@dataclass(frozen=True)
class Look:
    """Attention from each token of an answer to each image token, mean over heads and over the layers of a section."""

    tokens: list[str]
    """The answer's tokens."""
    maps: dict[str, torch.Tensor]
    """Section -> attention, shape `(A, S)`; S image tokens of all pictures in their order."""
    grids: dict[str, list[TokenGrid]]
    """Section -> how the image tokens lie over each picture."""

    @property
    def sections(self) -> list[str]:
        """Names of the sections, from the bottom up."""
        return list(self.maps)

    def masses(self, section: str) -> list[float]:
        """The share of each token's attention that falls on pictures, in 0..1."""
        return self.maps[section].sum(dim=1).tolist()

    def over_pictures(self, section: str, token: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """A token's attention over each picture and over its thumbnail, if it has one; shapes of `TokenGrid.split`."""
        grids = self.grids[section]
        parts = self.maps[section][token].split([grid.num_tokens for grid in grids])
        return [grid.split(part) for grid, part in zip(grids, parts, strict=True)]


def look(conversation: Conversation, model: str, plans: list[TilePlan]) -> Look:
    """Run the model over a conversation once more and read where the tokens of its last answer look.

    Args:
        conversation: With an answer, and at least one picture.
        model: What its model is called.
        plans: How each of its pictures is cut.
    """
    tested = ModelUnderTest(model, loaded=(conversation.model, conversation.processor))
    inputs = conversation.encode(conversation.messages[:-1])
    answer = torch.tensor(conversation.answer_ids, device=conversation.model.device)
    layers = read_layers(tested, inputs, answer)
    grids = [
        TokenGrid(
            columns=plan.grid.columns,
            rows=plan.grid.rows,
            side=round(plan.tokens_per_tile**0.5),
            has_thumbnail=plan.grid.has_thumbnail,
        )
        for plan in plans
    ]
    return Look(
        [tested.token_text(token) for token in conversation.answer_ids],
        {
            section.name: torch.stack([layer.answer_maps for layer in readings]).mean(dim=0).float().cpu()
            for section, readings in layers
        },
        {section.name: [tested.grid_of(section, grid) for grid in grids] for section, _ in layers},
    )


def draw_look(found: Look, section: str, token: int, pictures: list[Image.Image], names: list[str]) -> list[tuple]:
    """Draw where a token looks, over each picture and over the thumbnails of those that have one.

    Returns:
        Drawings with captions. The brightest colour is the token's largest weight on any picture.
    """
    parts = found.over_pictures(section, token)
    peak = max(float(part.max()) for both in parts for part in both if part is not None)
    drawn = []
    for picture, name, (body, thumbnail) in zip(pictures, names, parts, strict=True):
        drawn.append((draw_heat(picture, body, peak), f"{name}: {float(body.sum()):.1%}"))
        if thumbnail is not None:
            drawn.append((draw_heat(picture, thumbnail, peak), f"{name}, thumbnail: {float(thumbnail.sum()):.1%}"))
    return drawn


def draw_heat(picture: Image.Image, weights: torch.Tensor, peak: float) -> Image.Image:
    """Lay weights over a gray picture.

    Args:
        picture: The picture.
        weights: Shape `(rows, columns)`, spread evenly over it.
        peak: The weight that gets the brightest colour.
    """
    scale = SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    gray = ImageOps.grayscale(picture.resize(size, Image.Resampling.BICUBIC)).point(lambda value: 50 + value * 2 // 3)
    share = (weights / max(peak, 1e-12) * 255).round().clamp(0, 255).to(torch.uint8)
    heat = Image.fromarray(share.numpy()).resize(size, Image.Resampling.NEAREST)
    colours = ImageOps.colorize(heat, DARK, BRIGHT, MIDDLE)
    return Image.composite(colours, gray.convert("RGB"), heat.point(lambda value: 90 + value // 2))
