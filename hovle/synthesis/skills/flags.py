"""Flags of countries and regions: flat and waving ones to learn from, another style and distortions held out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from random import Random
from types import MappingProxyType

from PIL import Image

from ...files.documents import load_json
from ..naming import Drawing, Plates, is_validation
from ..samples import Question
from ..skill import fetched
from ..vector import rasterize
from .pictograms import FILES, GOOGLE, OPENMOJI, TWITTER

FLAG_ICONS = fetched("flag-icons")

UNNAMED = ("xx",)
"""Flags of nobody."""

SHARED = MappingProxyType(
    {
        "au": ("hm",),
        "fr": ("bl", "cp", "gf", "gp", "mf", "pm", "re", "wf", "yt"),
        "id": ("mc",),
        "io": ("dg",),
        "no": ("bv", "sj"),
        "ro": ("td",),
        "us": ("um",),
    }
)
"""Code -> codes of countries and regions that fly the same flag, or one that cannot be told from it."""

_FIRST_LETTER = 0x1F1E6
"""The code point that stands for A in flags."""


class Flags(Plates):
    """Flags."""

    name = "flags"
    description = "Flags of countries and regions; held out: the drawings of OpenMoji, and square, distorted ones."
    revision = 1
    sizes = MappingProxyType(
        {
            "small": MappingProxyType({"train": 300, "validation": 20, "test": 150}),
            "full": MappingProxyType({"train": 6000, "validation": 30, "test": 600}),
        }
    )
    held_out = ("drawing",)
    sources = (FLAG_ICONS, GOOGLE, TWITTER, OPENMOJI)
    extras = MappingProxyType({"resvg_py": "hovle[smol]"})
    noun = "flag"
    scales = (0.6, 0.98)

    @cached_property
    def countries(self) -> dict[str, dict]:
        """Code -> name, continent and more, of those with a flag of their own."""
        left_out = {*UNNAMED, *(code for others in SHARED.values() for code in others)}
        return {code: row for code, row in self._rows.items() if code not in left_out}

    @cached_property
    def _rows(self) -> dict[str, dict]:
        return {row["code"]: row for row in load_json(self.folders[FLAG_ICONS.asset] / "country.json")}

    @cached_property
    def drawings(self) -> Mapping[str, Sequence[Drawing]]:
        """Flat ones of 4 to 3 and waving ones to learn from."""
        flat = [self._drawing(f"{FLAG_ICONS.asset}/flags/4x3/{code}.svg", code) for code in self.countries]
        learned = [*flat, *self._emoji("google"), *self._emoji("twitter")]
        square = [
            replace(self._drawing(f"{FLAG_ICONS.asset}/flags/1x1/{code}.svg", code), is_distorted=True)
            for code in self.countries
        ]
        waving = [drawing for drawing in learned[len(flat) :] if is_validation(drawing.key)]
        return {
            "train": [drawing for drawing in learned if drawing not in waving],
            "validation": waving,
            "test": [*self._emoji("openmoji"), *square],
        }

    def _emoji(self, style: str) -> Iterator[Drawing]:
        source, pattern = FILES[style]
        for code in self.countries:
            if len(code) == 2:
                points = "-".join(f"{_FIRST_LETTER + ord(letter) - ord('a'):x}" for letter in code)
                points = points.upper() if style == "openmoji" else points
                key = f"{source.asset}/{pattern.format(points)}"
                if (self.folders[source.asset] / pattern.format(points)).exists():
                    yield self._drawing(key, code)

    def _drawing(self, key: str, code: str) -> Drawing:
        country = self.countries[code]
        style = key.partition("/")[0]
        aliases = tuple(self._rows[other]["name"] for other in SHARED.get(code, ()) if other in self._rows)
        return Drawing(key, style, country["name"], aliases, country.get("continent"), country.get("continent", ""))

    def render(self, drawing: Drawing, extent: int) -> Image.Image:
        """Read or rasterize the file of a flag."""
        asset, _, file = drawing.key.partition("/")
        path = self.folders[asset] / file
        if path.suffix == ".svg":
            return rasterize(path.read_bytes(), 2 * extent)
        with Image.open(path) as image:
            return image.convert("RGBA")

    def ask_name(self, rng: Random) -> str:
        """A question for the name."""
        return rng.choice(
            ("Whose flag is this?", "Which flag is this?", "What flag is shown?", "Name the country or region.")
        )

    def ask_whether(self, name: str, rng: Random) -> str:
        """A question whether this is the name."""
        wording = rng.choice(("Is this the flag of {}?", "Does the picture show the flag of {}?"))
        return wording.format(name)

    def ask_category(self, drawing: Drawing, rng: Random) -> Question:
        """A question for the continent."""
        assert drawing.category is not None
        wording = rng.choice(("On which continent is it?", "Which continent does the flag belong to?"))
        return Question(wording, drawing.category, "category")

    def caption(self, drawing: Drawing, ink: str | None, rng: Random) -> str:
        """One sentence about the picture."""
        return rng.choice(("The flag of {}.", "This is the flag of {}.", "A flag, that of {}.")).format(drawing.name)
