"""Icons of user interfaces: three sets to learn from and a fourth one to be tested on."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from random import Random
from types import MappingProxyType

from PIL import Image

from ...files.documents import load_json
from ..cutouts import show, tint
from ..english import as_sentence, with_article
from ..looks import draw_looks
from ..naming import Drawing, Naming, Shown, is_validation
from ..skill import fetched
from ..vector import rasterize

LEARNED = ("train", "validation")

MDI = fetched("mdi-svg", LEARNED)
TABLER = fetched("tabler-icons", LEARNED)
PHOSPHOR = fetched("phosphor-icons", LEARNED)
LUCIDE = fetched("lucide-static", ("test",))

PHOSPHOR_WEIGHTS = ("regular", "bold", "fill", "light", "duotone")
"""Without `thin`, whose strokes vanish in small pictures."""

CATEGORIES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("Arrow", "Arrows", "ARROWS"), "arrow"),
        **dict.fromkeys(("Animal", "Animals"), "animal"),
        **dict.fromkeys(("Food / Drink", "Food"), "food or drink"),
        **dict.fromkeys(("Weather", "WEATHER"), "weather"),
        **dict.fromkeys(("Account / User", "People / Family", "PEOPLE"), "person"),
        **dict.fromkeys(("Files / Folders", "Document"), "file or document"),
        **dict.fromkeys(("Sport",), "sport"),
        **dict.fromkeys(("Medical / Hospital", "Health", "HEALTH"), "health"),
        **dict.fromkeys(("Transportation + Road", "Transportation + Flying", "Transportation + Water"), "vehicle"),
        **dict.fromkeys(("Vehicles",), "vehicle"),
        **dict.fromkeys(("Banking", "Currency", "Currencies"), "money"),
        **dict.fromkeys(("Date / Time",), "time"),
        **dict.fromkeys(("Buildings", "Places"), "building"),
        **dict.fromkeys(("Math",), "mathematics"),
        **dict.fromkeys(("Shape", "Shapes"), "shape"),
        **dict.fromkeys(("Battery",), "battery"),
        **dict.fromkeys(("Gaming / RPG", "Games", "GAMES"), "game"),
        **dict.fromkeys(("Emoji", "Mood"), "face or emotion"),
    }
)
"""Kinds that the sets tell, where they mean the same thing, in plain words."""

NAME = ("What is this icon?", "What does the icon show?", "Name the icon.", "What is shown here?", "What is this?")

_STYLE_WORDS = ("outline", "filled", "fill", "variant")
"""Ends of names that tell how, not what is drawn."""

_COUNTED = ("heading", "number", "numeric", "battery", "dice", "clock", "hour", "square", "circle", "hexagon", "box")
"""Words after which a number tells what is drawn, and not which of several drawings it is."""

_PHOSPHOR_ENTRY = (
    r'name: "([^"]+)",\s*pascal_name: "[^"]+",'
    r'(?:\s*alias: \{\s*name: "([^"]+)".*?\},)?'
    r"\s*categories: \[(.*?)\]"
)
"""Name, alias if any, and categories in the module that lists the icons."""

_MOST_WORDS = 3

_SHARED_TWICE = 2
"""How often a drawing is listed whose name is in several sets; others once."""


def plain_name(name: str) -> str:
    """The name of an icon as words."""
    words = name.lower().replace("_", "-").split("-")
    while len(words) > 1 and (words[-1] in _STYLE_WORDS or (words[-1].isdecimal() and words[-2] not in _COUNTED)):
        words.pop()
    return " ".join(words)


class Icons(Naming):
    """Icons of user interfaces."""

    name = "icons"
    description = "User-interface icons of three sets in many colors: what they show; held out: the set Lucide."
    revision = 2
    sizes = MappingProxyType(
        {
            "small": MappingProxyType({"train": 600, "validation": 60, "test": 200}),
            "full": MappingProxyType({"train": 25_000, "validation": 250, "test": 1500}),
        }
    )
    held_out = ("style", "drawing")
    sources = (MDI, TABLER, PHOSPHOR, LUCIDE)
    extras = MappingProxyType({"resvg_py": "hovle[smol]"})
    noun = "icon"
    scales = (0.5, 0.95)

    @cached_property
    def drawings(self) -> Mapping[str, Sequence[Drawing]]:
        """Of three sets all but a few to learn from; of the fourth those whose name can be learned."""
        found = [*self._mdi(), *self._tabler(), *self._phosphor()]
        learned = [drawing for drawing in found if len(drawing.name.split()) <= _MOST_WORDS]
        train = [drawing for drawing in learned if not is_validation(drawing.key)]
        sets: dict[str, set[str]] = {}
        for drawing in train:
            sets.setdefault(drawing.name, set()).add(drawing.style)
        return {
            "train": [item for item in train for _ in range(_SHARED_TWICE if len(sets[item.name]) > 1 else 1)],
            "validation": [item for item in learned if is_validation(item.key) and item.name in sets],
            "test": list(self._lucide(train)),
        }

    def _mdi(self) -> Iterator[Drawing]:
        for item in load_json(self.folders[MDI.asset] / "meta.json"):
            if "Brand / Logo" in item["tags"] or item["deprecated"]:
                continue
            key = f"{MDI.asset}/svg/{item['name']}.svg"
            yield _drawing(key, "mdi", item["name"], item["aliases"], item["tags"])

    def _tabler(self) -> Iterator[Drawing]:
        for item in load_json(self.folders[TABLER.asset] / "icons.json").values():
            if item["category"] != "Brand":
                for style in item["styles"]:
                    key = f"{TABLER.asset}/icons/{style}/{item['name']}.svg"
                    yield _drawing(key, "tabler", item["name"], (), [item["category"]], item["tags"])

    def _phosphor(self) -> Iterator[Drawing]:
        text = (self.folders[PHOSPHOR.asset] / "dist/index.mjs").read_text(encoding="utf-8")
        found = re.findall(_PHOSPHOR_ENTRY, text, re.DOTALL)
        if not found:
            raise ValueError(f"{PHOSPHOR.package}: dist/index.mjs lists no icons in the form that is known here.")
        for name, alias, kinds in found:
            categories = [kind.strip().removeprefix("e.") for kind in kinds.split(",")]
            if "BRAND" in categories:
                continue
            for weight in PHOSPHOR_WEIGHTS:
                file = name if weight == "regular" else f"{name}-{weight}"
                key = f"{PHOSPHOR.asset}/assets/{weight}/{file}.svg"
                yield _drawing(key, "phosphor", name, [alias] if alias else [], categories)

    def _lucide(self, train: Iterable[Drawing]) -> Iterator[Drawing]:
        """Icons by a name that is known from training; a drawing under several names has the others as aliases."""
        known: dict[str, set[str]] = {}
        kinds: dict[str, Counter[str]] = {}
        for drawing in train:
            known.setdefault(drawing.name, set()).update(drawing.aliases)
            if drawing.category:
                kinds.setdefault(drawing.name, Counter())[drawing.category] += 1
        tags = load_json(self.folders[LUCIDE.asset] / "tags.json")
        same: dict[str, list[Path]] = {}
        for path in sorted((self.folders[LUCIDE.asset] / "icons").glob("*.svg")):
            same.setdefault(re.sub(r"<!--.*?-->|class=\"[^\"]*\"", "", path.read_text(encoding="utf-8")), []).append(
                path
            )
        for paths in same.values():
            names = [plain_name(path.stem) for path in paths]
            learned = [name for name in names if name in known]
            if learned:
                aliases = {*names, *(alias for name in learned for alias in known[name])} - {learned[0]}
                category = kinds[learned[0]].most_common(1)[0][0] if learned[0] in kinds else None
                words = tuple(tag for path in paths for tag in tags.get(path.stem, ()))
                key = f"{LUCIDE.asset}/icons/{paths[0].name}"
                yield Drawing(key, "lucide", learned[0], tuple(sorted(aliases)), category, "", words)

    def render(self, drawing: Drawing, extent: int) -> Image.Image:
        """Rasterize the file of a drawing, whose ink has no color of its own."""
        asset, _, file = drawing.key.partition("/")
        return rasterize((self.folders[asset] / file).read_bytes(), extent)

    def picture(self, drawing: Drawing, rng: Random) -> Shown:
        """The icon in one color, on a ground of another."""
        looks = draw_looks(rng)
        image, box = show(tint(self.cutout(drawing, rng), looks.ink), self.canvas, rng, looks.ground)
        return image, box, looks.ink_name

    def ask_name(self, rng: Random) -> str:
        """A question for the name."""
        return rng.choice(NAME)

    def ask_whether(self, name: str, rng: Random) -> str:
        """A question whether this is the name."""
        wording = rng.choice(("Is this {} icon?", "Does the picture show {} icon?", "Is it {} icon?"))
        return wording.format(with_article(name))

    def caption(self, drawing: Drawing, ink: str | None, rng: Random) -> str:
        """One sentence about the picture."""
        what = f"{ink} {drawing.name} icon" if ink else f"{drawing.name} icon"
        return as_sentence(rng.choice(("{}", "a picture of {}", "this is {}")).format(with_article(what)))


def _drawing(
    key: str, style: str, name: str, aliases: Iterable[str], kinds: Sequence[str], tags: Iterable[str] = ()
) -> Drawing:
    plain = plain_name(name)
    others = tuple(dict.fromkeys(other for other in map(plain_name, aliases) if other != plain))
    category = next((CATEGORIES[kind] for kind in kinds if kind in CATEGORIES), None)
    group = f"{style}/{kinds[0]}" if kinds else ""
    return Drawing(key, style, plain, others, category, group, tuple(map(str, tags)))
