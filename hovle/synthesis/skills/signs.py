"""Traffic signs: one shape of each sign to learn from, other shapes of it held out, and all of them distorted."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from random import Random
from types import MappingProxyType

from PIL import Image

from ..english import with_article
from ..naming import Drawing, Plates
from ..skill import fetched
from ..vector import rasterize

MAPILLARY = fetched("mapillary-sprite-source")

CATEGORIES = MappingProxyType(
    {
        "regulatory": "regulatory sign",
        "warning": "warning sign",
        "information": "information sign",
        "complementary": "additional sign",
    }
)


class Signs(Plates):
    """Traffic signs."""

    name = "signs"
    description = "Traffic signs of many countries; held out: other shapes of the same signs, and distortions of all."
    revision = 1
    sizes = MappingProxyType(
        {
            "small": MappingProxyType({"train": 300, "validation": 40, "test": 150}),
            "full": MappingProxyType({"train": 10_000, "validation": 150, "test": 2000}),
        }
    )
    held_out = ("drawing",)
    sources = (MAPILLARY,)
    extras = MappingProxyType({"resvg_py": "hovle[smol]"})
    noun = "sign"
    scales = (0.55, 0.98)

    @cached_property
    def drawings(self) -> Mapping[str, Sequence[Drawing]]:
        """Of signs with several shapes the last one is tested on, of those with four or more the last but one is for
        validation; all others are learned from, and tested on when distorted."""
        shapes: dict[tuple[str, str], list[Drawing]] = {}
        for path in sorted((self.folders[MAPILLARY.asset] / "package_signs").glob("*.svg"), key=_order):
            drawing = _drawing(path.stem)
            shapes.setdefault((drawing.name, drawing.group), []).append(drawing)
        test = [found[-1] for found in shapes.values() if len(found) > 1]
        validation = [found[-2] for found in shapes.values() if len(found) > 3]
        held = {drawing.key for drawing in (*test, *validation)}
        train = [drawing for found in shapes.values() for drawing in found if drawing.key not in held]
        seen = [replace(found[0], is_distorted=True) for found in shapes.values()]
        return {"train": train, "validation": validation, "test": [*test, *seen]}

    def render(self, drawing: Drawing, extent: int) -> Image.Image:
        """Rasterize the file of a sign."""
        path = self.folders[MAPILLARY.asset] / "package_signs" / f"{drawing.key}.svg"
        return rasterize(path.read_bytes(), 2 * extent)

    def ask_name(self, rng: Random) -> str:
        """A question for the name."""
        return rng.choice(
            ("What sign is this?", "What does the sign mean?", "Which traffic sign is shown?", "Name the sign.")
        )

    def ask_whether(self, name: str, rng: Random) -> str:
        """A question whether this is the name."""
        wording = rng.choice(('Is this the sign "{}"?', 'Does the sign mean "{}"?', 'Is it a "{}" sign?'))
        return wording.format(name)

    def caption(self, drawing: Drawing, ink: str | None, rng: Random) -> str:
        """One sentence about the picture."""
        kind = with_article(drawing.category or "sign")
        return rng.choice((f"A traffic sign: {drawing.name}.", f"{kind.capitalize()} that means {drawing.name}."))


def _order(path: Path) -> tuple[str, int]:
    stem, _, shape = path.stem.rpartition("--g")
    return stem, int(shape)


def _drawing(stem: str) -> Drawing:
    kind, _, rest = stem.partition("--")
    name = " ".join(re.sub(r"--g\d+$", "", rest).replace("--", "-").split("-"))
    return Drawing(stem, "mapillary", name, (), CATEGORIES[kind], kind)
