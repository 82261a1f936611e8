"""Text files are UTF-8 whatever the machine's locale says: every place that reads or writes one says so."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

FOLDERS = ("hovle", "train", "eval", "dev")
READERS = {"read_text", "write_text", "open", "NamedTemporaryFile"}


def unsaid(tree: ast.AST) -> Iterator[int]:
    """Lines of calls that open a file as text without its encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        said = {keyword.arg for keyword in node.keywords}
        constants = [item.value for item in node.args if isinstance(item, ast.Constant)]
        modes = [value for value in constants if isinstance(value, str) and set(value) <= set("rwxab+t")]
        is_builtin = isinstance(node.func, ast.Name)
        is_own = is_builtin and name in ("read_text", "write_text")  # a function of ours
        if name not in READERS or "encoding" in said or is_own:
            continue
        is_text = name != "open" or is_builtin or modes  # an `open` of something else has no mode
        if is_text and not any("b" in mode for mode in modes):
            yield node.lineno


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_text_file_is_opened_with_its_encoding(folder):
    files = [path for path in (ROOT / folder).rglob("*.py") if "build" not in path.parts]
    found = {f"{path.relative_to(ROOT)}:{line}" for path in files for line in unsaid(parse(path))}
    assert not found


def parse(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("path.read_text()", True),
        ("path.write_text(text)", True),
        ("open(name)", True),
        ("path.open('a')", True),
        ("open(name, 'rb')", False),
        ("path.open('xb')", False),
        ("path.read_text(encoding='utf-8')", False),
        ("Image.open(name)", False),
        ("read_text(source)", False),
    ],
)
def test_the_search_finds_what_it_shall(source, is_found):
    assert bool([*unsaid(ast.parse(source))]) == is_found
