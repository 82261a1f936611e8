"""Sources: what readers make of files, and what they refuse."""

import dataclasses
import itertools
import json
import shutil
from collections import Counter

import pytest

from hovle.train.config import ChatData, EasyVqaData, HuggingFaceData, LlavaData, PictureData
from hovle.train.config.data import DataSource
from hovle.train.data.mixture import Mixture
from hovle.train.data.readers import fingerprint_records, load_records
from hovle.train.data.records import Record, conversation
from hovle.train.data.skips import SkipSampleError


@pytest.fixture(scope="module")
def chat_records(data) -> list[Record]:
    return load_records(ChatData(path=str(data / "chat.jsonl")))


def conversation_of(*turns: str) -> list[dict]:
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]


def test_pictures_of_a_chat_are_found_beside_the_file(chat_records, data):
    paths = [item["path"] for item in chat_records[1].messages[0]["content"] if item["type"] == "image"]
    assert paths == [str((data / "pictures" / "01.png").resolve())]
    assert chat_records[1].name == "chat.jsonl:2"


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '{"message": []}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}',
        '{"messages": [{"role": "user", "content": ["text"]}]}',
        '{"messages": []}',
        '{"messages": "Hello"}',
        '{"messages": [{"content": "Hello"}]}',
        '{"messages": [{"role": "human", "content": "Hello"}]}',
        '{"messages": [{"role": "user", "content": "Hello"}, {"role": "robot", "content": "Hi"}]}',
        '{"messages": [{"role": "user", "content": null}]}',
        '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
        '{"messages": [{"role": "user", "content": [{"type": "image", "path": 3}]}]}',
        '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": null}]}]}',
    ],
)
def test_a_malformed_line_is_named(tmp_path, line):
    good = json.dumps({"messages": conversation_of("A tree?", "Yes")})
    (tmp_path / "chat.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=r"chat\.jsonl:2: expected"):
        load_records(ChatData(path=str(tmp_path / "chat.jsonl")))


def test_pictures_outside_the_data_folder_are_refused(tmp_path):
    messages = [{"role": "user", "content": [{"type": "image", "path": "../secret.png"}]}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(ValueError, match="lies outside"):
        load_records(ChatData(path=str(tmp_path / "chat.jsonl")))


def test_empty_sources_are_refused(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match="no conversations"):
        load_records(ChatData(path=str(tmp_path / "empty")))
    with pytest.raises(ValueError, match="no pictures"):
        load_records(PictureData(path=str(tmp_path / "pictures")))


def test_easy_vqa_questions_about_one_picture_share_a_record(tmp_path):
    (tmp_path / "train").mkdir()
    rows = [["What color?", "red", 5], ["A circle?", "no", 5], ["What shape?", "cube", 5], ["Is it blue?", "yes", 6]]
    (tmp_path / "train" / "questions.json").write_text(json.dumps(rows))
    records = load_records(EasyVqaData(path=str(tmp_path), questions_per_sample=2))
    assert [record.name for record in records] == ["5.png[0]", "5.png[2]", "6.png[0]"]
    picture = tmp_path / "train" / "images" / "5.png"
    assert records[0].messages == conversation(picture, "What color?", "red")
    assert records[0].others == (conversation(picture, "A circle?", "no"),)
    assert records[1].others == ()


def test_balanced_questions_are_drawn_anew_and_seldom_where_the_wording_tells_the_answer(tmp_path):
    """Of two pictures each is asked one question that always has the same answer and one that has two."""
    rows = [["Is it?", "yes", 0], ["Is it?", "yes", 1], *([f"What {n}?", "ab"[n % 2], n // 4] for n in range(8))]
    rows += [[f"What {n}?", "ba"[n % 2], 1 - n // 4] for n in range(8)]
    (tmp_path / "train" / "images").mkdir(parents=True)
    (tmp_path / "train" / "questions.json").write_text(json.dumps(rows))
    config = EasyVqaData(path=str(tmp_path), questions_per_sample=3, balance_answers=True)
    records = load_records(config)
    assert [record.name for record in records] == ["0.png", "1.png"]
    asked: Counter[str] = Counter()
    for seed in range(400):
        drawn = records[0].draw(seed)
        assert drawn == records[0].draw(seed)
        conversations = [drawn.messages, *drawn.others]
        texts = [messages[0]["content"][1]["text"] for messages in conversations]
        assert len(set(texts)) == 3
        asked.update(texts)
    assert set(asked) == {"Is it?", *(f"What {n}?" for n in range(8))}
    others = [count for text, count in asked.items() if text != "Is it?"]
    assert asked["Is it?"] < 0.75 * min(others)  # half the weight
    one = dataclasses.replace(records[0], num_drawn=1)
    assert records[0].has_branches
    assert not one.has_branches  # although it knows more conversations


# --- LLaVA -----------------------------------------------------------------------------------------------------------


def llava(tmp_path, *entries, name="llava.json", **fields):
    (tmp_path / "images").mkdir(exist_ok=True)
    lines = name.endswith(".jsonl")
    text = "\n".join(json.dumps(entry) for entry in entries) if lines else json.dumps(entries)
    (tmp_path / name).write_text(text)
    fields = {"picture_folder": str(tmp_path / "images"), **fields}
    return load_records(LlavaData(path=str(tmp_path / name), **fields))


def turns_of(*values: str) -> list[dict]:
    speakers = itertools.cycle(("human", "gpt"))
    return [{"from": speaker, "value": value} for speaker, value in zip(speakers, values, strict=False)]


@pytest.mark.parametrize("name", ["llava.json", "llava.jsonl"])
def test_llava_conversations_become_messages(tmp_path, name):
    records = llava(
        tmp_path,
        {"image": "a.png", "conversations": turns_of("<image>\nWhat is it?", "A bus with <image> on it")},
        {"conversations": [{"from": "system", "value": "Be brief."}, *turns_of("Hello", "Hi")]},
        {"image": ["a.png", "b.png"], "conversations": turns_of("Compare <image> with", "what?", "<image>.", "Same")},
        name=name,
    )
    a, b = ({"type": "image", "path": str(tmp_path / "images" / picture)} for picture in ("a.png", "b.png"))
    assert len(records) == 3
    assert records[0].name == f"{name}:1"
    assert records[0].messages == [
        {"role": "user", "content": [a, {"type": "text", "text": "\nWhat is it?"}]},
        {"role": "assistant", "content": "A bus with <image> on it"},
    ]
    assert [message["role"] for message in records[1].messages] == ["system", "user", "assistant"]
    assert [message["content"] for message in records[2].messages] == [
        [{"type": "text", "text": "Compare "}, a, {"type": "text", "text": " with"}],
        "what?",
        [b, {"type": "text", "text": "."}],
        "Same",
    ]


@pytest.mark.parametrize(
    ("entry", "reason", "detail"),
    [
        (
            {"image": "a.png", "conversations": turns_of("What?", "A bus")},
            "picture count",
            "0 <image> marks .* 1 pict",
        ),
        ({"conversations": turns_of("<image> What?", "A bus")}, "picture count", "1 <image> marks .* 0 pictures"),
        ({"image": "a.png", "conversations": turns_of("What?", "<image>")}, "picture count", "0 <image> marks"),
        ({"conversations": []}, "malformed", "expected turns"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "malformed", "robot"),
        ({"conversations": [{"from": "human", "value": 3}]}, "malformed", "expected turns of text"),
        ({"turns": []}, "malformed", 'expected {"image": '),
        ("text", "malformed", "found 'text'"),
        (
            {"image": "../a.png", "conversations": turns_of("<image>", "A")},
            "picture outside its folder",
            "lies outside",
        ),
        ({"image": "/etc/a.png", "conversations": turns_of("<image>", "A")}, "picture outside its folder", "outside"),
        ({"image": "link.png", "conversations": turns_of("<image>", "A")}, "picture outside its folder", "outside"),
    ],
)
def test_what_is_wrong_with_a_llava_conversation_is_told_when_it_is_drawn(tmp_path, entry, reason, detail):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").touch()
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    good = {"conversations": turns_of("Hello", "Hi")}
    records = llava(tmp_path, good, entry)
    assert records[0].messages[1]["content"] == "Hi"
    with pytest.raises(SkipSampleError, match=rf"(?s)llava\.json:2: .*{detail}") as caught:
        records[1]
    assert caught.value.reason == reason


def test_a_line_that_is_no_json_is_skipped_but_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"conversations": []}\nnot json')
    with pytest.raises(SkipSampleError, match=r"x\.jsonl:2: expected"):
        load_records(LlavaData(path=str(tmp_path / "x.jsonl")))[1]
    for text, message in (("not json", "is no JSON"), ("[]", "list of conversations"), ('{"a": 1}', "list of conv")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_records(LlavaData(path=str(tmp_path / "x.json")))


def test_rows_nested_without_end_are_named(tmp_path):
    deep = '{"conversations": ' + "[" * 3000 + "]" * 3000 + "}"
    (tmp_path / "x.jsonl").write_text(f"{deep}\n{deep}")
    with pytest.raises(SkipSampleError, match=r"(?s)x\.jsonl:2: .*levels deep") as caught:
        load_records(LlavaData(path=str(tmp_path / "x.jsonl")))[1]
    assert caught.value.reason == "malformed"
    (tmp_path / "x.json").write_text(f"[{deep}]")
    for source, name in (("llava", "x.json is no JSON"), ("chat", "x.json:1: expected")):
        with pytest.raises(ValueError, match=f"(?s){name}.*levels deep"):
            load_records(DataSource.kinds()[source](path=str(tmp_path / "x.json")))


def test_a_picture_folder_with_a_link_that_leads_out_is_refused(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "secret.png").touch()
    (tmp_path / "pictures" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match=r"link\.png.* lies outside"):
        load_records(PictureData(path=str(tmp_path / "pictures")))


def test_what_a_picture_folder_leaves_aside_is_counted_and_named(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "real").mkdir(parents=True)
    for name in ("a.PNG", "real/b.tif", "real/c.avif", "real/notes.txt", "d.heic", "e.heic", "LICENSE"):
        (folder / name).touch()
    (folder / "link").symlink_to(folder / "real", target_is_directory=True)
    records = load_records(PictureData(path=str(folder)))
    assert [record.name for record in records] == ["a.PNG", "b.tif", "c.avif"]
    mixture = Mixture([records], 0, labels=["photos"])
    assert mixture.describe()[1:] == [
        "photos: left aside 4 files that are no pictures by their names (2 .heic, 1 no suffix, 1 .txt): "
        "LICENSE, d.heic, e.heic, notes.txt",
        "photos: left aside 1 links to folders, which are read where they lie (1 no suffix): link",
    ]


def test_a_picture_folder_with_a_linked_folder_outside_is_refused(tmp_path):
    for name in ("pictures", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").touch()
    (tmp_path / "pictures" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(ValueError, match=r"'link' lies outside"):
        load_records(PictureData(path=str(tmp_path / "pictures")))
    (tmp_path / "all").symlink_to(tmp_path / "elsewhere", target_is_directory=True)  # the source itself may be a link
    assert len(load_records(PictureData(path=str(tmp_path / "all")))) == 1


@pytest.mark.parametrize("source", ["chat", "pictures", "llava"])
def test_a_changed_picture_is_noticed_and_a_copied_folder_is_not(data, tmp_path, source):
    def fingerprint(folder) -> str:
        path = folder / {"chat": "chat.jsonl", "pictures": "pictures", "llava": "llava.json"}[source]
        return fingerprint_records(load_records(DataSource.kinds()[source](path=str(path))))

    first = tmp_path / "first"
    shutil.copytree(data, first)
    entry = {"image": "pictures/01.png", "conversations": turns_of("<image>", "A bus")}
    (first / "llava.json").write_text(json.dumps([entry, {"conversations": []}]))
    before = fingerprint(first)
    second = tmp_path / "elsewhere" / "second"
    shutil.copytree(first, second)
    assert fingerprint(second) == before
    picture = bytearray((second / "pictures" / "01.png").read_bytes())
    picture[-20] ^= 1  # as long as before
    (second / "pictures" / "01.png").write_bytes(picture)
    assert fingerprint(second) != before


def test_a_revision_belongs_to_a_hub_id(tmp_path):
    with pytest.raises(ValueError, match="revision belongs to a Hub id"):
        HuggingFaceData(path=str(tmp_path), revision="main")
