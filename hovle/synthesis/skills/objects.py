"""Named things in three dimensions, seen from all sides; tested on new views, new models and new names."""

import random
from collections.abc import Sequence
from functools import cached_property, lru_cache
from types import MappingProxyType

import numpy as np

from ..colors import Rgb
from ..encoding import to_jpeg
from ..english import as_sentence, with_article
from ..furniture import WITHOUT_ARTICLE, Parts, Piece, accepted_names, read_catalog, read_piece, split_catalog
from ..grounds import choose_ground
from ..ray_tracing import Camera, Light, Stage, Surroundings, linear, render
from ..samples import Question, Region, Sample
from ..skill import Skill, fetched

NUM_SECTORS = 24
"""Parts of the circle around a model."""

_HELD_OUT_EVERY = 6
"""Of the sectors of a known model, one in so many is seen in tests only."""

_VIEWS_AT_ONCE = 8
"""Pictures in a row of one model, which is read and made ready once."""

_SIZES = ((112, 112), (224, 224))
_LEAST_AREA = 0.02
"""Share of the picture that the model's box takes at least."""

CASES = MappingProxyType({"new view": 0.45, "new model": 0.45, "new name": 0.1})
"""What is new about a test picture."""

WORDINGS = MappingProxyType(
    {
        "name": (
            "What is this?",
            "What object is shown?",
            "Name the thing.",
            "What do you see?",
            "Which thing is this?",
        ),
        "check": ("Does the picture show {an}?", "Do you see {an}?", "Can you see {an} here?"),
        "caption": ("Describe the picture.", "What does the picture show?", "Describe this picture in one sentence."),
    }
)

CAPTIONS = ("{an}", "{an} on the floor", "a picture of {an}", "this picture shows {an}")


class Objects(Skill):
    """Furniture and other things of a house, garden and street."""

    name = "objects"
    description = (
        "named 3-D models from all sides; tests: new views of known models, new models of known names, new names"
    )
    revision = 1
    sizes = MappingProxyType(
        {
            "small": MappingProxyType({"train": 400, "validation": 40, "test": 100}),
            "full": MappingProxyType({"train": 16_000, "validation": 400, "test": 1_500}),
        }
    )
    held_out = ("view", "new-model", "new-name")
    sources = (fetched("sweethome3d-furniture"),)
    extras = MappingProxyType({"embreex": "hovle[smol]"})

    @cached_property
    def parts(self) -> Parts:
        """Which models are learned, and which are for tests only."""
        folder = self.folders["sweethome3d-furniture"] / "usr/share/sweethome3d/furniture"
        return split_catalog(read_catalog(folder))

    @cached_property
    def _names(self) -> list[str]:
        return sorted({piece.name for piece in self.parts.known})

    def draw(self, index: int, split: str, seed: int) -> Sample:
        """Take a picture of a model and ask what it is."""
        rng = self.rng(index, split, seed)
        case = rng.choices(tuple(CASES), tuple(CASES.values()))[0] if split == "test" else "known"
        piece = self._piece(case, index, split, seed, rng)
        stage = _stage(piece)
        size = rng.choice(_SIZES)
        while True:
            sector = _choose_sector(piece, case, stage.extent, rng)
            camera = _choose_camera(sector, stage.extent, rng)
            around = _surroundings(stage.mean_color, rng)
            image, box = render(stage, camera, _choose_light(rng), around, size, rng.getrandbits(32))
            if box and (box[2] - box[0]) * (box[3] - box[1]) >= _LEAST_AREA * size[0] * size[1]:
                break
        questions = ask(piece, self.parts.known, self._names, rng)
        sources = {"new model": f"new-model:{piece.key}", "new name": f"new-name:{piece.name}"}
        source_ids = (sources.get(case, f"name:{piece.name}"), f"view:{piece.key}/{sector}")
        return Sample(to_jpeg(image, 92), size, questions, (Region(box, piece.name),), source_ids, {"case": case})

    def _piece(self, case: str, index: int, split: str, seed: int, rng: random.Random) -> Piece:
        if case == "known":
            return self.parts.known[self.place(index // _VIEWS_AT_ONCE, len(self.parts.known), split, seed)]
        pieces = {
            "new view": self.parts.known,
            "new model": self.parts.new_models,
            "new name": self.parts.new_names,
        }[case]
        return rng.choice(pieces)


@lru_cache(maxsize=8)
def _stage(piece: Piece) -> Stage:
    return Stage(read_piece(piece))


def is_held_out_view(piece: Piece, sector: int) -> bool:
    """Whether a known model is seen from this sector in tests only."""
    return (piece.chance + sector) % _HELD_OUT_EVERY == 0


def _choose_sector(piece: Piece, case: str, extent: Sequence[float], rng: random.Random) -> int:
    """Where from, mostly from the front; flat things are not seen edge on."""
    while True:
        degrees = rng.gauss(0, 55) if rng.random() < 0.75 else rng.uniform(0, 360)
        sector = int(degrees % 360 // (360 / NUM_SECTORS)) % NUM_SECTORS
        is_of_part = case in ("new model", "new name") or is_held_out_view(piece, sector) == (case == "new view")
        if is_of_part and _shows_it(sector, extent):
            return sector


def _shows_it(sector: int, extent: Sequence[float]) -> bool:
    """Whether a side tells what a model is: no edge alone, and the front of what hangs on a wall."""
    across = np.radians((sector + 0.5) * 360 / NUM_SECTORS)
    if extent[1] < 0.2:  # lies flat, and is looked down on
        return True
    if extent[2] < 0.2 * extent[0] or extent[2] < 0.2 * extent[1]:
        return bool(np.cos(across) >= 0.5)
    return bool(extent[0] >= 0.2 * extent[2] or abs(np.sin(across)) >= 0.5)


def _choose_camera(sector: int, extent: Sequence[float], rng: random.Random) -> Camera:
    elevation = rng.uniform(28, 60) if extent[1] < 0.15 else rng.uniform(6, 42)
    return Camera(
        azimuth=(sector + rng.random()) * 360 / NUM_SECTORS,
        elevation=elevation,
        view_angle=rng.uniform(20, 45),
        fill=rng.uniform(0.62, 0.92),
        shift=(rng.uniform(-0.05, 0.05), rng.uniform(-0.04, 0.04)),
    )


def _choose_light(rng: random.Random) -> Light:
    return Light(
        azimuth=rng.uniform(-80, 80),
        elevation=rng.uniform(30, 70),
        strength=rng.uniform(0.7, 1.1),
        softness=rng.uniform(0.05, 0.2),
        sky=rng.uniform(0.4, 0.6),
    )


def _surroundings(mean: Rgb, rng: random.Random) -> Surroundings:
    """Floor and wall of colors from which the model stands out."""
    floor, wall = choose_ground(rng, [mean]), choose_ground(rng, [mean])
    if rng.random() < 0.4:
        wall = floor
    return Surroundings(tuple(linear(np.array(floor) / 255)), tuple(linear(np.array(wall) / 255)))


def _an(name: str) -> str:
    return name if name in WITHOUT_ARTICLE else with_article(name)


def ask(piece: Piece, known: Sequence[Piece], names: Sequence[str], rng: random.Random) -> tuple[Question, ...]:
    """What it is; whether it is that, and whether something else is there."""
    others = [other.name for other in known if is_clearly_other(other, piece)]
    first, second = rng.sample((piece.name, rng.choice(others)), 2)
    wordings = rng.sample(WORDINGS["check"], 2)
    checks = [
        Question(wording.format(an=_an(asked)), "yes" if asked == piece.name else "no", "check")
        for wording, asked in zip(wordings, (first, second), strict=True)
    ]
    named = Question(rng.choice(WORDINGS["name"]), piece.name, "name", accepted_names(piece.name, names))
    text = as_sentence(rng.choice(CAPTIONS).format(an=_an(piece.name)))
    return (named, *checks, Question(rng.choice(WORDINGS["caption"]), text, "caption"))


def is_clearly_other(piece: Piece, other: Piece) -> bool:
    """Whether nobody would call the one by the other's name: another use, and no word in common."""
    words, others = ({*item.name.split(), *" ".join(accepted_names(item.name, ())).split()} for item in (piece, other))
    is_within = any(one in two or two in one for one in words for two in others)
    return piece.category != other.category and not is_within
