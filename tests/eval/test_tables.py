"""Figures in the documents come from result files."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from hovle.assets import easy_vqa
from hovle.assets.vqa_questions import describe_wording, load_questions


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "eval" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tables, tmp_path) -> Path:
    """Documents and result files, free to be changed."""
    for name in (*tables.DOCUMENTS, *tables.GENERATED):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "eval" / "results", tmp_path / "eval" / "results")
    return tmp_path


def test_no_table_in_the_documents_is_stale():
    result = subprocess.run(
        [sys.executable, "eval/tables.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("content", ["", '{"benchmark": "easy_vqa", "sco', "{}", "[1]"])
def test_a_broken_result_is_named_and_the_other_tables_are_written(tables, copy, content, capsys):
    broken = copy / "eval" / "results" / "benchmarks" / "demo" / "easy_vqa.json"
    broken.write_text(content)
    report = copy / "eval" / "results" / "demo" / "report.json"
    steps = json.loads(report.read_text())["stages"]["distillation"]["steps"]
    report.write_text(report.read_text().replace(f'"steps": {steps}', f'"steps": {steps + 1}'))
    before = (copy / "eval" / "README.md").read_text()
    assert "| easy-VQA, balanced |" in before
    assert tables.main([], copy) == 1
    said = capsys.readouterr()
    assert f"eval/README.md: table benchmarks: {broken} is no result of `hovle eval benchmarks`" in said.err
    assert f"| {steps + 1} |" in (copy / "README.md").read_text()
    assert (copy / "eval" / "README.md").read_text() == before.replace(f"| {steps} |", f"| {steps + 1} |")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "table demo: eval/results/demo/report.json cannot be read"),
        ('{"num_questions": 10}', "table demo: its result file lacks something: KeyError('stages')"),
        (None, "table demo: eval/results/demo/report.json cannot be read"),
    ],
)
def test_a_broken_report_is_named(tables, copy, content, message, capsys):
    report = copy / "eval" / "results" / "demo" / "report.json"
    report.unlink() if content is None else report.write_text(content)
    assert tables.main(["--check"], copy) == 1
    assert message in capsys.readouterr().err


def test_a_figure_that_no_result_has_is_stale(tables, copy, capsys):
    report = copy / "eval" / "results" / "demo" / "report.json"
    content = json.loads(report.read_text())
    content["stages"]["alignment"]["accuracy"] += 0.01
    report.write_text(json.dumps(content))
    assert tables.main(["--check"], copy) == 1
    assert "stale: README.md" in capsys.readouterr().out


def test_a_figure_in_running_text_is_stale_as_well(tables, copy, capsys):
    path = copy / "eval" / "results" / "demo" / "questions.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "guessed_share": 0.5}))
    assert tables.main(["--check"], copy) == 1
    assert "stale: README.md, eval/README.md" in capsys.readouterr().out
    assert tables.main([], copy) == 0
    assert "scores\n<!-- value: guessed_share -->50%<!-- end -->, so there" in (copy / "README.md").read_text()
    path.unlink()
    assert tables.main([], copy) == 1
    assert "README.md: value guessed_share: eval/results/demo/questions.json cannot be" in capsys.readouterr().err


def test_no_percentage_in_the_documents_is_typed_by_hand(tables):
    for name in tables.DOCUMENTS:
        text = (ROOT / name).read_text()
        typed = re.sub(r"<!-- (table|value): \w+ -->.*?<!-- end -->", "", text, flags=re.DOTALL)
        found = set(re.findall(r"\d[\d.]* ?%", typed))
        assert found <= {"95 %"}, name  # the intervals' level


def test_every_mark_has_a_table_or_value_that_is_known(tables):
    marks = {
        mark for name in tables.DOCUMENTS for mark in re.findall(r"<!-- (\w+): (\w+) -->", (ROOT / name).read_text())
    }
    known = {("table", name) for name in tables.TABLES} | {("value", name) for name in tables.VALUES}
    assert marks == known


def test_what_the_questions_tell_is_what_the_kept_file_says():
    questions = [load_questions(easy_vqa() / split) for split in ("train", "test")]
    kept = json.loads((ROOT / "eval" / "results" / "demo" / "questions.json").read_text())
    assert describe_wording(*questions) == pytest.approx(kept)
