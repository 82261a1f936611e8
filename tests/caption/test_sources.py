"""What is to be captioned: every picture under a name of its own, nothing left aside in silence."""

import io

import pytest
from PIL import Image

from hovle.caption.sources import find_items
from hovle.train.data.skips import SkipSampleError


def draw(path, color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path)
    return path


def names_of(*sources, **options) -> list[str]:
    return [item.name for item in find_items([str(source) for source in sources], **options)[0]]


def test_a_folder_is_read_with_its_subfolders_and_equal_names_are_told_apart(tmp_path):
    for name in ("b/a.jpg", "a/a.jpg", "a.PNG"):
        draw(tmp_path / name)
    (tmp_path / "notes.md").write_text("x")
    draw(tmp_path / ".hidden.png")
    items, left_aside = find_items([str(tmp_path)])
    assert [item.name for item in items] == [str(tmp_path / name) for name in ("a/a.jpg", "a.PNG", "b/a.jpg")]
    assert [item.load() for item in items] == [[tmp_path / name] for name in ("a/a.jpg", "a.PNG", "b/a.jpg")]
    assert "notes.md" in left_aside[0]
    assert ".hidden.png" in left_aside[1]


def test_a_list_names_files_relative_to_itself_in_its_order(tmp_path):
    (tmp_path / "list.txt").write_text("b.png\n\nsub/a.xyz\nb.png\n", encoding="utf-8-sig")
    expected = [str(tmp_path / name) for name in ("b.png", "sub/a.xyz", "b.png")]
    assert names_of(tmp_path / "list.txt") == expected
    assert names_of(tmp_path / "gone.jpg", tmp_path / "list.txt") == [str(tmp_path / "gone.jpg"), *expected]


def test_rows_of_a_data_set_have_numbers(tmp_path):
    datasets = pytest.importorskip("datasets")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    rows = {"photo": [{"bytes": buffer.getvalue(), "path": None}] * 2 + [None], "title": ["a", "b", "c"]}
    features = datasets.Features({"photo": datasets.Image(), "title": datasets.Value("string")})
    file = tmp_path / "data.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    items, _ = find_items([str(file)], column="photo")
    assert [item.name for item in items] == [f"{file}[{place}]" for place in range(3)]
    assert items[1].load() == [buffer.getvalue()]
    with pytest.raises(SkipSampleError, match=r"data\.parquet\[2\]: its columns hold no picture"):
        items[2].load()
    with pytest.raises(ValueError, match="its column 'photo' holds pictures, but only image, images"):
        find_items([str(file)])


def test_what_holds_no_pictures_is_refused(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(ValueError, match=r"a\.pdf: expected a folder, .*found a file of another kind"):
        find_items([str(tmp_path / "a.pdf")])
    with pytest.raises(ValueError, match=r"gone: expected a folder, .*found no such file"):
        find_items([str(tmp_path / "gone")])
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"list\.txt holds no pictures"):
        find_items([str(tmp_path / "list.txt")])
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"list\.txt is no list of files"):
        find_items([str(tmp_path / "list.txt")])
