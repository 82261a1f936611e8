"""Pictograms: emoji in three drawing styles to learn from and a fourth one to be tested on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from ...files.documents import load_json
from ..naming import Drawing, Naming, is_validation
from ..skill import Source, fetched
from ..vector import rasterize

LEARNED = ("train", "validation")

GOOGLE = fetched("emoji-datasource-google", LEARNED)
TWITTER = fetched("emoji-datasource-twitter", LEARNED)
FLUENT = fetched("fluent-emoji-3d", LEARNED)
OPENMOJI = fetched("openmoji", ("test",))
NAMES = fetched("emojibase-data")

FILES: Mapping[str, tuple[Source, str]] = MappingProxyType(
    {
        "google": (GOOGLE, "img/google/64/{}.png"),
        "twitter": (TWITTER, "img/twitter/64/{}.png"),
        "fluent": (FLUENT, "assets/{}.webp"),
        "openmoji": (OPENMOJI, "color/svg/{}.svg"),
    }
)
"""Style -> what brings it, and where a drawing lies by its code points."""

HELD_OUT_STYLE = "openmoji"

CATEGORIES = MappingProxyType(
    {
        "Smileys & Emotion": "face or emotion",
        "People & Body": "person or body part",
        "Animals & Nature": "animal or plant",
        "Food & Drink": "food or drink",
        "Travel & Places": "travel or place",
        "Activities": "activity",
        "Objects": "object",
        "Symbols": "symbol",
    }
)
"""Unicode's groups in plain words; flags are a skill of their own."""


@dataclass(frozen=True)
class Emoji:
    """What there are drawings of."""

    code: str
    """Code points in small hexadecimal digits, without those that choose between text and picture."""
    name: str
    aliases: tuple[str, ...]
    category: str
    group: str
    tags: tuple[str, ...]


def plain_code(code: str) -> str:
    """Code points as all packages could write them: they differ in which they leave out."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


_PLAIN_QUOTES = str.maketrans({"\u2019": "'", "\u201c": None, "\u201d": None})


def plain_name(label: str) -> str:
    """A label of Unicode as one would say it."""
    text = label.lower().translate(_PLAIN_QUOTES)
    kind, colon, rest = text.partition(": ")
    if not colon:
        return text
    if "hair" in rest or "beard" in rest or rest == "bald":
        return f"bald {kind}" if rest == "bald" else f"{kind} with {'a ' if rest == 'beard' else ''}{rest}"
    return f"{kind} {rest}".replace(", ", " ") if kind in ("keycap",) else kind


class Pictograms(Naming):
    """Emoji."""

    name = "pictograms"
    description = "Emoji as Google, Twitter and Fluent draw them: names and kinds; held out: the drawings of OpenMoji."
    revision = 1
    sizes = MappingProxyType(
        {
            "small": MappingProxyType({"train": 600, "validation": 60, "test": 200}),
            "full": MappingProxyType({"train": 25_000, "validation": 250, "test": 2000}),
        }
    )
    held_out = ("style", "drawing")
    sources = (GOOGLE, TWITTER, FLUENT, OPENMOJI, NAMES)
    extras = MappingProxyType({"resvg_py": "hovle[smol]"})
    noun = "pictogram"

    @cached_property
    def emoji(self) -> tuple[Emoji, ...]:
        """All that are no flags, without the variants of skin tone."""
        labels = {plain_code(item["hexcode"]): item for item in load_json(self.folders[NAMES.asset] / "en/data.json")}
        rows = load_json(self.folders[GOOGLE.asset] / "emoji.json")
        found = [
            _emoji(row, labels[plain_code(row["unified"])])
            for row in sorted(rows, key=lambda row: row["unified"])
            if row["category"] in CATEGORIES and plain_code(row["unified"]) in labels
        ]
        return tuple(_without_shared_names(found))

    def files(self, style: str) -> dict[str, Path]:
        """Code -> file of a style's drawing."""
        source, pattern = FILES[style]
        folder = (self.folders[source.asset] / pattern).parent
        return {plain_code(path.stem): path for path in sorted(folder.glob(f"*{Path(pattern).suffix}"))}

    @cached_property
    def _files(self) -> dict[str, dict[str, Path]]:
        return {style: self.files(style) for style in FILES}

    @cached_property
    def drawings(self) -> Mapping[str, Sequence[Drawing]]:
        """Of three styles all but a few to learn from; of the fourth those of things that can be learned."""
        learned = [drawing for style in FILES if style != HELD_OUT_STYLE for drawing in self._drawings(style)]
        known = {drawing.name for drawing in learned if not is_validation(drawing.key)}
        return {
            "train": [drawing for drawing in learned if not is_validation(drawing.key)],
            "validation": [drawing for drawing in learned if is_validation(drawing.key) and drawing.name in known],
            "test": [drawing for drawing in self._drawings(HELD_OUT_STYLE) if drawing.name in known],
        }

    def _drawings(self, style: str) -> Iterator[Drawing]:
        for item in self.emoji:
            if item.code in self._files[style]:
                key = f"{style}/{item.code}"
                yield Drawing(key, style, item.name, item.aliases, item.category, item.group, item.tags)

    def render(self, drawing: Drawing, extent: int) -> Image.Image:
        """Read or rasterize the file of a drawing."""
        style, _, code = drawing.key.partition("/")
        path = self._files[style][code]
        if path.suffix == ".svg":
            return rasterize(path.read_bytes(), 2 * extent)
        with Image.open(path) as image:
            return image.convert("RGBA")


def _emoji(row: Mapping[str, Any], label: Mapping[str, Any]) -> Emoji:
    name = plain_name(label["label"])
    others = [plain_name(row["name"]), *(short.replace("_", " ").replace("-", " ") for short in row["short_names"])]
    aliases = tuple(dict.fromkeys(other for other in others if other != name))
    tags = tuple(tag.lower() for tag in label.get("tags", ()))
    return Emoji(plain_code(row["unified"]), name, aliases, CATEGORIES[row["category"]], row["subcategory"], tags)


def _without_shared_names(items: Sequence[Emoji]) -> Iterator[Emoji]:
    """One thing for each name: what is left of a label may name several, such as families."""
    seen: set[str] = set()
    for item in items:
        if item.name not in seen:
            seen.add(item.name)
            yield item
