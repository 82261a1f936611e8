"""Regions: where it is known what a picture shows; rows keep them, or are skipped by what is wrong with them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from hovle.train.config import ChatData, HuggingFaceData, LlavaData
from hovle.train.data.grouping import split_turns
from hovle.train.data.readers import fingerprint_records, load_records
from hovle.train.data.records import Record
from hovle.train.data.regions import Region, check_inside, read_regions
from hovle.train.data.skips import SkipSampleError

LINE = {"box": [2, 3, 40, 20], "text": "no smoking"}
NAME = {"box": [1, 1, 9.5, 9], "text": "bus", "layout": "name"}
EXPECTED = (Region((2, 3, 40, 20), "no smoking"), Region((1, 1, 9.5, 9), "bus", "name"))


def written(folder: Path, kind: str, regions) -> ChatData | LlavaData | HuggingFaceData:
    """A source of one row with a picture of 60 x 40 pixels and these regions."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (60, 40), "white").save(folder / "a.png")
    if kind == "chat":
        content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is it?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A bus."}]
        row = {"messages": messages, "regions": regions}
        (folder / "a.jsonl").write_text(json.dumps(row))
        return ChatData(path=str(folder / "a.jsonl"))
    if kind == "llava":
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bus."}]
        (folder / "a.json").write_text(json.dumps([{"image": "a.png", "conversations": turns, "regions": regions}]))
        return LlavaData(path=str(folder / "a.json"))
    from datasets import Dataset

    picture = {"bytes": (folder / "a.png").read_bytes(), "path": None}
    Dataset.from_list([{"image": picture, "text": "A bus.", "regions": regions}]).to_parquet(folder / "a.parquet")
    return HuggingFaceData(path=str(folder / "a.parquet"))


@pytest.mark.parametrize("kind", ["chat", "llava", "huggingface"])
def test_every_source_of_rows_keeps_regions(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    records = load_records(written(tmp_path / "data", kind, [LINE, NAME]))
    assert len(records) == 1
    record = records[0]
    assert record.regions == EXPECTED
    assert record.unread == ()


@pytest.mark.parametrize(
    ("region", "found"),
    [
        ("bus", "it is no mapping"),
        ({"box": [0, 0, 5, 5]}, "text is no string"),
        ({"box": [0, 0, 5, 5], "text": "  "}, "text is no string with a character"),
        ({"box": [0, 0, 5], "text": "a"}, "four numbers"),
        ({"box": [0, 0, 5, float("nan")], "text": "a"}, "four numbers"),
        ({"box": [0, 0, 5, True], "text": "a"}, "four numbers"),
        ({"box": [5, 0, 5, 5], "text": "a"}, "no area"),
        ({"box": [0, 7, 5, 5], "text": "a"}, "no area"),
        ({"box": [0, 0, 5, 5], "text": "a\nb"}, "line break"),
        ({"box": [0, 0, 5, 5], "text": "a", "layout": "circle"}, "neither line nor name"),
        ({"box": [0, 0, 5, 5], "text": "a", "lable": "b"}, "unknown key 'lable'"),
        ({"box": [0, 0, 5, 5], "text": "ab", "edges": [0, 5]}, "no 3 ascending numbers"),
        ({"box": [0, 0, 5, 5], "text": "ab", "edges": [0, 4, 3]}, "no 3 ascending numbers"),
        ({"box": [0, 0, 5, 5], "text": "a", "layout": "name", "edges": [0, 5]}, "edges belong to a line"),
    ],
)
def test_a_malformed_region_is_told_with_its_number(region, found):
    with pytest.raises(SkipSampleError, match=rf"row 7: region 2 of 2: .*{found}.*expected \{{\"box\"") as caught:
        read_regions({"regions": [LINE, region]}, 1, "row 7")
    assert caught.value.reason == "malformed"


def test_regions_that_are_no_list_or_have_no_picture_are_told():
    with pytest.raises(SkipSampleError, match="expected regions"):
        read_regions({"regions": {"box": [0, 0, 5, 5], "text": "a"}}, 1, "row")
    with pytest.raises(SkipSampleError, match="no picture that they could lie in"):
        read_regions({"regions": [LINE]}, 0, "row")
    assert read_regions({"regions": []}, 0, "row") == read_regions({}, 0, "row") == ()


def test_a_malformed_region_skips_its_row_and_no_other_one(tmp_path):
    source = written(tmp_path, "chat", [{"box": [0, 0, 5, 5]}])
    good = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(good + "\n" + good.replace('{"box": [0, 0, 5, 5]}', json.dumps(LINE)))
    records = load_records(source)
    with pytest.raises(SkipSampleError, match=r"a.jsonl:1: region 1 of 1: text is no string"):
        records[0]
    assert records[1].regions == EXPECTED[:1]


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, -0.5, 5, 5), (0, 0, 60.5, 5), (0, 0, 5, 41)])
def test_a_box_outside_its_picture_is_told_with_both_sizes(box):
    with pytest.raises(SkipSampleError, match=r"region 1 of 1 \('a'\) has the box .* but its picture is 60 x 40"):
        check_inside([Region(box, "a")], 40, 60, "row")
    check_inside([Region((0, 0, 60, 40), "a")], 40, 60, "row")
    with pytest.raises(SkipSampleError, match="edges from 0 to 61"):
        check_inside([Region((0, 0, 60, 40), "a", edges=(0, 61))], 40, 60, "row")


def test_characters_share_a_box_evenly_and_outer_spaces_take_no_room():
    assert Region((10, 0, 30, 9), "abcd").character_edges == (10, 15, 20, 25, 30)
    assert Region((10, 0, 30, 9), " abcd ").character_edges == (10, 10, 15, 20, 25, 30, 30)
    assert Region((10, 0, 30, 9), "ab", edges=(11, 12, 29)).character_edges == (11, 12, 29)


def test_regions_stay_when_conversations_are_joined_parted_and_split(tmp_path):
    [record] = load_records(written(tmp_path, "chat", [LINE]))
    other = Record("b", record.messages, regions=EXPECTED)
    joined = Record.join([record, other])
    assert joined.regions == EXPECTED
    assert joined.part([1]).regions == EXPECTED
    longer = Record("c", [*record.messages, {"role": "user", "content": "Why?"}, record.messages[1]], regions=EXPECTED)
    assert [part.regions for part in split_turns(longer)] == [EXPECTED, EXPECTED]


def test_the_fingerprint_of_a_source_knows_its_regions(tmp_path):
    prints = [
        fingerprint_records(load_records(written(tmp_path, "chat", item))) for item in ([LINE], [NAME], [], None)
    ]
    assert len({*prints[:3]}) == 3
    assert prints[2] == prints[3]
