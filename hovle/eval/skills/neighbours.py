"""Names by the nearest of the pictures to learn from, in an image network's features: what is to be beaten."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torchvision.transforms import functional
from tqdm.auto import tqdm

from ...assets import teacher
from ...loading import load_in_order
from ...synthesis.naming import Naming
from .items import Item, picture_of

NETWORK, ASSET = "tf_efficientnet_lite0", "efficientnet-lite0"
"""timm's name of the network, and that of its weights among the assets."""

SIDE = 224
"""Pixels at which it sees a picture, as it was trained."""

AT_ONCE = 32
"""Pictures it describes together."""


class Neighbours:
    """An image network that describes pictures.

    Args:
        weights: File of its weights; by default they are fetched.
    """

    def __init__(self, weights: Path | None = None):
        import timm  # an extra: whoever distils has it

        network: Any = timm.create_model(NETWORK, pretrained=False)
        load_in_order(network, weights or teacher(name=ASSET))
        network.reset_classifier(0)
        self.network = network.eval()
        self.mean, self.std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]

    @torch.inference_mode()
    def features(self, pictures: Iterable[Image.Image], total: int) -> torch.Tensor:
        """Describe pictures, each by a vector; shape `(N, D)`."""
        found: list[torch.Tensor] = []
        waiting: list[torch.Tensor] = []
        for number, picture in enumerate(tqdm(pictures, total=total, desc=NETWORK, unit=" pictures", disable=None), 1):
            pixels = functional.to_tensor(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            waiting.append(functional.normalize(pixels, self.mean, self.std))
            if len(waiting) == AT_ONCE or number == total:
                found.append(self.network(torch.stack(waiting)))
                waiting.clear()
        return torch.cat(found)

    def names(self, skill: Naming, items: Sequence[Item], seed: int) -> list[str]:
        """Name held-out pictures of a skill by the nearest of all its drawings to learn from, each drawn once."""
        count = len(skill.drawings["train"])
        known: list[str] = []

        def learned() -> Iterable[Image.Image]:
            for index in range(count):
                sample = skill.draw(index, "train", seed)
                known.append(next(question.answer for question in sample.questions if question.kind == "name"))
                yield picture_of(sample.image)

        reference = self.features(learned(), count)
        asked = self.features((item.picture for item in items), len(items))
        center = reference.mean(dim=0)
        reference, asked = (nn.functional.normalize(vectors - center, dim=-1) for vectors in (reference, asked))
        return [known[place] for place in (asked @ reference.T).argmax(dim=-1).tolist()]
