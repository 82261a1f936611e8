"""Sources read by `datasets`: rows of every layout become records, streams continue where they stopped."""

import dataclasses
import io
import itertools
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from hovle import HoVLEProcessor
from hovle.train.config import ChatData, HuggingFaceData
from hovle.train.data.mixture import Mixture, MixtureReader
from hovle.train.data.packing import PackedBatches, StreamPosition, load_batches
from hovle.train.data.readers import load_records
from hovle.train.data.samples import ReplySamples
from hovle.train.data.skips import SkipSampleError

NUM_ROWS = 24


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (50, 60), (number * 10, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path) -> Path:
    """Four tars of six conversations each, with a member that only unpickling could read."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard in range(4):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as tar:
            for number in range(shard * 6, shard * 6 + 6):
                turns = [{"from": "human", "value": f"<image>{number}?"}, {"from": "gpt", "value": f"answer {number}"}]
                members = {
                    "png": png(number),
                    "json": json.dumps({"conversations": turns}).encode(),
                    "pth": b"\x80bad",
                }
                for suffix, data in members.items():
                    add_member(tar, f"{number:04d}.{suffix}", data)
    return folder


@pytest.fixture
def parquet(tmp_path) -> Path:
    """Two parquet files with a picture and the turns of FineVision's format."""
    import datasets

    folder = tmp_path / "parquet"
    folder.mkdir()
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List({"user": datasets.Value("string"), "assistant": datasets.Value("string")}),
        }
    )
    for shard in range(2):
        rows = [
            {
                "images": [{"bytes": png(number), "path": None}],
                "texts": [
                    {"user": f"{number}?", "assistant": f"answer {number}"},
                    {"user": "Sure?", "assistant": "Yes"},
                ],
            }
            for number in range(shard * 12, shard * 12 + 12)
        ]
        dataset = datasets.Dataset.from_list(rows, features=features)
        dataset.to_parquet(str(folder / f"train-{shard}.parquet"))
    return folder


def config_of(path: Path, **fields) -> HuggingFaceData:
    return HuggingFaceData(path=str(path), **fields)


def replies(record) -> list[str]:
    return [message["content"] for message in record.messages if message["role"] == "assistant"]


def test_tars_are_read_and_what_would_need_unpickling_is_left_alone(tars):
    records = load_records(config_of(tars))
    assert len(records) == NUM_ROWS
    record = records[7]
    assert record.name == "huggingface:tars[7] (0007)"
    assert record.messages[0]["content"] == [
        {"type": "image", "image": png(7)},
        {"type": "text", "text": "7?"},
    ]
    assert replies(record) == ["answer 7"]
    assert record.unread == ("pth",)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("member", [b'{"conversations": [', b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("place", [0, 5])  # among the rows from which `datasets` infers the columns, and after them
def test_a_broken_member_of_a_tar_is_a_skip_that_names_it(tmp_path, streaming, member, place):
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A car"}]
    members = [json.dumps({"conversations": turns}).encode()] * 8
    members[place] = member
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number, data in enumerate(members):
            add_member(tar, f"{number:04d}.png", png(number))
            add_member(tar, f"{number:04d}.json", data)
    reader = MixtureReader(Mixture([load_records(config_of(tmp_path, streaming=streaming))], seed=0), 0, 1, {})
    skips, read_well = [], 0
    for index in range(8):
        try:
            read_well += replies(reader.record_at(index)) == ["A car"]
        except SkipSampleError as error:
            skips.append(error)
    assert read_well == 7
    [skip] = skips
    assert skip.reason == "malformed"
    assert f"({place:04d}): {place:04d}.json of shard.tar cannot be decoded" in str(skip)


def test_a_data_set_that_cannot_be_prepared_is_named(tmp_path):
    import datasets

    for number, column in enumerate(("text", "caption")):
        rows = [{column: "A car"}]
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / f"{number}.parquet"))
    with pytest.raises(ValueError, match=r"huggingface:.*: `datasets` cannot prepare its rows \(.*caption"):
        load_records(config_of(tmp_path))


def test_parquet_rows_become_conversations_with_the_picture_first(parquet):
    records = load_records(config_of(parquet))
    assert len(records) == NUM_ROWS
    assert records[3].messages[0]["content"] == [
        {"type": "image", "image": png(3)},
        {"type": "text", "text": "3?"},
    ]
    assert replies(records[3]) == ["answer 3", "Yes"]
    assert load_records(config_of(parquet)).fingerprint == records.fingerprint


def test_a_picture_folder_gives_captions_from_its_metadata(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = []
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"caption {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    records = load_records(config_of(folder, format="imagefolder", prompt="Describe it."))
    assert [replies(records[place]) for place in range(3)] == [[f"caption {number}"] for number in range(3)]
    picture, text = records[1].messages[0]["content"]
    assert Path(picture["path"]) == folder / "1.png"
    assert text["text"] == "Describe it."


def row(**columns) -> dict:
    return {"image": {"bytes": png(0), "path": None}, **columns}


@pytest.mark.parametrize(
    ("columns", "reason", "detail"),
    [
        ({"conversations": [{"from": "human", "value": "no mark"}]}, "picture count", "0 <image> marks"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "malformed", "robot"),
        ({"images": [{"bytes": png(1), "path": None}]}, "malformed", "found image, images"),
        ({"image": {"bytes": None, "path": "/etc/passwd"}}, "picture outside its folder", "lies outside"),
        ({"image": {"bytes": None, "path": None}}, "missing file", "without bytes"),
        ({"image": None}, "missing file", "its image is empty"),
        ({"image": None, "text": "a red car"}, "missing file", "its image is empty"),
        ({"image": None, "jpg": None, "txt": "a red car"}, "missing file", "its image, jpg is empty"),
        ({"image": "pic.png", "text": "a red car"}, "missing file", "its image is the text 'pic.png'"),
        ({"image": "pic.png", "texts": [{"user": "What?", "assistant": "A car"}]}, "missing file", "the text 'pic"),
        ({"image": "pic.png", "conversations": [{"from": "human", "value": "?"}]}, "missing file", "the text 'pic"),
        ({"picture": png(1), "text": "a red car"}, "picture in an unknown column", "its column 'picture' holds a pic"),
        ({"shots": [{"bytes": png(1)}], "text": "a red car"}, "picture in an unknown column", "its column 'shots'"),
        ({"image": [], "count": 3}, "malformed", "expected a conversation, a caption or one picture, found image, co"),
    ],
)
def test_rows_that_are_not_usable_say_why(columns, reason, detail, tmp_path):
    from hovle.train.data.huggingface import record_from_row

    with pytest.raises(SkipSampleError, match=f"a row: .*{detail}") as caught:
        record_from_row(row(**columns), "a row", config_of(tmp_path))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "columns",
    [
        {"images": [], "texts": [{"user": "What is it?", "assistant": "A car"}]},
        {"image": None, "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "A car"}]},
        {"text": "A car", "pth": b"\x80bad"},
    ],
)
def test_rows_that_say_they_have_no_picture_are_text(columns, tmp_path):
    from hovle.train.data.huggingface import record_from_row

    record = record_from_row(columns, "a row", config_of(tmp_path))
    assert replies(record) == ["A car"]
    assert all(isinstance(message["content"], str) for message in record.messages)


@pytest.mark.parametrize("kind", ["one", "list"])
@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_in_a_column_nobody_reads_are_refused(kind, streaming, tmp_path):
    import datasets

    picture = {"bytes": png(0), "path": None}
    feature = datasets.Image() if kind == "one" else datasets.List(datasets.Image())
    features = datasets.Features({"photo": feature, "text": datasets.Value("string")})
    rows = [{"photo": picture if kind == "one" else [picture], "text": "a red car"}]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "set" / "train.parquet"))
    with pytest.raises(
        ValueError, match=r"huggingface:set: its column 'photo' holds pictures, but only image, images"
    ):
        load_records(config_of(tmp_path / "set", streaming=streaming))


def test_messages_of_a_row_keep_their_pictures_where_they_stand(tmp_path):
    from hovle.train.data.huggingface import record_from_row

    content = [{"type": "text", "text": "Before "}, {"type": "image", "text": None}, {"type": "text", "text": "after"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes"}]
    record = record_from_row(row(messages=messages), "a row", config_of(tmp_path))
    assert [item["type"] for item in record.messages[0]["content"]] == ["text", "image", "text"]


def test_a_folder_without_known_files_is_refused(tmp_path):
    (tmp_path / "notes.md").touch()
    with pytest.raises(ValueError, match=r"no parquet files, tars or pictures \(\.md\)"):
        load_records(config_of(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_rewritten_file_of_the_same_size_is_noticed_and_a_copied_folder_is_not(parquet, tmp_path, streaming):
    before = load_records(config_of(parquet, streaming=streaming)).fingerprint
    copy = tmp_path / "copy" / "elsewhere"
    shutil.copytree(parquet, copy)
    assert load_records(config_of(copy, streaming=streaming)).fingerprint == before
    file = copy / "train-1.parquet"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes().replace(b"parquet-cpp", b"parquet-cpq"))  # who wrote it
    assert file.stat().st_size == size
    assert load_records(config_of(copy, streaming=streaming)).fingerprint != before


@pytest.mark.parametrize("streaming", [False, True])
def test_the_commit_of_a_hub_id_is_part_of_its_fingerprint(parquet, monkeypatch, streaming):
    import datasets

    load, asked = datasets.load_dataset_builder, []

    def from_the_hub(path, subset, revision):
        asked.append((path, revision))
        builder = load("parquet", data_dir=str(parquet))
        builder.hash = revision or "newest"
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", from_the_hub)
    config = config_of(Path("owner/set"), streaming=streaming)
    newest, pinned, again = (
        load_records(dataclasses.replace(config, revision=revision)).fingerprint for revision in (None, "abc", "abc")
    )
    assert asked == [("owner/set", None), ("owner/set", "abc"), ("owner/set", "abc")]
    assert (newest.partition("@")[2], pinned.partition("@")[2]) == ("newest", "abc")
    assert pinned == again != newest


def read(mixture: Mixture, indices, shard=0, num_shards=1, states=None) -> tuple[list[str], MixtureReader]:
    reader = MixtureReader(mixture, shard, num_shards, states or {})
    return [replies(reader.record_at(index))[0] for index in indices], reader


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_the_shards_of_a_run_share_the_rows_of_a_stream_and_shuffle_its_files(tars, num_shards):
    mixture = Mixture([load_records(config_of(tars, streaming=True))], seed=0)
    epochs = []
    for epoch in range(6):
        taken = []
        for shard in range(num_shards):
            indices = range(shard, 6 * NUM_ROWS, num_shards)
            share = NUM_ROWS // num_shards
            taken += read(mixture, indices, shard, num_shards)[0][epoch * share : (epoch + 1) * share]
        epochs.append(taken)
        assert sorted(taken) == sorted(f"answer {number}" for number in range(NUM_ROWS))
    assert len({tuple(taken) for taken in epochs}) > 1


@pytest.mark.parametrize("kind", ["tars", "parquet"])
def test_a_stream_continues_exactly_wherever_it_stopped(kind, request):
    config = config_of(request.getfixturevalue(kind), streaming=True)
    straight = read(Mixture([load_records(config)], seed=0), range(60))[0]
    for stop in (0, 1, 5, 6, 23, 24, 25, 40):
        _, reader = read(Mixture([load_records(config)], seed=0), range(stop))
        states = json.loads(json.dumps(reader.states(stop)[0]))  # plain values
        found, _ = read(Mixture([load_records(config)], seed=0), range(stop, 60), states={0: states})
        assert found == straight[stop:]


def test_a_stream_with_fewer_rows_than_shards_is_refused(tars):
    mixture = Mixture([load_records(config_of(tars, streaming=True))], seed=0)
    with pytest.raises(ValueError, match="fewer rows than shards"):
        read(mixture, [30], shard=30, num_shards=40)


def test_once_takes_every_row_of_a_stream_once(tars, checkpoints, next_token_config):
    mixture = Mixture([load_records(config_of(tars, streaming=True))], 0)
    maker = ReplySamples(HoVLEProcessor.from_pretrained(checkpoints["tied"]))
    batches = PackedBatches(mixture, maker, next_token_config(), StreamPosition(), 0, 1, 0, once=True)
    names = [name for batch in batches for name in batch.names]
    assert len(names) == len(set(names)) == NUM_ROWS


def test_a_mixture_with_a_stream_is_packed_and_resumed_exactly(tars, data, checkpoints, next_token_config):
    def batches(rank=0, world_size=1, start=None) -> PackedBatches:
        sources = [config_of(tars, streaming=True), ChatData(path=str(data / "chat.jsonl"))]
        mixture = Mixture([load_records(source) for source in sources], 0, [2, 1])
        config = next_token_config(f"gradient_accumulation_steps={2 // world_size}", "packing_window=6")
        maker = ReplySamples(HoVLEProcessor.from_pretrained(checkpoints["tied"]))
        return PackedBatches(mixture, maker, config, start or StreamPosition(), rank, world_size, 0)

    straight = list(itertools.islice(batches(), 8))
    assert any("huggingface:tars" in name for name in straight[0].names)
    assert any("chat.jsonl" in name for name in straight[0].names)
    names = [batch.names for batch in straight]
    for num_workers in (0, 1, 2):
        resumed = load_batches(batches(start=straight[3].position), num_workers)
        assert [batch.names for batch in itertools.islice(resumed, 4)] == names[4:]
    ranks = [list(itertools.islice(batches(rank, 2, straight[3].position), 2)) for rank in range(2)]
    assert [ranks[place % 2][place // 2].names for place in range(4)] == names[4:]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"url": "https://example.com/1", "caption": "a red car"}, "picture in an unknown column"),
        ({"URL": "https://example.com/1.jpg", "text": "a red car"}, "picture in an unknown column"),
        ({"image_url": "https://example.com/1", "caption": "a red car"}, "picture in an unknown column"),
        ({"img_path": "pics/1", "messages": "A"}, "picture in an unknown column"),
        ({"video": {"bytes": b"\x00", "path": None}, "messages": "A"}, "video or audio"),
        ({"mp4": b"\x00", "txt": "a red car"}, "video or audio"),
        ({"audio": "a.wav", "conversations": "A"}, "video or audio"),
        ({"tools": '[{"name": "search"}]', "messages": "A"}, "tools"),
        ({"messages": "<image>"}, "picture count"),
        ({"messages": "<video> What?"}, "video or audio"),
        ({"messages": [{"type": "audio", "audio": "a.wav"}]}, "video or audio"),
    ],
)
def test_a_row_of_a_data_set_about_what_is_not_read_is_skipped_by_reason(columns, reason, tmp_path):
    from hovle.train.data.huggingface import record_from_row

    if "messages" in columns:
        asked = {"role": "user", "content": columns["messages"]}
        columns = {**columns, "messages": [asked, {"role": "assistant", "content": "Yes"}]}
    if "conversations" in columns:
        columns = {**columns, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "Yes"}]}
    with pytest.raises(SkipSampleError, match="a row: ") as caught:
        record_from_row(columns, "a row", config_of(tmp_path))
    assert caught.value.reason == reason


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_pictures_and_system_beside_turns_are_shown_first(key, tmp_path):
    from hovle.train.data.huggingface import record_from_row

    names = ("role", "content") if key == "messages" else ("from", "value")
    turns = [dict(zip(names, turn, strict=True)) for turn in (("user", "What?"), ("assistant", "A car"))]
    columns = {key: turns, "images": [{"bytes": png(0), "path": None}], "system": "Be brief.", "rating": 5}
    record = record_from_row(columns, "a row", config_of(tmp_path))
    assert record.messages[0] == {"role": "system", "content": "Be brief."}
    assert [item["type"] for item in record.messages[1]["content"]] == ["image", "text"]
    assert record.unread == ("rating",)


def test_the_address_of_a_picture_that_is_there_does_no_harm(tmp_path):
    from hovle.train.data.huggingface import record_from_row

    record = record_from_row(row(url="https://example.com/1.jpg", caption="a red car"), "a row", config_of(tmp_path))
    assert replies(record) == ["a red car"]
    assert record.unread == ()


# --- layouts of rows -------------------------------------------------------------------------------------------------


def opened(tmp_path, rows: list[dict], features: dict | None = None, **fields):
    """Records of a parquet file with such rows."""
    import datasets

    (tmp_path / "set").mkdir()
    made = datasets.Features(features) if features else None
    datasets.Dataset.from_list(rows, features=made).to_parquet(str(tmp_path / "set" / "rows.parquet"))
    return load_records(config_of(tmp_path / "set", **fields))


def read_rows(records, count: int) -> list:
    """The first rows of an epoch in the order of their replies."""
    reader = MixtureReader(Mixture([records], seed=0), 0, 1, {})
    return sorted((reader.record_at(index) for index in range(count)), key=lambda record: str(replies(record)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["List", "LargeList", "Sequence", "list"])
def test_lists_of_pictures_of_every_kind_are_read(kind, streaming, tmp_path):
    import datasets

    feature = [datasets.Image()] if kind == "list" else getattr(datasets, kind)(datasets.Image())
    rows = [
        {"images": [{"bytes": png(n + m), "path": None} for m in range(2)], "question": "Same?", "answer": f"no {n}"}
        for n in range(2)
    ]
    features = {"images": feature, "question": datasets.Value("string"), "answer": datasets.Value("string")}
    records = read_rows(opened(tmp_path, rows, features, streaming=streaming), 2)
    for number, record in enumerate(records):
        content = record.messages[0]["content"]
        assert [item.get("image") for item in content] == [png(number), png(number + 1), None]
        assert replies(record) == [f"no {number}"]


PAIRS = [
    {"question": "What?", "answer": "A car"},
    {"question": "What?", "answer": ["A car"]},
    {"prompt": "What?", "completion": "A car"},
    {"query": "What?", "response": "A car"},
    {"prompt": [{"role": "user", "content": "What?"}], "completion": [{"role": "assistant", "content": "A car"}]},
    {"messages": json.dumps([{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A car"}])},
    {"conversations": json.dumps([{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A car"}])},
    {"texts": json.dumps([{"user": "What?", "assistant": "A car"}])},
]


@pytest.mark.parametrize("columns", PAIRS)
def test_questions_and_replies_are_read_as_turns(columns, tmp_path):
    from hovle.train.data.huggingface import record_from_row

    record = record_from_row(row(**columns), "a row", config_of(tmp_path))
    assert record.messages[0]["content"] == [{"type": "image", "image": png(0)}, {"type": "text", "text": "What?"}]
    assert replies(record) == ["A car"]
    assert record.unread == ()


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": "[" * 3000},
        {"messages": '[{"role": "user"}]'},
        {"conversations": "[1, 2"},
        {"question": "What?", "answer": ["A car", "A bus"]},
        {"prompt": 5, "completion": 6},
    ],
)
def test_turns_that_cannot_be_read_are_a_skip(columns, tmp_path):
    from hovle.train.data.huggingface import record_from_row

    with pytest.raises(SkipSampleError, match="a row: ") as caught:
        record_from_row(row(**columns), "a row", config_of(tmp_path))
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_inside_messages_are_read_where_they_stand(tmp_path, streaming):
    import datasets

    text = datasets.Value("string")
    item = {"type": text, "text": text, "image": datasets.Image()}
    features = {"messages": datasets.List({"role": text, "content": datasets.List(item)})}
    picture = {"type": "image", "text": None, "image": {"bytes": png(3), "path": None}}
    asked = [{"type": "text", "text": "Is ", "image": None}, picture, {"type": "text", "text": " red?", "image": None}]
    answered = [{"type": "text", "text": "Yes", "image": None}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    [record] = read_rows(opened(tmp_path, [{"messages": turns}], features, streaming=streaming), 1)
    assert record.messages[0]["content"] == [
        {"type": "text", "text": "Is "},
        {"type": "image", "image": png(3)},
        {"type": "text", "text": " red?"},
    ]


def test_items_name_their_pictures_in_every_form(tmp_path):
    import base64

    from hovle.train.data.huggingface import record_from_row

    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png(1))
    url = "data:image/png;base64," + base64.b64encode(png(2)).decode()
    forms = [
        ({"type": "image", "image": "sub\\a.png"}, str((tmp_path / "sub" / "a.png").resolve())),
        ({"type": "image", "path": "sub/a.png"}, str((tmp_path / "sub" / "a.png").resolve())),
        ({"type": "image", "image": png(1)}, png(1)),
        ({"type": "image", "image": url}, png(2)),
        ({"type": "image_url", "image_url": {"url": url}}, png(2)),
    ]
    for item, expected in forms:
        asked = {"role": "user", "content": [item, {"type": "text", "text": "?"}]}
        messages = [asked, {"role": "assistant", "content": "Yes"}]
        record = record_from_row({"messages": messages}, "a row", config_of(tmp_path))
        shown = record.messages[0]["content"][0]
        assert shown.get("path", shown.get("image")) == expected
        with pytest.raises(SkipSampleError, match="both in its messages and beside them"):
            record_from_row(row(messages=messages), "a row", config_of(tmp_path))
    for item, reason in (
        ({"type": "image_url", "image_url": {"url": "https://a/b.png"}}, "picture by address"),
        ({"type": "image", "image": "../b.png"}, "picture outside its folder"),
        ({"type": "image", "image": "data:image/png;base64,*"}, "unreadable picture"),
    ):
        with pytest.raises(SkipSampleError) as caught:
            record_from_row({"messages": [{"role": "user", "content": [item]}]}, "a row", config_of(tmp_path))
        assert caught.value.reason == reason


def test_names_of_pictures_in_the_folder_are_read(tmp_path):
    from hovle.train.data.huggingface import record_from_row

    (tmp_path / "a.png").write_bytes(png(1))
    rows = [{"image": "a.png", "question": "?", "answer": "Yes"}, {"images": ["a.png"], "text": "Yes"}]
    for columns in rows:
        record = record_from_row(columns, "a row", config_of(tmp_path))
        assert record.messages[0]["content"][0]["path"] == str((tmp_path / "a.png").resolve())
    with pytest.raises(SkipSampleError, match=r"its images are the texts \['b.png'\]"):
        record_from_row({"images": ["b.png"], "text": "Yes"}, "a row", config_of(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_recipe_says_what_other_columns_are(tmp_path, streaming):
    import datasets

    text = datasets.Value("string")
    features = {"photo": datasets.Image(), "mask": datasets.Image(), "q": text, "a": text, "text": text}
    picture = {"bytes": png(1), "path": None}
    rows = [{"photo": picture, "mask": picture, "q": "What?", "a": "A car", "text": "not this"}]
    columns = {"image": "photo", "question": "q", "answer": "a"}
    records = opened(tmp_path, rows, features, columns=columns, streaming=streaming)
    [record] = read_rows(records, 1)
    assert [item.get("text") for item in record.messages[0]["content"]] == [None, "What?"]
    assert replies(record) == ["A car"]
    assert record.unread == ("text",)
    with pytest.raises(ValueError, match=r"names 'photos', but the columns are: photo, mask, q, a, text"):
        load_records(config_of(tmp_path / "set", columns={"image": "photos"}))
    assert load_records(config_of(tmp_path / "set", columns={**columns, "caption": "text"})).fingerprint != (
        load_records(config_of(tmp_path / "set", columns=columns)).fingerprint
    )


def test_columns_that_nobody_reads_are_named_with_the_way_to_name_them(tmp_path):
    with pytest.raises(ValueError, match=r"none of its columns is read: problem, solution\. Say in data\.columns"):
        opened(tmp_path, [{"problem": "What?", "solution": "A car"}])
    with pytest.raises(ValueError, match="columns: 'picture' is none of what is read: image, messages"):
        HuggingFaceData(path="x", columns={"picture": "photo"})
