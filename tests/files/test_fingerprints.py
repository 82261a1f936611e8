"""Fingerprints: changed files are noticed, copied ones are not."""

import os
import shutil

import pytest

from hovle.files import fingerprints
from hovle.files.fingerprints import at_even_distances, fingerprint_files


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "first"
    path.mkdir()
    for number in range(4):
        (path / f"{number}.bin").write_bytes(bytes([number]) * 100_000)
    return path


def fingerprint(folder) -> str:
    return fingerprint_files([folder / f"{number}.bin" for number in range(4)], folder)


def rewrite(path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("most_bytes", [2**20, 0])  # read whole, and in blocks
def test_a_copy_elsewhere_and_later_is_the_same(folder, tmp_path, monkeypatch, most_bytes):
    monkeypatch.setattr(fingerprints, "MOST_BYTES", most_bytes)
    copy = shutil.copytree(folder, tmp_path / "second")
    os.utime(copy / "1.bin", (0, 0))
    assert fingerprint(copy) == fingerprint(folder)


@pytest.mark.parametrize("place", [0, 30_000, 99_999])
def test_a_byte_that_changed_is_noticed(folder, place):
    before = fingerprint(folder)
    rewrite(folder / "2.bin", place)
    assert fingerprint(folder) != before


@pytest.mark.parametrize(("place", "is_read"), [(0, True), (50_000, True), (99_999, True), (30_000, False)])
def test_of_what_is_large_beginning_middle_and_end_are_read(folder, monkeypatch, place, is_read):
    monkeypatch.setattr(fingerprints, "MOST_BYTES", 100_000)
    before = fingerprint(folder)
    rewrite(folder / "2.bin", place)
    assert (fingerprint(folder) != before) == is_read


def test_an_absent_file_and_another_name_are_noticed(folder):
    before = fingerprint(folder)
    (folder / "3.bin").rename(folder / "4.bin")
    absent = fingerprint(folder)
    renamed = fingerprint_files([folder / f"{number}.bin" for number in (0, 1, 2, 4)], folder)
    assert len({before, absent, renamed}) == 3


def test_items_are_chosen_at_even_distances():
    assert at_even_distances(range(10), 20) == list(range(10))
    assert at_even_distances(range(10), 4) == [0, 2, 5, 7]
    assert at_even_distances([], 4) == []
