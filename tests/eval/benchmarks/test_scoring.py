"""A result is another one where a file that decides scores is another one."""

import shutil
from pathlib import Path

import pytest
from places import ROOT
from test_floors import IMPORTS, MODULES

from hovle.eval.benchmarks.scoring import NO_PART, benchmark_facts, code_fingerprint
from hovle.eval.benchmarks.suites import load_suites

DECIDE = [
    "model/modeling_hovle.py",
    "model/image_processing_hovle.py",
    "model/pictures.py",
    "assets/vqa_questions.py",
    "assets/manifest.json",
    "eval/vqa.py",
    "eval/intervals.py",
    "eval/benchmarks/harness.py",
    "eval/benchmarks/judges.py",
    "eval/benchmarks/adaptations.py",
    "eval/benchmarks/lmms_eval_plugin.py",
    "eval/benchmarks/tasks/easy_vqa/easy_vqa_task.py",
    "eval/benchmarks/tasks/easy_vqa/_easy_vqa_template_yaml",
    "eval/benchmarks/tasks/easy_vqa/balanced.jsonl",
    "eval/benchmarks/tasks/judge_free/hovle_mmvet.yaml",
    "eval/benchmarks/tasks/judge_free/judge_free_scores.py",
]
"""One file of each kind that has a part in a score."""


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A copy of the package as it is installed; tests put back what they change."""
    copy = tmp_path_factory.mktemp("copy") / "hovle"
    return shutil.copytree(ROOT / "hovle", copy, ignore=shutil.ignore_patterns("__pycache__"))


def moves_when_changed(package: Path, name: str) -> bool:
    path = package / name
    content = path.read_bytes()
    before = code_fingerprint(package)
    path.write_bytes(content + b"\n")
    after = code_fingerprint(package)
    path.write_bytes(content)
    assert code_fingerprint(package) == before
    return after != before


def test_a_copy_of_the_package_has_the_fingerprint_of_the_package(package):
    assert code_fingerprint(package) == code_fingerprint()


@pytest.mark.parametrize("name", DECIDE)
def test_a_changed_file_that_decides_scores_is_noticed(package, name):
    assert moves_when_changed(package, name)


@pytest.mark.parametrize("name", ["train/run/loop.py", "recipes/demo/alignment.yaml", "eval/benchmarks/suites.yaml"])
def test_a_changed_file_that_decides_nothing_costs_no_result(package, name):
    assert not moves_when_changed(package, name)


def test_a_new_file_is_noticed(package):
    before = code_fingerprint(package)
    (package / "eval" / "new.py").touch()
    after = code_fingerprint(package)
    (package / "eval" / "new.py").unlink()
    assert after != before


def test_everything_that_benchmarks_import_counts():
    reached: set[str] = set()
    new = {name for name in MODULES if name.startswith("eval.benchmarks")} | {"eval.vqa", "assets.vqa_questions"}
    while new:
        reached |= new
        new = {target for name in new for target in IMPORTS[name]} - reached
    assert {"model.modeling_hovle", "eval.intervals", "model.pictures"} <= reached
    assert not [name for name in reached if name.split(".")[0] in NO_PART]


@pytest.mark.parametrize(
    ("old", "new", "decides"),
    [
        ("scale: 100", "scale: 50", True),
        ("max_new_tokens: 16", "max_new_tokens: 17", True),
        ("title: ", "title: x", False),
    ],
)
def test_what_suites_yaml_says_counts_where_it_decides(package, tmp_path, old, new, decides):
    text = (package / "eval" / "benchmarks" / "suites.yaml").read_text()
    assert old in text
    (tmp_path / "suites.yaml").write_text(text.replace(old, new))
    suites = load_suites(), load_suites(tmp_path / "suites.yaml")
    facts = [[benchmark_facts(benchmark) for benchmark in each.benchmarks.values()] for each in suites]
    assert (facts[0] != facts[1]) == decides
