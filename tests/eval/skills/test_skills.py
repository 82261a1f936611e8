"""`hovle eval skills`: what is asked, how answers are graded, scored and told."""

import dataclasses
import gc
import io
import json
from types import MappingProxyType

import pytest
import torch
from drawn_packages import write_drawings, write_words_and_fonts
from PIL import Image

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.cli import main
from hovle.eval.skills.bars import BARS, EASY_VQA
from hovle.eval.skills.command import ask
from hovle.eval.skills.grading import grade, is_right
from hovle.eval.skills.items import Drawer, Item
from hovle.eval.skills.neighbours import Neighbours
from hovle.eval.skills.ocr import read_items
from hovle.eval.skills.scoring import Answered, result_of
from hovle.synthesis.naming import Drawing, Naming
from hovle.synthesis.samples import Question
from hovle.synthesis.skill import AssetFolders

DRAWN = ("reading", "scenes", "clocks", "charts")
"""Skills for which there are stand-ins."""


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Stand-ins as `--assets` takes them."""
    return write_words_and_fonts(write_drawings(tmp_path_factory.mktemp("assets")))


def made_items(*pairs: tuple[str, str], **fields) -> list[Item]:
    """Items with these answers, each of the source named beside."""
    return [
        Item(f"made/{place}/0", Question("What?", answer, "name"), b"", source, **fields)
        for place, (answer, source) in enumerate(pairs)
    ]


# --- grading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "right"),
    [("A cat.", True), ("the kitten", True), ('"cat"', True), ("cat and dog", False), ("", False), ("CAT", True)],
)
def test_names_are_right_whatever_their_form_and_by_their_aliases(answer, right):
    assert is_right(Question("What is it?", "cat", "name", ("kitten",)), answer) == right


def test_wrong_characters_are_counted_with_their_case_and_over_all_texts():
    question = Question("Read it.", "Fresh fish\n2 today", "read")
    found = grade("cer", question, "Fresh  Fish 2 toda")
    assert (found.numerator, found.denominator, found.is_right) == (2, 18, False)
    assert grade("cer", question, "Fresh fish 2 today").is_right


@pytest.mark.parametrize(
    ("metric", "answer", "fault"),
    [
        ("false_yes", "Yes, there is.", 1),
        ("false_yes", "No.", 0),
        ("blind", "A red cat.", 1),
        ("blind", "I'm sorry, but I can\u2019t see a picture.", 0),
        ("blind", "There is no picture.", 0),
    ],
)
def test_seeing_what_is_not_there_is_a_fault(metric, answer, fault):
    assert grade(metric, Question("Is there a cake?", "no", "absent"), answer).numerator == fault


# --- scores ---------------------------------------------------------------------------------------------------------


def test_each_category_counts_the_same_however_often_it_comes():
    items = made_items(*(("animal", f"a{place}") for place in range(9)), ("food", "b"))
    answers = ["animal"] * 10
    told = result_of(Answered(BARS["pictogram-category"], items, answers, answers))
    assert told["score"] == pytest.approx(0.5)
    assert told["majority"] == {"score": pytest.approx(0.5), "answer": "animal"}
    assert told["is_met"] is False
    assert (told["blank"]["answer"], told["blank"]["share"]) == ("animal", 1)


def test_pictures_made_from_the_same_drawing_widen_the_interval():
    one_each = made_items(*(("cat", f"drawing:{place}") for place in range(40)))
    few = made_items(*(("cat", f"drawing:{place // 10}") for place in range(40)))
    answers = ["cat" if place // 10 % 2 else "dog" for place in range(40)]
    narrow, wide = (result_of(Answered(BARS["icons"], items, answers, answers)) for items in (one_each, few))
    assert narrow["score"] == wide["score"] == 0.5
    assert (narrow["num_sources"], wide["num_sources"]) == (40, 4)
    assert wide["interval"][1] - wide["interval"][0] > narrow["interval"][1] - narrow["interval"][0]


def test_tags_are_told_apart_from_names():
    items = made_items(("cat", "a"), ("dog", "b"), facets={"tags": "animal, pet"})
    told = result_of(Answered(BARS["pictogram-name"], items, ["animal", "dog"], ["", ""]))
    assert (told["score"], told["with_tags"]) == (0.5, 1)


def test_letters_are_told_apart_by_size():
    items = [
        Item("made", Question("Read it.", "ab", "read"), b"", str(size), {"letter_size": size, "num_words": 1})
        for size in (20, 27, 28, 64)
    ]
    told = result_of(Answered(BARS["reading"], items, ["ab", "ab", "ab", "xy"], [""] * 4))
    assert {name: found["num_items"] for name, found in told["by"]["letter_size"].items()} == {
        "20-27 px": 2,
        "28-39 px": 1,
        "40-64 px": 1,
    }
    assert told["by"]["letter_size"]["40-64 px"]["score"] == 1
    assert told["score"] == 0.25


# --- items ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [bar.name for bar in BARS.values() if {*bar.skills} <= {*DRAWN, EASY_VQA}])
def test_right_answers_meet_every_bar_and_one_question_is_asked_of_each_picture(assets, name):
    bar = BARS[name]
    items = Drawer(AssetFolders(assets), seed=0).items(bar, 4)
    assert len({item.name.rsplit("/", 1)[0] for item in items}) == 4
    told = result_of(Answered(bar, items, [item.question.answer for item in items], None))
    assert told["score"] == (0 if bar.at_most else 1)
    assert told["is_met"] in (True, None)


def test_the_same_seed_draws_the_same_items(assets):
    first, second, other = (Drawer(AssetFolders(assets), seed).items(BARS["clocks"], 3) for seed in (1, 1, 2))
    assert first == second != other


# --- the command ----------------------------------------------------------------------------------------------------


def test_a_model_is_scored_with_baselines_examples_and_every_answer(
    model_folder, assets, tmp_path, monkeypatch, capsys
):
    drawable = dataclasses.replace(BARS["no-picture"], skills=("scenes", "clocks"))
    monkeypatch.setattr("hovle.eval.skills.command.BARS", {**BARS, "no-picture": drawable})
    monkeypatch.setattr("hovle.eval.skills.command.fastest_dtype", lambda device: torch.float32)
    asked = ["clocks", "count", "no-picture"]
    options = ["--only", *asked, "--items", "4", "--assets", str(assets), "--out", str(tmp_path)]
    assert main(["eval", "skills", str(model_folder), *options]) == 0, capsys.readouterr().err
    told = json.loads((tmp_path / "skills.json").read_text())
    assert [row["name"] for row in told["abilities"]] == asked
    clocks, _, without = told["abilities"]
    assert clocks["num_items"] == 4
    assert clocks["interval"][0] <= clocks["score"] <= clocks["interval"][1]
    assert 0 <= clocks["blank"]["score"] <= 1
    assert (without["blank"], without["majority"], without["score"]) == (None, None, 1)  # random words say nothing
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["ability"] for answer in answers] == [name for name in asked for _ in range(4)]
    page = (tmp_path / "README.md").read_text()
    assert "| time to five minutes" in page
    assert "missed" in page
    with Image.open(tmp_path / "examples.png") as examples:
        assert examples.height > 300  # a row for each ability whose pictures are shown
    assert "Written: " in capsys.readouterr().out


def test_pictures_are_opened_batch_by_batch(model_folder):
    written = io.BytesIO()
    Image.new("RGB", (60, 60)).save(written, "PNG")
    items = [dataclasses.replace(item, image=written.getvalue()) for item in made_items(*[("cat", "a")] * 6)]
    items = [
        dataclasses.replace(item, question=dataclasses.replace(item.question, text=f"What is {place}?"))
        for place, item in enumerate(items)
    ]
    model = HoVLEForConditionalGeneration.from_pretrained(model_folder).eval()
    num_open, before = [], num_pictures()
    model.register_forward_pre_hook(lambda *_: num_open.append(num_pictures() - before))
    bar = dataclasses.replace(BARS["pictogram-name"], max_new_tokens=1)
    found = ask(model, HoVLEProcessor.from_pretrained(model_folder), bar, items, batch_size=2)
    assert len(found.answers) == len(found.blank_answers) == 6
    assert max(num_open) <= 4


def num_pictures() -> int:
    return sum(issubclass(type(thing), Image.Image) for thing in gc.get_objects())


def test_abilities_are_listed_with_what_is_asked_of_them(capsys):
    assert main(["eval", "skills", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*BARS]
    assert "99.0 %" in next(line for line in lines if line.startswith("easy-vqa"))


def test_a_model_that_is_not_there_is_refused_before_anything_is_drawn(tmp_path, capsys):
    assert main(["eval", "skills", str(tmp_path / "none"), "--items", "1"]) == 1
    assert "none" in capsys.readouterr().err


def test_nearest_neighbours_are_what_is_asked_for_where_they_were_asked():
    items = made_items(("cat", "a"), ("dog", "b"))
    for answers, met in ((["cat", "dog"], True), (["cow", "dog"], True), (["cow", "cow"], False)):
        told = result_of(Answered(BARS["pictogram-name"], items, answers, ["", ""], ["cat", "cat"]))
        assert (told["rival"], told["bar"], told["is_met"]) == ({"name": "neighbours", "score": 0.5}, 0.5, met)
    assert result_of(Answered(BARS["pictogram-name"], items, ["cat", "dog"], ["", ""]))["is_met"] is None


def test_a_drawing_is_named_as_the_one_most_like_it():
    class Blobs(Naming):
        name, description, revision, sizes, held_out, noun = "blobs", "", 1, MappingProxyType({}), (), "blob"
        drawings = MappingProxyType({"train": [Drawing(name, "crafted", name) for name in ("red", "blue")]})

        def render(self, drawing, extent):
            return Image.new("RGBA", (extent, extent), drawing.name)

    pictures = {color: io.BytesIO() for color in ("red", "blue")}
    for color, written in pictures.items():
        Image.new("RGB", (112, 112), color).save(written, "PNG")
    asked = ("blue", "red", "blue")
    items = [Item(color, Question("?", color, "name"), pictures[color].getvalue(), color) for color in asked]
    assert Neighbours().names(Blobs(AssetFolders(None)), items, seed=0) == [*asked]


def test_an_ocr_network_reads_lines_and_notices(assets):
    drawer = Drawer(AssetFolders(assets), seed=0)
    for name in ("reading", "notices"):
        items = drawer.items(BARS[name], 4)
        told = result_of(Answered(BARS[name], items, [""] * 4, [""] * 4, read_items(items)))
        assert told["rival"]["name"] == "ocr"
        assert told["rival"]["score"] < 0.5  # 0.01 and 0.03 here: words that mean nothing in a clear font
