"""Furniture of Sweet Home 3D: what there is, under which names, and its models."""

import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np

from .meshes import Mesh, read_obj, turned

PEOPLE = re.compile(r"\b(male|female|boy|girl)\b", re.IGNORECASE)

LEFT_OUT = frozenset(
    """
    arrow straight ahead|arrow turn right|arrow turn right and ahead|parking slot|pedestrian crossing|concrete sidewalk
    rails|rail crossing|contemporary living room|card game|children game|kitchen tools|tool|technical table|screen
    island extension|clear sofa|entry speech unit|entry bell ring|mp3 base|mp3 station|stone grill device
    air conditioning - external unit|lower cabinet|upper cabinet|class seat|fitness tower|flacon|barnum|frame
    """.replace("\n", "|")
    .replace("    ", "")
    .split("|")
)
"""Names that are no names of one thing, or whose things cannot be told by their looks."""

RENAMED = MappingProxyType(
    {
        "air conditioning - internal unit": "air conditioner", "apple ibook": "laptop", "apple imac 1998": "computer",
        "apple imac 2004": "computer", "apple iphone": "mobile phone", "bended coconut tree": "coconut tree",
        "bike": "bicycle", "bill 10€": "banknote", "bill 20€": "banknote", "bill 50€": "banknote", "car model": "car",
        "chevrolet": "car", "clothes washing machine": "washing machine", "concept sedan 01": "car",
        "concept sedan 02": "car", "concept sedan 02 sport": "car", "convertible sofa bz": "sofa bed",
        "couch": "sofa", "ford focus": "car", "fridge": "refrigerator", "gaz water heater": "water heater",
        "electric water heater": "water heater", "hashtray": "ashtray", "induction cooker 2 zones": "cooktop",
        "induction cooker 4 zones": "cooktop", "large fridge": "refrigerator", "mocassin": "moccasin",
        "opened convertible sofa bz": "sofa bed", "peugeot 308 cc": "car", "playstation": "game console",
        "plate, glass and cutlery": "place setting", "plate, glasses and cutlery": "place setting",
        "renault scenic": "car", "seat leon": "car", "smart car": "car", "sofa 2 seats": "sofa",
        "sofa 3 seats": "sofa", "teck chair": "teak chair",
        "toilets unit": "toilet", "trunck": "trunk", "tv": "television",
        "tv 16:9": "television", "tv remote control": "remote control", "vw new beetle": "car",
        "wall flat tv": "television", "yamaha yzr r6": "motorbike", "little plant": "plant", "indoor plant": "plant",
        "little lamp": "lamp", "motorbike": "motorbike", "hot dog": "hot dog", "clothes horse": "clothes rack",
        "siamese cat": "cat", "bulldog": "dog", "phone": "telephone", "wireless phone": "telephone",
        "mower": "lawn mower", "balance": "scale", "puff": "pouf", "gift": "gift box",
    }
)  # fmt: skip
"""Name in the catalog, in small letters -> what it is called here."""

_RULES = (
    (re.compile(r"french window"), "French window"),
    (re.compile(r"arched window"), "arched window"),
    (re.compile(r"(double|quadruple|triple|turn|sliding|double-hung).*window"), "window"),
    (re.compile(r"^(wall|rounded|square|)\s*.*(plug|socket)$"), "wall socket"),
    (re.compile(r"switch$"), "light switch"),
    (re.compile(r"parking slot"), "parking slot"),
    (re.compile(r"^frame "), "picture frame"),
)

WITHOUT_ARTICLE = frozenset(
    """
    apples bamboo bread butter flowers french_fries glasses headphones keys milk orchids scissors shelves slippers
    sneakers soap sugar sunglasses tape tulips trousers tatami wood_logs woman_shoes oil_servers hanging_clothes
    folded_clothes vertical_shelves cutting_pliers track_lights kitchen_tools peach_blossom succulent_plant
    """.replace("_", " ").split()
)
"""Names of several things, or of stuff."""

SYNONYMS = MappingProxyType(
    {
        "sofa": ("couch",), "television": ("TV",), "bicycle": ("bike",), "refrigerator": ("fridge",),
        "motorbike": ("motorcycle",), "telephone": ("phone",), "mobile phone": ("phone", "cell phone"),
        "washbasin": ("sink", "basin"), "stroller": ("baby carriage",), "wardrobe": ("closet",),
        "bookcase": ("bookshelf",), "desk": ("table",), "couch": ("sofa",), "mug": ("cup",), "van": ("car",),
        "wall socket": ("socket", "power outlet"), "light switch": ("switch",), "trashcan": ("trash can",),
    }
)  # fmt: skip
"""Name -> other names that are right too."""


@dataclass(frozen=True)
class Piece:
    """One model of the catalog."""

    key: str
    """As its catalog has it, such as `Scopia#marteau`."""
    name: str
    category: str
    """Room or use, such as `Kitchen`."""
    package: Path
    model: str
    """Of the .obj file within the package."""
    rotation: tuple[float, ...]
    """Row by row, 3 x 3."""

    @property
    def chance(self) -> int:
        """A number that depends on nothing but the model."""
        return zlib.crc32(self.key.encode())


def called(name: str) -> str | None:
    """What a thing of the catalog is called here; None where it is left out."""
    small = name.lower().strip()
    if PEOPLE.search(small) or small in LEFT_OUT:
        return None
    if small in RENAMED:
        return RENAMED[small]
    found = next((general for pattern, general in _RULES if pattern.search(small)), small)
    return None if found in LEFT_OUT else found


def read_catalog(folder: Path) -> list[Piece]:
    """All models that have a name, in the same order always; ValueError for a folder without packages."""
    packages = [path for path in sorted(folder.glob("*.sh3f")) if path.stem != "Reallusion"]  # people
    if not packages:
        raise ValueError(f"{folder} holds no furniture (.sh3f); fetch sweethome3d-furniture again.")
    return [piece for package in packages for piece in _read_package(package)]


def _read_package(package: Path) -> Iterable[Piece]:
    with zipfile.ZipFile(package) as archive:
        text = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found.group(1), 16)), text)
    values = dict(re.findall(r"^(\w+#\d+)\s*=\s*(.*?)\s*$", text, re.MULTILINE))
    for entry in sorted(values):
        field, _, number = entry.partition("#")
        if field != "id":
            continue
        name = called(values[f"name#{number}"])
        if name is not None:
            rotation = tuple(map(float, values.get(f"modelRotation#{number}", "1 0 0 0 1 0 0 0 1").split()))
            model = values[f"model#{number}"].lstrip("/")
            yield Piece(values[entry], name, values[f"category#{number}"], package, model, rotation)


def accepted_names(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """Other right names of a thing: synonyms, and `chair` for a folding chair."""
    last = name.rsplit(" ", 1)[-1]
    general = (last,) if last != name and last in names else ()
    return (*SYNONYMS.get(name, ()), *general)


@dataclass(frozen=True)
class Parts:
    """Which models are learned, and which are for tests only."""

    known: tuple[Piece, ...]
    """Learned, but for some views."""
    new_models: tuple[Piece, ...]
    """Of names that are learned from other models: one of each name that has several."""
    new_names: tuple[Piece, ...]
    """Of names that are not learned: one in ten."""


def split_catalog(pieces: Iterable[Piece]) -> Parts:
    """Hold out names and models, the same ones always."""
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_name.setdefault(piece.name, []).append(piece)
    known: list[Piece] = []
    new_models: list[Piece] = []
    new_names: list[Piece] = []
    for name, models in by_name.items():
        ordered = sorted(models, key=lambda piece: (piece.chance, piece.key))
        if zlib.crc32(name.encode()) % 10 == 0:
            new_names += ordered
        elif len(ordered) > 1:
            new_models.append(ordered[0])
            known += ordered[1:]
        else:
            known += ordered
    return Parts(tuple(known), tuple(new_models), tuple(new_names))


@lru_cache(maxsize=4)
def _archive(package: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(package)


@lru_cache(maxsize=4)
def _files(package: Path) -> Mapping[str, str]:
    """Name in small letters -> name."""
    return {name.lower(): name for name in _archive(package).namelist()}


def read_piece(piece: Piece) -> Mesh:
    """The model of a piece, upright."""
    folder = piece.model.rpartition("/")[0]
    files = _files(piece.package)

    def read(name: str) -> bytes:
        inside = f"{folder}/{name}".lower() if name != piece.model else name.lower()
        if inside not in files and inside.endswith(".mtl"):  # models that were renamed still ask for the old name
            (inside,) = (other for other in files if other.startswith(f"{folder}/".lower()) and other.endswith(".mtl"))
        return _archive(piece.package).read(files[inside])

    return turned(read_obj(piece.model, read), np.array(piece.rotation, dtype=np.float32).reshape(3, 3))
