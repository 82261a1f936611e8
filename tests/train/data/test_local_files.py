"""Local files of data sets: nothing is lost by its name, and what is left aside or damaged is named."""

import csv
import gzip
import io
import itertools
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from hovle.train.config import HuggingFaceData, PictureData
from hovle.train.data.local_files import find_files
from hovle.train.data.mixture import Mixture, MixtureReader
from hovle.train.data.readers import load_records
from hovle.train.data.records import inside, picture_sources
from hovle.train.data.skips import SkipSampleError


def encoded(number: int = 0, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (50, 60), (number * 10, 0, 0)).save(file, kind)
    return file.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def config_of(path: Path, **fields) -> HuggingFaceData:
    return HuggingFaceData(path=str(path), **fields)


def write(folder: Path, **files: bytes | str) -> Path:
    """Files by their names, in which two underscores stand for a slash."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def parquet(path: Path, *answers: str) -> None:
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"images": [], "texts": [{"user": "?", "assistant": answer}]} for answer in answers]
    datasets.Dataset.from_list(rows).to_parquet(str(path))


def read_all(config: HuggingFaceData, count: int | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """Replies of the first epoch by the pictures' names or numbers of records, and the skips by their reasons."""
    records = load_records(config)
    reader = MixtureReader(Mixture([records], seed=0), 0, 1, {})
    replies, skips = {}, {}
    for index in range(len(records) if count is None else count):
        try:
            record = reader.record_at(index)
            replies[record.name] = record.messages[-1]["content"]
        except SkipSampleError as error:
            skips[str(error)] = error.reason
    return replies, skips


def said(replies: dict[str, str]) -> list[str]:
    texts = [content if isinstance(content, str) else content[0]["text"] for content in replies.values()]
    return sorted(texts)


def left_aside(config) -> str:
    return "\n".join(load_records(config).left_aside)


# --- names that look like splits -------------------------------------------------------------------------------------

FOLDERS = ("train", "test", "val", "bus", "eval-2024", "dev")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["pictures", "captions", "tars", "parquet"])
def test_folders_and_files_named_like_splits_lose_nothing(tmp_path, kind, streaming):
    for number, name in enumerate(FOLDERS):
        place = tmp_path / "set" / name
        place.mkdir(parents=True)
        if kind == "parquet":
            parquet(place / f"{number}.parquet", name)
        elif kind == "tars":
            with tarfile.open(place / f"{name}_{number}.tar" if number != 3 else place / "shard.tar", "w") as tar:
                add(tar, "0.png", encoded())
                add(tar, "0.txt", name.encode())
        else:
            (place / f"{name}_{number}.png").write_bytes(encoded(number))
            if kind == "captions":
                (place / f"{name}_{number}.txt").write_text(name)
    config = config_of(tmp_path / "set", streaming=streaming)
    replies, skips = read_all(config, len(FOLDERS))
    assert not skips
    assert len(replies) == len(FOLDERS)
    if kind != "pictures":
        assert said(replies) == sorted(FOLDERS)
    assert "read whole, although names tell of splits" in left_aside(config)
    if kind == "pictures":
        assert len(load_records(PictureData(path=str(tmp_path / "set")))) == len(FOLDERS)


def test_a_split_that_is_asked_for_is_read_and_the_others_are_named(tmp_path):
    for name in ("train", "test", "val"):
        write(tmp_path / "set", **{f"{name}/a.png": encoded(), f"{name}/a.txt": name})
    config = config_of(tmp_path / "set", split="test")
    assert said(read_all(config)[0]) == ["test"]
    assert "left aside 4 files that are not of the split test (2 .png, 2 .txt): a.png" in left_aside(config)
    assert said(read_all(config_of(tmp_path / "set", split="all"))[0]) == ["test", "train", "val"]
    assert len(read_all(config_of(tmp_path / "set", split="train+validation"))[0]) == 2
    with pytest.raises(ValueError, match=r"no file .* split 'gold'.* found are: test, train, validation"):
        load_records(config_of(tmp_path / "set", split="gold"))


def test_files_that_all_begin_with_a_split_are_read_as_datasets_wrote_them(tmp_path):
    folder = tmp_path / "set" / "data"
    parquet(folder / "train-00000-of-00002.parquet", "a")
    parquet(folder / "train-00001-of-00002.parquet", "b")
    parquet(folder / "test-00000-of-00001.parquet", "secret")
    config = config_of(tmp_path / "set")
    assert said(read_all(config)[0]) == ["a", "b"]
    assert "left aside 1 files that are not of the split train (1 .parquet): test-00000" in left_aside(config)
    assert said(read_all(config_of(tmp_path / "set", split="test"))[0]) == ["secret"]
    assert said(read_all(config_of(tmp_path / "set", split="train[:1]"))[0]) == ["a"]
    assert said(read_all(config_of(folder / "t*.parquet"))[0]) == ["a", "b", "secret"]


def test_names_with_signs_of_patterns_are_names(tmp_path):
    parquet(tmp_path / "set [1]" / "a*b?[2].parquet", "a")
    assert said(read_all(config_of(tmp_path / "set [1]"))[0]) == ["a"]


# --- what is left aside ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["pictures", "huggingface"])
def test_what_is_no_data_is_counted_by_name(tmp_path, source):
    folder = write(
        tmp_path / "set",
        **{"a.png": encoded(), "__MACOSX/._a.png": b"x", "._a.png": b"x", ".cache/b.png": encoded(), "LICENSE": b"x"},
        **{"notes.md": b"x", "Thumbs.db": b"x"},
    )
    os.mkfifo(folder / "pipe.png")
    config = PictureData(path=str(folder)) if source == "pictures" else config_of(folder)
    assert len(load_records(config)) == 1
    shown = left_aside(config)
    assert "left aside 4 hidden files and copies that systems make" in shown
    assert "left aside 1 files that are no regular files (1 .png): pipe.png" in shown
    assert "): LICENSE, notes.md" in shown


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_whose_questions_share_pictures_tell_what_they_leave_aside(tmp_path, streaming):
    folder = write(tmp_path / "set", **{"a.png": encoded(), "a.txt": "one", "notes.md": "x"})
    assert "notes.md" in left_aside(config_of(folder, questions_per_sample=2, streaming=streaming))


@pytest.mark.parametrize("layout", ["parquet", "tars"])
def test_a_licence_or_a_pipe_beside_files_of_rows_does_not_stop_them(tmp_path, layout):
    if layout == "parquet":
        parquet(tmp_path / "set" / "part.parquet", "a")
    else:
        (tmp_path / "set").mkdir()
        with tarfile.open(tmp_path / "set" / "part.tar", "w") as tar:
            add(tar, "0.txt", b"a")
    (tmp_path / "set" / "LICENSE").write_text("free")
    os.mkfifo(tmp_path / "set" / f"pipe.{layout.removesuffix('s')}")
    config = config_of(tmp_path / "set")
    assert said(read_all(config)[0]) == ["a"]
    assert "LICENSE" in left_aside(config)
    assert "pipe" in left_aside(config)


def test_a_pipe_in_place_of_data_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(ValueError, match=r"pipe\.tar holds no parquet files, tars or pictures .*no regular files"):
        load_records(config_of(tmp_path / "pipe.tar"))


# --- tars ------------------------------------------------------------------------------------------------------------


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in members.items():
            add(tar, name, data)
    return path


def samples(count: int) -> dict[str, bytes]:
    return {
        f"{number:02d}.{suffix}": data
        for number in range(count)
        for suffix, data in (("png", encoded(number)), ("txt", f"answer {number}".encode()))
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_members_of_all_names_and_kinds_are_read(tmp_path, streaming):
    png, jpg = encoded(1), encoded(1, "JPEG")
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "json"}]
    members = {
        "0.png": png,
        "0.txt": b"png",
        "1.jpg": jpg,
        "1.txt": b"jpg",
        "__MACOSX/._1.jpg": b"\0",
        "2.JPG": jpg,
        "2.TXT": b"capitals",
        "._3.jpg": b"\0",
        "v1.2_car.png": png,
        "v1.2_car.txt": b"dots",
        "v1.3_car.jpg": jpg,
        "v1.3_car.txt": b"more dots",
        "./4.webp": encoded(1, "WEBP"),
        "./4.txt": b"dot first",
        "a.b/5.json": json.dumps({"conversations": turns}).encode(),
        "a.b/5.png": png,
        "a.b/6.txt": b"alone",
    }
    tar_of(tmp_path / "set" / "mixed.tar", members)
    replies, skips = read_all(config_of(tmp_path / "set", streaming=streaming), 8)
    assert not skips
    assert said(replies) == sorted(["png", "jpg", "capitals", "dots", "more dots", "dot first", "json", "alone"])
    records = load_records(config_of(tmp_path / "set"))
    unread = [records[place].unread for place in range(len(records))]
    assert [*itertools.chain(*unread)] == ["__MACOSX/._1.jpg", "._3.jpg"]


def test_parts_of_a_sample_with_a_name_of_its_own_belong_together(tmp_path):
    members = {"7.left.png": encoded(1), "7.right.png": encoded(2), "7.txt": b"both", "8.png": encoded(3)}
    records = load_records(config_of(tar_of(tmp_path / "pairs.tar", members)))
    assert [len(picture_sources(records[place].messages)) for place in range(2)] == [2, 1]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("where", ["header", "member", "border", "junk", "behind"])
def test_a_damaged_tar_gives_the_rows_before_the_damage_and_is_named(tmp_path, streaming, where):
    data = tar_of(tmp_path / "whole.tar", samples(10)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        start = tar.getmember("06.png").offset
        body = tar.getmember("06.png").offset_data
    damaged = {
        "header": data[: start + 100],
        "member": data[: body + 50],
        "border": data[:start],
        "junk": data[:start] + b"<html>" * 200,
        "behind": data + data,
    }[where]
    write(tmp_path / "set", **{"damaged.tar": damaged})
    tar_of(tmp_path / "set" / "sound.tar", {"x.png": encoded(), "x.txt": b"sound"})
    replies, skips = read_all(config_of(tmp_path / "set", streaming=streaming), 12 if where == "behind" else 7)
    assert "sound" in said(replies)
    num_before = 10 if where == "behind" else 5  # of a sample before the cut, members may be lost
    assert [text for text in said(replies) if text != "sound"] == [f"answer {n}" for n in range(num_before)]
    [(skip, reason)] = skips.items()
    assert reason == "malformed"
    assert "damaged.tar goes on behind its end mark" in skip if where == "behind" else "damaged.tar is damaged" in skip
    assert where == "behind" or "05 may lack members and is left out" in skip


@pytest.mark.parametrize("streaming", [False, True])
def test_an_error_page_named_as_a_tar_is_skipped_beside_others_and_refused_alone(tmp_path, streaming):
    page = b"<!DOCTYPE html><html><body>404: not found</body></html>"
    write(tmp_path / "set", **{"b.tar": page, "c.tar": b""})
    with pytest.raises(ValueError, match=r"b\.tar is no tar, it begins with b'<!DOCTYPE html.*c\.tar is no tar"):
        load_records(config_of(tmp_path / "set", streaming=streaming))
    tar_of(tmp_path / "set" / "a.tar", samples(2))
    replies, skips = read_all(config_of(tmp_path / "set", streaming=streaming), 4)
    assert said(replies) == ["answer 0", "answer 1"]
    assert len(skips) == 2
    assert all(any(f"{name}.tar " in skip for skip in skips) for name in "bc")


def test_packed_tars_are_read_and_cut_ones_are_named(tmp_path):
    path = tar_of(tmp_path / "set" / "a.tar.gz", samples(4))
    assert len(read_all(config_of(tmp_path / "set"))[0]) == 4
    path.write_bytes(path.read_bytes()[:-40])
    _, skips = read_all(config_of(tmp_path / "set"))
    assert any("a.tar.gz is damaged or cut" in skip for skip in skips)
    (tmp_path / "set" / "a.tar.gz").write_bytes(gzip.compress(b"no tar"))
    with pytest.raises(ValueError, match=r"a\.tar\.gz is no tar"):
        load_records(config_of(tmp_path / "set"))


@pytest.mark.parametrize("data", [b"<!DOCTYPE html>", b"", b"PAR1 and cut"])
def test_a_parquet_file_that_is_none_is_refused_by_name(tmp_path, data):
    parquet(tmp_path / "set" / "a.parquet", "a")
    write(tmp_path / "set", **{"b.parquet": data})
    with pytest.raises(ValueError, match=r"huggingface:set: b\.parquet is "):
        load_records(config_of(tmp_path / "set"))


def test_numbers_of_thousands_of_digits_are_faults_of_their_rows(tmp_path):
    number = '{"text": "A car", "size": ' + "9" * 6000 + "}"
    tar_of(tmp_path / "a.tar", {"0.json": number.encode(), "1.txt": b"sound"})
    replies, skips = read_all(config_of(tmp_path / "a.tar"))
    assert said(replies) == ["sound"]
    assert ["0.json of a.tar cannot be decoded" in skip for skip in skips] == [True]
    lines = ['{"file_name": "a.png", "text": "a"}', number]
    folder = write(tmp_path / "set", **{"a.png": encoded(), "metadata.jsonl": "\n".join(lines)})
    replies, skips = read_all(config_of(folder))
    assert said(replies) == ["a"]
    assert ["metadata.jsonl:2 cannot be read as JSON" in skip for skip in skips] == [True]


# --- folders of pictures ---------------------------------------------------------------------------------------------


def test_pictures_that_metadata_does_not_name_are_left_aside_by_name(tmp_path):
    folder = write(
        tmp_path / "set",
        **{f"{name}.png": encoded() for name in ("a", "b", "sub/c")},
        **{"metadata.jsonl": '{"file_name": "a.png", "text": "one"}\n', "b.txt": "two"},
    )
    config = config_of(folder)
    assert said(read_all(config)[0]) == ["one"]
    assert "left aside 2 files of pictures that no metadata names (2 .png): b.png, c.png" in left_aside(config)
    assert "left aside 1 files of text, as there is metadata" in left_aside(config)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_metadata_names_its_columns_in_the_recipe(tmp_path, kind, streaming):
    rows = [
        {"photo": "sub\\a.png", "title": "one", "text": "not this"},
        {"photo": "sub/b.png", "title": "two,\nthree", "text": "nor this"},
    ]
    folder = write(tmp_path / "set", **{"sub/a.png": encoded(1), "sub/b.png": encoded(2)})
    file = folder / f"metadata.{kind}"
    if kind == "csv":
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(str(file))
    with pytest.raises(ValueError, match=r"has the columns photo, title, text; expected file_name"):
        load_records(config_of(folder))
    with pytest.raises(ValueError, match=r"has the columns photo, title, text; expected picture"):
        load_records(config_of(folder, columns={"image": "picture"}))
    config = config_of(folder, columns={"image": "photo", "caption": "title"}, streaming=streaming)
    replies, skips = read_all(config, 2)
    assert not skips
    assert said(replies) == ["one", "two,\nthree"]
    assert not any("metadata names" in line for line in load_records(config).left_aside)


def test_texts_beside_pictures_are_captions(tmp_path):
    folder = write(
        tmp_path / "set",
        **{"a.png": encoded(1), "a.txt": "\ufeffone\n", "b.png": encoded(2), "lonely.txt": "three"},
        **{"c.png": encoded(2), "c.txt": "\u4e00\u8f86\u516c".encode("gbk")},
    )
    config = config_of(folder, prompt="What is it?")
    replies, skips = read_all(config)
    assert said(replies) == ["", "one"]  # b has no caption, so nothing to learn
    assert ["c.txt is not in UTF-8" in skip for skip in skips] == [True]
    assert "left aside 1 files of text without a picture (1 .txt): lonely.txt" in left_aside(config)
    record = load_records(config)[0]
    assert [item.get("text", "") for item in record.messages[0]["content"]] == ["", "What is it?"]


def test_a_line_of_metadata_that_cannot_be_read_is_a_skip(tmp_path):
    folder = write(
        tmp_path / "set", **{"a.png": encoded(), "metadata.csv": "file_name,text\na.png,one\na.png,two,three\n"}
    )
    replies, skips = read_all(config_of(folder))
    assert said(replies) == ["one"]
    assert ["line 3 of metadata.csv has more values" in skip for skip in skips] == [True]


def test_links_into_a_snapshot_of_the_hub_are_followed(tmp_path):
    folder = tmp_path / "datasets--x" / "snapshots" / "abc" / "pictures"
    folder.mkdir(parents=True)
    write(tmp_path / "datasets--x", **{"blobs/123": encoded()})
    (folder / "a.png").symlink_to(tmp_path / "datasets--x" / "blobs" / "123")
    assert len(load_records(PictureData(path=str(folder)))) == 1
    assert len(load_records(config_of(folder))) == 1
    (folder / "b.png").symlink_to(tmp_path / "datasets--x" / "refs")
    with pytest.raises(ValueError, match=r"'b\.png' lies outside"):
        load_records(PictureData(path=str(folder)))


@pytest.mark.parametrize("name", ["C:\\pictures\\a.png", "\\\\host\\a.png", "..\\..\\a.png"])
def test_windows_paths_stay_inside_the_folder(tmp_path, name):
    write(tmp_path / "set", **{"sub/a.png": encoded()})
    assert inside(tmp_path / "set", "sub\\a.png") == (tmp_path / "set" / "sub" / "a.png").resolve()
    with pytest.raises(ValueError, match="lies outside"):
        inside(tmp_path / "set", name)


# --- what save_to_disk wrote -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_what_save_to_disk_wrote_is_read(tmp_path, streaming):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = [{"image": {"bytes": encoded(n), "path": None}, "caption": f"answer {n}"} for n in range(3)]
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(str(tmp_path / "both"))
    answers = ["answer 0", "answer 1", "answer 2"]
    assert said(read_all(config_of(tmp_path / "one", streaming=streaming), 3)[0]) == answers
    config = config_of(tmp_path / "both", streaming=streaming)
    assert said(read_all(config, 3)[0]) == answers
    assert "left aside the splits test (1 rows)" in left_aside(config)
    assert said(read_all(config_of(tmp_path / "both", split="test"))[0]) == ["answer 0"]
    with pytest.raises(ValueError, match=r"no split 'val'; it has train, test"):
        load_records(config_of(tmp_path / "both", split="val"))


def test_a_hub_id_is_no_local_path():
    assert find_files(HuggingFaceData(path="owner/name")) is None
