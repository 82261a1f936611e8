"""JSON and YAML made to exhaust their reader, and how names of a stranger's file are told."""

import json

import pytest

from hovle.errors import LONGEST_NAME, foreign_errors, printable, printable_name
from hovle.files import documents
from hovle.files.documents import UnreadableError, load_json, load_yaml, parse_json, parse_yaml
from hovle.files.model_folder import refuse_missing_folder

OPENINGS = {"list": "[", "object": '{"a":', "mixed": '[{"a":'}


def nested(opening: str, times: int) -> str:
    closing = opening[::-1].translate(str.maketrans("[{", "]}", '"a:'))
    return opening * times + "1" + closing * times


@pytest.mark.parametrize("opening", OPENINGS.values(), ids=OPENINGS)
@pytest.mark.parametrize("times", [documents.MOST_LEVELS + 1, 400, 5000, 200_000])
@pytest.mark.parametrize("load", [load_json, load_yaml])
def test_deep_nesting_is_refused_with_the_file_s_name(tmp_path, load, opening, times):
    if load is load_yaml and times == 200_000:
        times = 20_000  # PyYAML takes seconds for more
    (tmp_path / "deep").write_text(nested(opening, times))
    with pytest.raises(UnreadableError, match=f"{tmp_path}/deep nests lists and objects more than 100 levels deep"):
        load(tmp_path / "deep")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_honest_nesting_is_read(opening):
    text = nested(opening, documents.MOST_LEVELS - 1)
    assert parse_json(text, "x") == json.loads(text)
    assert parse_json(text.encode(), "x") == parse_yaml(text.replace(":", ": "), "x")


def test_blocks_of_yaml_are_bounded_as_brackets_are():
    with pytest.raises(UnreadableError, match=r"recipe.yaml nests"):
        parse_yaml("\n".join("  " * level + "a:" for level in range(150)), "recipe.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe\xfa", "cannot be read as JSON"),
        (b"9" * 6000, "cannot be read as JSON"),
    ],
)
def test_what_is_no_json_is_named(text, message):
    with pytest.raises(UnreadableError, match=f"a.json {message}"):
        parse_json(text, "a.json")


@pytest.mark.parametrize(
    "text",
    [
        *("a: [1", "a: !!python/object:os.system {}", "a: !!bool x", "a: !!timestamp x", "a: 2024-13-45"),
        *("a: !!int x", "a: !!float x", "? {a: 1}\n: 2", "a: &x [*y]", "a: 1\nb: 2\na: 3", "b: {a: 1, a: 1}"),
        b"a: \xff",
        "a: " + "9" * 6000,
        "a: \x1b",
    ],
)
def test_what_is_no_plain_yaml_is_named(text):
    with pytest.raises(UnreadableError, match=r"r.yaml is no plain YAML: [^\x1b]*$"):
        parse_yaml(text, "r.yaml")


def test_a_key_said_twice_is_named_with_its_line():
    with pytest.raises(UnreadableError, match=r"(?s)duplicate key 'steps'.*line 3"):
        parse_yaml("steps: 1\nb: 2\nsteps: 3", "r.yaml")
    with pytest.raises(UnreadableError, match="duplicate key 'a'"):
        parse_json('{"b": [{"a": 1, "a": 2}]}', "x", keys_once=True)
    assert parse_json('{"a": 1, "a": 2}', "x") == {"a": 2}
    merged = "base: &base {a: 1, b: 2}\nown: {<<: *base, a: 3}"
    assert parse_yaml(merged, "x")["own"] == {"a": 3, "b": 2}  # what is merged may be replaced


ALIASES = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"


@pytest.mark.parametrize("form", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_of_aliases_are_bounded(form):
    text = ALIASES if form == "[{}]" else "a0: &a0 {x: 1}\n"
    for level in range(1, 12):
        text += f"a{level}: &a{level} " + form.format(", ".join([f"*a{level - 1}"] * 10)) + "\n"
    with pytest.raises(UnreadableError, match=r"holds more than 100,000 values once its aliases are written out"):
        parse_yaml(text, "r.yaml")
    assert parse_yaml("a: &a [1]\nb: [*a, *a]", "x") == {"a": [1], "b": [[1], [1]]}


def test_an_alias_of_itself_is_refused():
    with pytest.raises(UnreadableError, match=r"r.yaml nests"):
        parse_yaml("a: &a [*a]", "r.yaml")


def test_files_are_utf_8_with_or_without_a_mark(tmp_path):
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "f").write_bytes(mark + '{"ä": "é"}'.encode())
        assert load_json(tmp_path / "f") == load_yaml(tmp_path / "f") == {"ä": "é"}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json"])
def test_a_model_folder_with_a_damaged_document_is_refused_by_its_name(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    refuse_missing_folder(tmp_path)
    (tmp_path / name).write_text(nested("[", 3000))
    with pytest.raises(ValueError, match=f"{name} nests lists"):
        refuse_missing_folder(tmp_path)


def test_names_are_told_on_one_line_without_commands_to_the_terminal():
    name = "a\x1b[2J\n\r\u202eb\u2028\x9b\x07\ud800 ä 猫"
    assert printable_name(name) == r"a\x1b[2J\n\r\u202eb\u2028\x9b\x07\ud800 ä 猫"
    assert printable("two\nlines\x1b") == "two\nlines\\x1b"
    assert len(printable_name("x" * 10**6)) < LONGEST_NAME + 40


class PanicException(BaseException):
    """As pyo3's: no `Exception`."""


@pytest.mark.parametrize(
    "error", [PanicException("index out of\x1b bounds"), RuntimeError("x"), RecursionError(), KeyError(1)]
)
def test_whatever_foreign_code_raises_becomes_a_value_error(error):
    with pytest.raises(ValueError, match=r"^it failed: [^\x1b]+$") as caught, foreign_errors("it failed"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ModuleNotFoundError])
def test_interrupts_and_missing_packages_pass(error):
    with pytest.raises(error), foreign_errors("it failed"):
        raise error
