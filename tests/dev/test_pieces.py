"""`dev/pieces.py`: a folder cut into pieces comes back as it was, or not at all."""

import importlib.util
from types import ModuleType

import pytest
from places import ROOT


@pytest.fixture(scope="module")
def pieces() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("pieces", ROOT / "dev" / "pieces.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path):
    """A folder of a large, an empty and a nested file."""
    folder = tmp_path / "model"
    (folder / "code").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(256)) * 10)
    (folder / "empty").touch()
    (folder / "code" / "a.py").write_text("a = 1\n")
    return folder


def contents(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pieces_are_no_larger_than_said_and_make_the_same_folder(pieces, model, tmp_path):
    assert pieces.cut(model, tmp_path / "cut", size=1000) == 4
    assert max(path.stat().st_size for path in (tmp_path / "cut").iterdir() if path.name.isdecimal()) == 1000
    assert pieces.join(tmp_path / "cut", tmp_path / "joined") == 3
    assert contents(tmp_path / "joined") == contents(model)


@pytest.mark.parametrize(
    ("damage", "message"), [("delete", "lacks 1 pieces, such as 0002"), ("change", "are damaged")]
)
def test_what_is_missing_or_damaged_is_refused_and_leaves_no_folder(pieces, model, tmp_path, damage, message):
    pieces.cut(model, tmp_path / "cut", size=1000)
    piece = tmp_path / "cut" / "0002"
    if damage == "delete":
        piece.unlink()
    else:
        piece.write_bytes(bytes(1000))
    with pytest.raises(ValueError, match=message):
        pieces.join(tmp_path / "cut", tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
