"""Draw the pictures of `hovle demo` again, with questions, sources and licenses.

`python dev/draw_demo.py --sheet sheet.png` writes hovle/demo/pictures, and all of them on one sheet: look at it, each
question must be one that a person can answer. `--out DIR` writes elsewhere. Needs 'hovle[smol]' and what `hovle fetch
smol unseen` brings.

Nothing of a license that asks for more than to be named may ship. OpenMoji, on whose drawings pictograms and flags are
tested, is CC BY-SA: pictograms are drawings kept for validation, the flag is distorted as none in training is.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hovle.assets.manifest import load_manifest
from hovle.demo.questions import FOLDER, QUESTIONS
from hovle.synthesis.encoding import to_png
from hovle.synthesis.registry import open_skill, skill_class
from hovle.synthesis.samples import Sample
from hovle.synthesis.sheets import draw_sheet
from hovle.synthesis.skill import AssetFolders

SEED = 12


@dataclass(frozen=True, kw_only=True)
class Source:
    """Whose work a picture shows."""

    asset: str
    license: str
    attribution: str = ""
    """Where it is more than the manifest says."""

    def to_dict(self) -> dict[str, str]:
        """With what the manifest of `hovle fetch` knows."""
        asset = load_manifest()[self.asset]
        attribution = self.attribution or asset.attribution
        return {**dataclasses.asdict(self), "attribution": attribution, "homepage": asset.homepage}


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A picture, by what draws it."""

    title: str
    skill: str
    index: int
    """Number of the sample."""
    kind: str
    """Of its questions, the first one of this kind."""
    sources: tuple[Source, ...] = ()
    accepted: tuple[str, ...] = ()
    """Right answers besides those that the skill knows."""
    split: str = "test"

    @property
    def file(self) -> str:
        return self.title.replace(" ", "-") + ".png"


WORK_SANS = "Copyright 2019 The Work Sans Project Authors (https://github.com/weiweihuanghuang/Work-Sans)"

ETEKS_AND_SCOPIA = (
    "Copyright (c) 2014-2020 Emmanuel Puybaret / eTeks <info@eteks.com> and Scopia Visual Interfaces Systems, s.l. "
    "(http://www.scopia.es)"
)

CHOSEN = (
    Chosen(
        title="word",
        skill="reading",
        index=16,
        kind="read",
        sources=(Source(asset="font-work-sans", license="OFL-1.1", attribution=WORK_SANS),),
    ),
    Chosen(
        title="pictogram",
        skill="pictograms",
        split="validation",
        index=19,
        kind="name",
        sources=(Source(asset="fluent-emoji-3d", license="MIT", attribution="Copyright (c) Microsoft Corporation"),),
    ),
    Chosen(
        title="icon",
        skill="icons",
        index=3,
        kind="name",
        sources=(
            Source(
                asset="lucide-static", license="ISC", attribution="Copyright (c) 2026 Lucide Icons and Contributors"
            ),
        ),
    ),
    Chosen(
        title="traffic sign",
        skill="signs",
        index=18,
        kind="name",
        sources=(Source(asset="mapillary-sprite-source", license="MIT", attribution="Copyright (c) 2015 mapillary"),),
        accepted=("truck crossing",),
    ),
    Chosen(
        title="flag",
        skill="flags",
        index=2,
        kind="name",
        sources=(Source(asset="flag-icons", license="MIT"),),
    ),
    Chosen(
        title="object",
        skill="objects",
        index=3,
        kind="name",
        sources=(Source(asset="sweethome3d-furniture", license="CC-BY-3.0", attribution=ETEKS_AND_SCOPIA),),
    ),
    Chosen(
        title="things to count",
        skill="scenes",
        index=8,
        kind="count",
        sources=(Source(asset="phosphor-icons", license="MIT"),),
    ),
    Chosen(title="chart", skill="charts", index=17, kind="largest"),
    Chosen(title="clock", skill="clocks", index=16, kind="time"),
    Chosen(
        title="clothing",
        skill="clothing",
        index=4,
        kind="name",
        sources=(Source(asset="dataset-fashion-mnist", license="MIT"),),
    ),
    Chosen(title="shape and color", skill="scenes", index=5, kind="color"),
    Chosen(
        title="something absent",
        skill="pictograms",
        split="validation",
        index=22,
        kind="absent",
        sources=(Source(asset="emoji-datasource-google", license="Apache-2.0", attribution="Noto Emoji by Google"),),
        accepted=("There is no anchor", "There is none", "nowhere"),
    ),
)
"""In the order in which they are shown. Chosen by eye, before there was a model to answer."""


def draw(chosen: Chosen, folders: AssetFolders) -> Sample:
    """Draw a picture, with its one question."""
    sample = open_skill(chosen.skill, folders).draw(chosen.index, chosen.split, SEED)
    question = next(question for question in sample.questions if question.kind == chosen.kind)
    question = dataclasses.replace(question, accepted=question.accepted + chosen.accepted)
    return dataclasses.replace(sample, questions=(question,), regions=(), image=as_png(sample.image))


def as_png(image: bytes) -> bytes:
    """The picture as a file that loses nothing; one that is such a file stays as it is."""
    picture = Image.open(io.BytesIO(image))
    return image if picture.format == "PNG" else to_png(picture)


def describe(chosen: Chosen, sample: Sample) -> dict[str, Any]:
    """What `questions.json` says of a picture."""
    [question] = sample.questions
    return {
        "title": chosen.title,
        "file": chosen.file,
        "sha256": hashlib.sha256(sample.image).hexdigest(),
        "question": question.text,
        "answer": question.answer,
        "kind": question.kind,
        "accepted": list(question.accepted),
        "drawn": {
            "skill": chosen.skill,
            "revision": skill_class(chosen.skill).revision,
            "split": chosen.split,
            "seed": SEED,
            "index": chosen.index,
        },
        "made_from": list(sample.source_ids),
        "sources": [source.to_dict() for source in chosen.sources],
    }


def write(folder: Path, samples: Sequence[Sample]) -> None:
    """Write the pictures, and what is known of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for chosen, sample in zip(CHOSEN, samples, strict=True):
        (folder / chosen.file).write_bytes(sample.image)
    rows = [describe(chosen, sample) for chosen, sample in zip(CHOSEN, samples, strict=True)]
    text = json.dumps({"pictures": rows}, indent=1, ensure_ascii=False) + "\n"
    (folder / QUESTIONS).write_text(text, encoding="utf-8")


def main() -> None:
    """Draw, write, and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE", help="all pictures with their questions, to be looked at"
    )
    parser.add_argument("--assets", type=Path, metavar="DIR", help="folder of unpacked assets instead of the cache")
    args = parser.parse_args()
    folders = AssetFolders(args.assets)
    samples = [draw(chosen, folders) for chosen in CHOSEN]
    write(args.out, samples)
    if args.sheet is not None:
        draw_sheet(samples, "hovle demo", num_lines=4).save(args.sheet)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"draw_demo: {error}")
