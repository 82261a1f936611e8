import io
from collections import Counter

import numpy as np
import pytest
from drawn_packages import write_photographs
from PIL import Image

from hovle.synthesis.skill import AssetFolders
from hovle.synthesis.skills.clothing import NAMES, WORN, Clothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def skill(folder):
    return Clothing(AssetFolders(folder))


def test_answers_are_those_of_the_photograph_s_class(skill):
    kinds = Counter()
    for index in range(100):
        sample = skill.draw(index, "train", 0)
        sample.check()
        number = int(sample.source_ids[0].split("/")[1])
        name = NAMES[number % 10]
        assert [region.text for region in sample.regions] == [name]
        for question in sample.questions:
            kinds[question.kind, question.answer] += 1
            if question.kind == "name":
                assert question.answer == name
            elif question.kind == "check":
                asked = name.replace("trousers", "pair of trousers")
                assert (question.answer == "yes") == (f" {asked}?" in question.text)
            elif question.kind == "worn":
                assert question.answer == WORN[name]
            elif question.kind == "shoe":
                assert (question.answer == "yes") == (name in ("sandal", "sneaker", "ankle boot"))
    for kind in ("check", "shoe"):
        assert 0.35 < kinds[kind, "yes"] / (kinds[kind, "yes"] + kinds[kind, "no"]) < 0.65


def test_every_photograph_is_shown_once_before_one_comes_again(skill):
    shown = [skill.draw(index, "test", 0).source_ids[0] for index in range(80)]
    assert len(set(shown)) == 80
    assert skill.count("test", 10**9) == 10_000


def test_parts_share_no_photograph(skill):
    parts = {
        split: {skill.draw(index, split, 0).source_ids[0] for index in range(60)}
        for split in ("train", "validation", "test")
    }
    assert len(set.union(*parts.values())) == 180


def test_the_piece_stands_out_from_its_ground_where_its_box_is(skill):
    for index in range(25):
        sample = skill.draw(index, "train", 0)
        pixels = np.asarray(Image.open(io.BytesIO(sample.image)).convert("L")).astype(int)
        left, top, right, bottom = sample.regions[0].box
        inside = np.median(pixels[top:bottom, left:right])
        outside = pixels.copy()
        outside[top:bottom, left:right] = -1
        assert abs(inside - np.median(outside[outside >= 0])) > 8


def test_a_file_of_another_shape_is_refused(folder, tmp_path):
    source = folder / "dataset-fashion-mnist/usr/share/datasets/fashion-mnist"
    wrong = tmp_path / "dataset-fashion-mnist/usr/share/datasets/fashion-mnist"
    wrong.mkdir(parents=True)
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (wrong / name).write_bytes((source / name.replace("images", "labels").replace("idx3", "idx1")).read_bytes())
    with pytest.raises(ValueError, match="expected"):
        Clothing(AssetFolders(tmp_path)).draw(0, "test", 0)
