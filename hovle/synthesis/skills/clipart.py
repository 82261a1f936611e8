"""Clip art: drawings of things in the hands of many people, named by their titles."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from html import unescape
from pathlib import Path
from types import MappingProxyType

from PIL import Image

from ..naming import Drawing, Naming, is_validation
from ..skill import fetched
from ..vector import rasterize
from ..words import WORDNET, WordNet

OPENCLIPART = fetched("openclipart-svg")

FOLDER = "usr/share/openclipart/svg"

CATEGORIES = MappingProxyType(
    {
        "animals": "animal",
        "buildings": "building",
        "containers": "container",
        "education": "education",
        "electronics": "electronics",
        "food": "food or drink",
        "office": "office",
        "people": "person or clothing",
        "plants": "plant",
        "recreation": "sport, game or music",
        "science": "science",
        "tools": "tool",
        "transportation": "vehicle",
    }
)
"""Folders with drawings of things -> what these are; the others hold icons of programs, ornaments and symbols."""

_PUBLIC_DOMAIN = re.compile(r'license[^>]*rdf:resource="[^"]*(?:PublicDomain|publicdomain)/?"')

_MOST_WORDS, _MOST_OF_ONE_NAME = 3, 15
"""Of a name; and drawings of one title, which above that is the name of a collection."""

_TITLE_ENDS = """
    icon icons clipart symbol symbols sign drawing picture image logo outline silhouette bw color colour colored black
    white example collection remix version simple architetto generic an the
"""
_WORDS_TO_DROP = frozenset(_TITLE_ENDS.split())
"""Words of titles that do not tell what is drawn."""

_FAMILY_NAMES = re.compile(r"\b(?:by|from)\b.*$")


class ClipArt(Naming):
    """Clip art."""

    name = "clipart"
    description = "Clip art of things, by many hands; held out: further drawings of the same things."
    revision = 2
    sizes = MappingProxyType(
        {
            "small": MappingProxyType({"train": 300, "validation": 30, "test": 100}),
            "full": MappingProxyType({"train": 8000, "validation": 60, "test": 500}),
        }
    )
    held_out = ("drawing",)
    sources = (OPENCLIPART, WORDNET)
    extras = MappingProxyType({"resvg_py": "hovle[smol]"})
    noun = "drawing"
    scales = (0.7, 0.98)

    @cached_property
    def drawings(self) -> Mapping[str, Sequence[Drawing]]:
        """Of things with several drawings one is tested on; few of the rest are for validation."""
        by_name: dict[str, list[Drawing]] = {}
        for drawing in self._found():
            by_name.setdefault(drawing.name, []).append(drawing)
        test = [found[-1] for found in by_name.values() if len(found) > 1]
        rest = [drawing for found in by_name.values() for drawing in (found[:-1] if len(found) > 1 else found)]
        several = Counter(drawing.name for drawing in rest)
        validation = [drawing for drawing in rest if several[drawing.name] > 1 and is_validation(drawing.key)]
        return {
            "train": [drawing for drawing in rest if drawing not in validation],
            "validation": validation,
            "test": test,
        }

    def _found(self) -> list[Drawing]:
        nouns = WordNet(self.folders[WORDNET.asset]).nouns
        folder = self.folders[OPENCLIPART.asset] / FOLDER
        listed = (drawing for kind in CATEGORIES for drawing in _drawings(folder, kind, nouns))
        found = list({_shapes((folder / drawing.key).read_bytes()): drawing for drawing in listed}.values())
        counts = Counter(drawing.name for drawing in found)
        return [drawing for drawing in found if counts[drawing.name] <= _MOST_OF_ONE_NAME]

    def render(self, drawing: Drawing, extent: int) -> Image.Image:
        """Rasterize the file of a drawing."""
        path = self.folders[OPENCLIPART.asset] / FOLDER / drawing.key
        return rasterize(path.read_bytes(), 2 * extent)


def _drawings(folder: Path, kind: str, nouns: frozenset[str]) -> Iterator[Drawing]:
    """Drawings of a folder that are free and named."""
    for path in sorted((folder / kind).rglob("*.svg")):
        key = path.relative_to(folder).as_posix()
        text = path.read_bytes().decode("utf-8", errors="replace")
        title = re.search(r"<dc:title>(.*?)</dc:title>", text, re.DOTALL)
        name = plain_title(title.group(1), nouns) if title else None
        if name is not None and key not in UNDRAWABLE and _PUBLIC_DOMAIN.search(text):
            keywords = tuple(word.strip() for word in re.findall(r"<rdf:li>([^<]+)</rdf:li>", text) if word.strip())
            group = path.parent.relative_to(folder).as_posix()
            yield Drawing(key, "openclipart", name, (), CATEGORIES[kind], group, keywords)


def _shapes(svg: bytes) -> bytes:
    """What is equal for drawings that differ in what is said about them only, such as copies in two folders."""
    return b"".join(re.findall(rb'\bd="[^"]*"', svg)) or svg


def plain_title(title: str, nouns: frozenset[str]) -> str | None:
    """What a title says is drawn, None where it is no English name of a thing.

    Args:
        title: As the drawing has it, such as `Old car (2)`.
        nouns: English nouns of one or more words.
    """
    text = unescape(title).lower().replace("_", " ").rpartition(" - ")[2]
    text = _FAMILY_NAMES.sub("", re.sub(r"\([^)]*\)", "", text))
    words = [word for word in re.findall(r"[a-z']+", text) if word not in _WORDS_TO_DROP]
    if not words or len(words) > _MOST_WORDS or not text.isascii():
        return None
    name = " ".join(words)
    is_thing = any(form in nouns for form in (name, name.removesuffix("s"), words[-1], words[-1].removesuffix("s")))
    are_words = all(
        len(word) > 1 and (word in nouns or word.removesuffix("s") in nouns or word in _OTHER_WORDS) for word in words
    )
    return name if is_thing and are_words and name not in _NO_NAMES else None


_MODIFIERS = """
    old big small little round open wooden electric of with in on young flying cartoon sleeping french red green blue
    yellow
"""
_OTHER_WORDS = frozenset(_MODIFIERS.split())
"""Words of names that are no nouns."""

_NO_NAMES = frozenset(
    (
        "abracadabra", "adult", "advertising", "air", "ak", "al bar", "as pique", "autos", "az lizard", "baby tux",
        "bad guy fr", "ball form", "boating rules illustration", "body part", "cartes", "cassette video",
        "celtic vine corner", "chateau", "chemical science experience", "city horizon", "contour chipmunk",
        "creation day number", "cymru flag", "dodge neon", "dossier", "double note two", "dream flower", "easter",
        "empty tomb", "enthusiast", "eris", "eris apple", "etiquette", "evergreen with highlights", "female",
        "fireman alarm", "fireman wedding", "full bloom", "gateau", "gender", "golf", "hide girl",
        "interstate highway", "jack", "jazz", "jibe diagram", "leone", "liberty", "lotas", "male", "man crystal",
        "mascot", "menu clip art", "mm gun", "mobile", "ninja tux", "old hanging", "olivier one", "one way", "open",
        "panel", "park", "parking", "pin red", "plush tux", "points of sail", "pong", "profile", "rana", "reaching",
        "reed", "reunion", "running free", "school in fall", "seagull contour", "self portrait", "signore",
        "signorina", "silvia", "slate apple", "sport", "stop right font", "stripper", "tamerlane chess",
        "thanksgiving spread", "three eyes", "tile orange", "tree whit fruits", "tux", "tux head", "upright",
    )
)  # fmt: skip
"""Titles that pass for names and are none: of other languages, brands and people, of what cannot be seen."""

UNDRAWABLE = frozenset(
    (
        "animals/birds/duck_yellow_ii_kurt_cagl_.svg",
        "animals/birds/penguin/tux_didier_fabert_01.svg",
        "electronics/bulb/light_bulb_karl_bartel_01.svg",
        "office/large_braces.svg_amos_01.svg",
        "recreation/sports/badminton_racket_brice_b_01.svg",
    )
)
"""Files that show nothing."""
