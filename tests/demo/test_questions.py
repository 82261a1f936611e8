"""The pictures that ship with `hovle demo`: whole, small, free, and drawn as they say."""

import hashlib
import importlib.util
import json
import sys
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from places import ROOT

from hovle.assets import load_manifest
from hovle.demo.questions import FOLDER, QUESTIONS, load_questions
from hovle.synthesis.samples import TILE
from hovle.synthesis.skill import AssetFolders

ROWS = json.loads((FOLDER / QUESTIONS).read_text())["pictures"]

FREE = {"MIT", "ISC", "Apache-2.0", "CC-BY-3.0", "OFL-1.1"}
"""What pictures may be made from; the last one is of fonts, and asks nothing of what is written with them."""


@pytest.fixture(scope="module")
def draw_demo() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("draw_demo", ROOT / "dev" / "draw_demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_there_are_twelve_questions_about_twelve_kinds_of_pictures():
    asked = load_questions()
    assert len(asked) == 12
    for found in ({item.title for item in asked}, {item.picture for item in asked}):
        assert len(found) == 12
    skills = {row["drawn"]["skill"] for row in ROWS}
    assert {"reading", "pictograms", "icons", "signs", "flags", "objects", "scenes", "charts", "clocks"} <= skills
    assert all(item.question.text and item.question.answer for item in asked)


def test_the_files_are_those_that_were_written_and_no_others():
    hashes = {row["file"]: row["sha256"] for row in ROWS}
    assert {path.name for path in FOLDER.iterdir()} == {*hashes, QUESTIONS, "LICENSES"}
    for name, expected in hashes.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == expected, name


def test_the_pictures_are_small_and_of_sizes_that_tiles_cut():
    assert sum((FOLDER / row["file"]).stat().st_size for row in ROWS) <= 250_000
    for row in ROWS:
        with Image.open(FOLDER / row["file"]) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert picture.width % TILE == picture.height % TILE == 0


def test_no_picture_is_one_that_models_learn_from():
    for row in ROWS:
        assert row["drawn"]["split"] == "test" or row["drawn"]["skill"] == "pictograms", row["title"]
        assert row["drawn"]["split"] != "train"


@pytest.mark.parametrize("row", ROWS, ids=[row["title"] for row in ROWS])
def test_whose_work_a_picture_shows_is_told_and_may_be_shown(row):
    notice, licenses = ((ROOT / "NOTICE").read_text(), (FOLDER / "LICENSES").read_text())
    assert f"hovle/demo/pictures/{row['file']}\n" in notice
    assert bool(row["sources"]) == (row["title"] not in ("chart", "clock", "shape and color"))
    for source in row["sources"]:
        assert source["license"] in FREE
        assert source["license"] in load_manifest()[source["asset"]].licence
        assert source["license"] == "Apache-2.0" or source["license"] in licenses
        for fact in (source["attribution"], f"Licence: {source['license']}", source["homepage"]):
            assert fact in notice.partition("None of the works below")[0]


def test_what_the_script_chooses_is_what_ships(draw_demo):
    for chosen, row in zip(draw_demo.CHOSEN, ROWS, strict=True):
        drawn = {"skill": chosen.skill, "split": chosen.split, "seed": draw_demo.SEED, "index": chosen.index}
        assert {**row["drawn"], **drawn} == row["drawn"]
        told = {"title": chosen.title, "file": chosen.file, "kind": chosen.kind}
        assert {**row, **told} == row
        assert row["sources"] == [source.to_dict() for source in chosen.sources]
        assert set(chosen.accepted) <= set(row["accepted"])


@pytest.mark.parametrize("title", ["clock", "chart"])
def test_pictures_that_need_no_assets_are_drawn_again_as_they_are(draw_demo, title, tmp_path):
    """Another revision of a skill may draw others: then run the script, and look at what it draws."""
    [(chosen, row)] = [
        (chosen, row) for chosen, row in zip(draw_demo.CHOSEN, ROWS, strict=True) if row["title"] == title
    ]
    sample = draw_demo.draw(chosen, AssetFolders(tmp_path))
    found = draw_demo.describe(chosen, sample)
    assert {**found, "sha256": row["sha256"]} == row  # other versions of libraries compress otherwise
    (tmp_path / "again.png").write_bytes(sample.image)
    with Image.open(tmp_path / "again.png") as again, Image.open(FOLDER / row["file"]) as shipped:
        difference = np.asarray(again.convert("RGB")).astype(float) - np.asarray(shipped.convert("RGB"))
    assert np.abs(difference).mean() < 2
