"""Folders appear whole, replace others without a gap in what is kept, and have reached the disk by then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hovle.files import atomic
from hovle.files.atomic import appear_when_complete


def write(text: str):
    return lambda folder: (folder / "weights").write_text(text)


@pytest.fixture
def events(monkeypatch) -> list[tuple[str, str]]:
    """`("fsync", name)` and `("rename", name)` in the order they happen."""
    found, fsync, rename = [], os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        found.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        found.append(("rename", target.name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    return found


def test_all_files_reach_the_disk_before_the_folder_has_its_name_and_the_name_after(tmp_path, events):
    def fill(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("a")
        (folder / "b").write_text("b")

    atomic.write_folder(tmp_path / "model", fill)
    renamed = events.index(("rename", "model"))
    assert {name for _, name in events[:renamed]} == {"a", "b", "inner", ".model.writing"}
    assert events[renamed + 1 :] == [("fsync", tmp_path.name)]


def test_a_folder_replaces_an_older_one(tmp_path):
    atomic.write_folder(tmp_path / "model", write("one"))
    atomic.write_folder(tmp_path / "model", write("two"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "two"


@pytest.mark.parametrize("moment", ["fill", "fsync", "rename"])
def test_what_fails_leaves_the_older_folder_and_nothing_else(tmp_path, monkeypatch, moment):
    atomic.write_folder(tmp_path / "model", write("one"))

    def fail(*args):
        raise OSError("No space left on device")

    original = os.rename
    if moment == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    if moment == "rename":
        monkeypatch.setattr(os, "rename", lambda *args: fail() if ".writing" in str(args[0]) else original(*args))
    with pytest.raises(OSError, match="No space"):
        atomic.write_folder(tmp_path / "model", fail if moment == "fill" else write("two"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "one"


def test_a_free_name_is_needed_where_nothing_may_be_replaced(tmp_path):
    atomic.write_folder(tmp_path / "one", write("one"))
    atomic.write_folder(tmp_path / "two", write("two"))
    with pytest.raises(OSError, match="not empty"):
        atomic.rename_durably(tmp_path / "two", tmp_path / "one")


def test_a_removed_folder_loses_its_name_first(tmp_path, monkeypatch):
    atomic.write_folder(tmp_path / "model", write("one"))
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda *args, **kwargs: None)  # killed before the rest
    atomic.remove_folder(tmp_path / "model")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [".model.old"]
    atomic.remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


WRITER = """
import sys, time
from pathlib import Path
from hovle.files.atomic import appear_when_complete

with appear_when_complete(Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("half")
    print(folder.name, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_writer_left_is_cleaned_and_a_live_one_s_stays(tmp_path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, tmp_path / "model"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        killed, alive = (tmp_path / writer.stdout.readline().strip() for writer in writers)
        writers[0].kill()
        writers[0].wait()
        (tmp_path / ".model-notes").mkdir()
        (tmp_path / ".other-0123abcd").mkdir()
        (tmp_path / ".model-0123abcd").mkdir()  # of an earlier version, which locked nothing
        with appear_when_complete(tmp_path / "model") as folder:
            (folder / "weights").write_text("whole")
        assert not killed.exists()
        assert (alive / "weights").read_text() == "half"
        kept = {".model-notes", ".other-0123abcd", alive.name, "model"}
        assert {path.name for path in tmp_path.iterdir()} == kept
        assert (tmp_path / "model" / "weights").read_text() == "whole"
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
