"""The house has floors: no import runs up, none in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

FLOORS = [
    ["errors", "log_filters", "requirements", "version"],
    ["machine", "files", "options", "charts"],
    ["assets", "model"],
    ["packaged"],
    ["loading", "synthesis"],
    ["convert", "export"],
    ["language", "inference"],
    ["chat", "serve"],
    ["train.config", "train.parallel"],
    ["train.model"],
    ["train.data"],
    ["train.objectives", "caption"],
    ["train.step"],
    ["train.plan"],
    ["train.monitor"],
    ["train.run"],
    ["train", "eval", "eval.benchmarks", "eval.analyses", "eval.skills", "eval.intervals", "eval.results", "eval.vqa"],
    ["bench", "app"],
    ["registration", "", "__main__", "cli", "data", "demo", "train.__main__"],
]
"""Rooms by floor, from the lowest up; "" is `hovle/__init__.py`. A room is a package of files or a lone file."""

LEVELS = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the package by its name below `hovle`, but for tasks that another program loads by path."""
    found = {}
    for path in (ROOT / "hovle").rglob("*.py"):
        parts = list(path.relative_to(ROOT / "hovle").with_suffix("").parts)
        if "tasks" not in parts:
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Modules a module imports, at its top or within functions; what stands there for type checkers only is none."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in executed(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {item.name.removeprefix("hovle.") for item in node.names if item.name.startswith("hovle.")}
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [*[part for part in package if part][: len(package) - node.level + 1], *base]
            elif base[:1] == ["hovle"]:
                base = base[1:]
            else:
                continue
            for item in node.names:
                whole, part = ".".join([*base, item.name]), ".".join(base)
                found.add(whole if whole in MODULES else part)
    return found & MODULES.keys()


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from executed(node)


IMPORTS = {name: imports(name) for name in MODULES}


def room_of(name: str) -> str:
    """The longest name of a room that a module's name begins with."""
    parts = name.split(".")
    return next(room for end in range(len(parts), 0, -1) if (room := ".".join(parts[:end])) in LEVELS)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes of a graph that go round in a circle, none where there is no circle."""
    left = dict(graph)
    while removable := [
        node
        for node, targets in left.items()
        if not targets & left.keys() or not any(node in others for others in left.values())
    ]:
        for node in removable:
            del left[node]
    return sorted(left)


def test_every_module_has_a_floor():
    assert not [name for name in MODULES if name and name.split(".")[0] not in LEVELS and "." not in name]
    assert {room_of(name) for name in MODULES} == LEVELS.keys()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_import_runs_up(name):
    level = LEVELS[room_of(name)]
    assert not {target for target in IMPORTS[name] if LEVELS[room_of(target)] > level}


def test_no_files_import_each_other_in_a_circle():
    assert not circle(IMPORTS)


def test_no_rooms_import_each_other_in_a_circle():
    rooms: dict[str, set[str]] = {}
    for name, targets in IMPORTS.items():
        rooms.setdefault(room_of(name), set()).update(room_of(target) for target in targets)
    assert not circle({room: targets - {room} for room, targets in rooms.items()})


def test_training_and_evaluation_do_not_import_each_other():
    for name in MODULES:
        if name.startswith(("train", "eval")):
            other = "eval" if name.startswith("train") else "train"
            assert not [target for target in IMPORTS[name] if target.split(".")[0] == other], name


def test_the_model_imports_nothing_but_itself():
    for name in MODULES:
        if room_of(name) == "model":
            assert not [target for target in IMPORTS[name] if room_of(target) != "model"], name


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
