"""Sources: what readers make of files, and what they refuse."""

import dataclasses
import itertools
import json
import os
import shutil
from collections import Counter

import pytest

from hovle.train.config import ChatData, EasyVqaData, HuggingFaceData, LlavaData, PictureData
from hovle.train.config.data import DataSource
from hovle.train.data.mixture import Mixture
from hovle.train.data.readers import fingerprint_records, load_records
from hovle.train.data.records import Record, conversation, picture_paths
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


# --- keys of rows ----------------------------------------------------------------------------------------------------


def chats(tmp_path, *rows: dict, name="chat.jsonl"):
    (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return load_records(ChatData(path=str(tmp_path / name)))


def shown_in(messages: list[dict]) -> list[list]:
    """Names of picture files and texts of each message."""
    contents = [
        [message["content"]] if isinstance(message["content"], str) else message["content"] for message in messages
    ]
    return [
        [item if isinstance(item, str) else item.get("text") or item["path"].rpartition("/")[2] for item in items]
        for items in contents
    ]


@pytest.mark.parametrize("pictures", [{"images": ["a.png", "b.png"]}, {"image": ["a.png", "b.png"]}])
@pytest.mark.parametrize(
    ("question", "shown"),
    [
        ("Compare.", ["a.png", "b.png", "Compare."]),
        ("<image> or <image>?", ["a.png", " or ", "b.png", "?"]),
        (
            [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " in "}, {"type": "image"}],
            ["Is ", "a.png", " in ", "b.png"],
        ),
    ],
)
def test_pictures_beside_messages_stand_at_their_marks_or_first(tmp_path, pictures, question, shown):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "Same"}]
    [record] = chats(tmp_path, {"messages": messages, "system": "Be brief.", **pictures})
    assert shown_in(record.messages) == [["Be brief."], shown, ["Same"]]
    assert record.messages[0]["role"] == "system"
    assert picture_paths([record]) == [str(tmp_path.resolve() / name) for name in ("a.png", "b.png")]


def test_a_list_of_pictures_beside_llava_turns_stands_at_their_marks_or_first(tmp_path):
    rows = [
        {"images": ["a.png"], "system": "Be brief.", "conversations": turns_of("What?", "A bus")},
        {"images": ["a.png"], "conversations": turns_of("What is <image>?", "A bus")},
        {"image": "a.png", "images": ["a.png"], "conversations": turns_of("<image>", "A bus")},
        {"system": "Be brief.", "conversations": [{"from": "system", "value": "Be brief."}, *turns_of("Hi", "Hello")]},
    ]
    records = llava(tmp_path, *rows)
    assert [shown_in(records[place].messages) for place in range(4)] == [
        [["Be brief."], ["a.png", "What?"], ["A bus"]],
        [["What is ", "a.png", "?"], ["A bus"]],
        [["a.png"], ["A bus"]],
        [["Be brief."], ["Hi"], ["Hello"]],
    ]


ABOUT_WHAT_NOBODY_SEES = [
    ({"video": "a.mp4"}, "video or audio"),
    ({"audios": ["a.wav"]}, "video or audio"),
    ({"media": {"path": "clips/a.webm"}}, "video or audio"),
    ({"tools": [{"name": "search"}]}, "tools"),
    ({"picture": "a.png"}, "picture in an unknown column"),
    ({"image_url": "https://example.com/1"}, "picture in an unknown column"),
    ({"imagePath": "a"}, "picture in an unknown column"),
    ({"image_id": 5}, "picture in an unknown column"),
    ({"attachment": "https://example.com/a.jpg?size=2"}, "picture in an unknown column"),
    ({"images": [{"url": "https://example.com/a.jpg"}]}, "malformed"),
    ({"image": ["a.png"], "images": ["b.png"]}, "picture count"),
    ({"system": ["Be brief."]}, "malformed"),
]


@pytest.mark.parametrize(("keys", "reason"), ABOUT_WHAT_NOBODY_SEES)
def test_a_row_about_what_is_not_read_is_skipped_by_reason(tmp_path, keys, reason):
    good = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
    records = {
        "chat": chats(tmp_path, {"messages": good}, {"messages": good, **keys}),
        "llava": llava(
            tmp_path, {"conversations": turns_of("Hello", "Hi")}, {"conversations": turns_of("?", "Hi"), **keys}
        ),
    }
    for source, rows in records.items():
        assert rows[0].messages[1]["content"] == "Hi"
        with pytest.raises(SkipSampleError, match=rf"{source}\.jsonl?:2: ") as caught:
            rows[1]
        assert caught.value.reason == reason
    assert fingerprint_records(records["chat"]) != fingerprint_records(chats(tmp_path, {"messages": good}))


@pytest.mark.parametrize("mark", ["<image>", "<video>", "<audio>", "<image_1>", "<image 2>"])
def test_a_mark_without_a_picture_is_no_word_to_learn(tmp_path, mark):
    asked = {"messages": conversation_of(f"{mark}\nWhat is it?", "A bus")}
    listed = {"messages": [{"role": "user", "content": [{"type": "text", "text": mark}]}, asked["messages"][1]]}
    named = {"messages": conversation_of("Which tag shows a picture?", f"The {mark} tag")}
    rows = chats(tmp_path, asked, listed, named)
    for place in (0, 1):
        with pytest.raises(SkipSampleError, match=rf"chat\.jsonl:{place + 1}: a question has the mark {mark}"):
            rows[place]
    assert rows[2].messages[1]["content"] == f"The {mark} tag"
    entry = {"image": "a.png", "conversations": turns_of(f"<image>{'' if mark == '<image>' else mark}", "A bus")}
    if mark != "<image>":
        with pytest.raises(SkipSampleError, match=f"the mark {mark}"):
            llava(tmp_path, entry)[0]


def test_keys_that_tell_where_a_row_comes_from_do_no_harm_and_others_are_counted(tmp_path):
    keys = {"id": 3, "question_id": 7, "source": "web", "width": 5, "image_url": "https://a/b.jpg", "rating": 4}
    keys |= {"video": None, "audios": [], "difficulty": "hard"}
    [row] = [{"image": "a.png", "conversations": turns_of("<image>What?", "A bus"), **keys}]
    row["conversations"][0]["style"] = "short"
    assert llava(tmp_path, row)[0].unread == ("image_url", "rating", "difficulty", "style")
    content = [{"type": "image", "path": "a.png", "detail": "low"}, {"type": "text", "text": "What?"}]
    [record] = chats(tmp_path, {"messages": [{"role": "user", "content": content}], "id": 3, "rating": 4})
    assert record.unread == ("rating", "detail")


def test_a_video_item_of_a_message_is_a_skip(tmp_path):
    content = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]
    rows = chats(tmp_path, {"messages": [{"role": "user", "content": content}]})
    with pytest.raises(SkipSampleError, match="an item of the type video") as caught:
        rows[0]
    assert (caught.value.reason, caught.value.name) == ("video or audio", "chat.jsonl:1")


@pytest.mark.parametrize(
    "picture", ["a long text in place of a name " * 300, "folder", ".", "null\0character", "pipe"]
)
def test_what_is_no_picture_file_is_a_row_of_its_own_fault(tmp_path, picture):
    (tmp_path / "images" / "folder").mkdir(parents=True)
    os.mkfifo(tmp_path / "images" / "pipe")
    good = {"conversations": turns_of("Hello", "Hi")}
    records = llava(tmp_path, good, {"image": picture, "conversations": turns_of("<image>", "A bus")})
    assert len(fingerprint_records(records)) == 16
    assert records[0].messages[1]["content"] == "Hi"
    if "\0" in picture:
        with pytest.raises(SkipSampleError, match=r"llava\.json:2: .*no name of a file"):
            records[1]
    else:
        assert records[1].name == "llava.json:2"  # its picture is looked for when the sample is made


# --- text files ------------------------------------------------------------------------------------------------------

ODD_LINES = "\u2028a\u2029b\u0085c\x0bd\x0ce\x1cf"
"""Signs at which Python's `splitlines` breaks lines and JSON does not; those below 32 are written as escapes there."""


def write_source(tmp_path, source: str, texts: list[str], encoding="utf-8", end="\n") -> DataSource:
    """A recipe's source over a file of one conversation for each text, its characters written as they are."""
    rows = {
        "chat": [{"messages": conversation_of("Say it", text)} for text in texts],
        "llava": [{"conversations": turns_of("Say it", text)} for text in texts],
    }[source]
    path = tmp_path / f"{source}.jsonl"
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode(encoding))
    return DataSource.kinds()[source](path=str(path))


@pytest.mark.parametrize("source", ["chat", "llava"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_lines_end_at_line_feeds_only_whatever_their_texts_hold(tmp_path, source, encoding, end):
    texts = [f"{number}{ODD_LINES}" for number in range(3)]
    records = load_records(write_source(tmp_path, source, texts, encoding, end))
    assert [records[place].messages[1]["content"] for place in range(len(records))] == texts
    step = 2 if end == "\n\n" else 1
    assert [records[place].name for place in range(3)] == [f"{source}.jsonl:{1 + step * place}" for place in range(3)]


@pytest.mark.parametrize("source", ["chat", "llava"])
@pytest.mark.parametrize(
    ("encoding", "text", "named"),
    [
        ("gbk", "\u4e00\u8f86\u516c\u4ea4\u8f66", "GB18030"),
        ("utf-16", "A bus", "UTF-16"),
        ("latin-1", "caf\xe9 au lait", "CP1252"),
    ],
)
def test_a_file_in_another_encoding_is_refused_with_its_name_and_encoding(tmp_path, source, encoding, text, named):
    config = write_source(tmp_path, source, ["A bus", text], encoding)
    line = 1 if encoding == "utf-16" else 2
    with pytest.raises(ValueError, match=rf"{source}\.jsonl is not in UTF-8: line {line} .*{named}"):
        load_records(config)


@pytest.mark.parametrize("source", ["chat", "llava"])
def test_json_lines_that_hold_a_list_say_so(tmp_path, source):
    (tmp_path / "rows.jsonl").write_text('\ufeff [\n{"messages": []}]', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl holds a JSON list.* name it \.json"):
        load_records(DataSource.kinds()[source](path=str(tmp_path / "rows.jsonl")))


def test_a_list_of_chats_is_read_as_its_lines_are(tmp_path):
    rows = [{"messages": conversation_of("A tree?", answer)} for answer in ("Yes", "No")]
    (tmp_path / "chat.json").write_text(json.dumps(rows, indent=1))
    records = load_records(ChatData(path=str(tmp_path / "chat.json")))
    assert [record.messages for record in records] == [row["messages"] for row in rows]
    assert records[1].name == "chat.json:2"


@pytest.mark.parametrize("source", ["chat", "llava"])
def test_a_pipe_or_folder_in_place_of_a_text_file_is_refused(tmp_path, source):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name, found in (("pipe.jsonl", "no regular file"), ("folder.jsonl", "a folder")):
        with pytest.raises(ValueError, match=rf"{name} is {found}; expected a text file"):
            load_records(DataSource.kinds()[source](path=str(tmp_path / name)))


def test_a_number_of_thousands_of_digits_is_a_fault_of_its_row(tmp_path):
    entry = json.dumps({"conversations": turns_of("Hello", "Hi")})
    (tmp_path / "x.jsonl").write_text(f'{entry}\n{entry[:-1]}, "id": {"9" * 6000}}}')
    records = load_records(LlavaData(path=str(tmp_path / "x.jsonl")))
    assert records[0].messages[1]["content"] == "Hi"
    with pytest.raises(SkipSampleError, match=r"(?s)x\.jsonl:2: .*cannot be read as JSON"):
        records[1]


def test_a_chat_may_hold_pictures_as_bytes_or_by_the_key_image(tmp_path):
    item = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    named = {"type": "image", "image": "sub\\a.png"}
    asked = {"role": "user", "content": [item, named, {"type": "text", "text": "What?"}]}
    [record] = chats(tmp_path, {"messages": [asked, {"role": "assistant", "content": "A car"}]})
    assert record.messages[0]["content"] == [
        {"type": "image", "image": b"hello"},
        {"type": "image", "path": str(tmp_path.resolve() / "sub" / "a.png")},
        {"type": "text", "text": "What?"},
    ]
    assert record.unread == ()
