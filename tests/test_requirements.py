"""hovle where torch or transformers is missing, too old or broken."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from places import ROOT

from hovle import requirements

WITHOUT_TORCH = """
import importlib.metadata, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("libtorch.so: cannot open shared object file")

sys.meta_path.insert(0, Absent())
if sys.argv[1] == "missing":
    real = importlib.metadata.version

    def version(name):
        if name == "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    importlib.metadata.version = version
"""


def without_torch(program: str, how: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a program in a process in which torch is "missing" or "broken"."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH + program, how, *arguments], capture_output=True, text=True, check=False
    )


COMMAND = "import runpy; sys.argv = ['hovle', *sys.argv[2:]]; runpy.run_module('hovle', run_name='__main__')"


@pytest.mark.parametrize(
    ("how", "found", "advice"),
    [
        ("missing", "missing", "hovle needs torch"),
        ("broken", r"\d", "cannot be imported (libtorch.so: cannot open shared object file)"),
    ],
)
def test_the_doctor_explains_what_is_wrong_with_torch(how, found, advice):
    finished = without_torch(COMMAND, how, "doctor")
    assert finished.returncode == 1, finished.stderr
    assert re.search(rf"^x torch +{found}", finished.stdout, re.MULTILINE)
    assert advice in finished.stdout
    assert "Traceback" not in finished.stderr


def test_other_commands_refuse_in_one_line_and_help_still_works():
    refused = without_torch(COMMAND, "missing", "tiles", "picture.png")
    assert refused.returncode == 1
    assert "hovle tiles: torch is missing: hovle needs torch" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "doctor" in without_torch(COMMAND, "missing", "--help").stdout


def test_the_package_imports_but_its_names_say_what_is_missing():
    program = """
import hovle, hovle.machine.doctor
assert not hasattr(hovle, "nonsense")
try:
    hovle.HoVLEConfig
except ImportError as error:
    print(error)
"""
    finished = without_torch(program, "missing")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("hovle.HoVLEConfig is not available. torch is missing")
    assert "`hovle doctor`" in finished.stdout


def test_the_requirements_are_those_of_the_installed_metadata(monkeypatch):
    text = ["torch>=2.6", "numpy", 'timm>=1; extra == "teacher"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: text if name == "hovle" else [])
    assert [str(requirement) for requirement in requirements.required()] == ["torch>=2.6", "numpy"]


def test_torch_and_transformers_stand_in_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(requirements.TRIED) < {Requirement(line).name for line in project["dependencies"]}


def test_every_python_that_was_tried_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    allowed = SpecifierSet(project["requires-python"])
    assert [f"3.{minor}" for minor in range(30) if allowed.contains(f"3.{minor}.1")] == declared
    noted = {run["python"].rpartition(".")[0] for run in json.loads((ROOT / "dev" / "versions.json").read_text())}
    assert noted <= set(declared)


@pytest.mark.parametrize("name", ["python3.11", "python3.12", "python3.13", "python3"])
def test_make_takes_whichever_fitting_python_is_there(name, tmp_path):
    for other in ("python3.11", "python3.12", "python3.13", "python3"):  # as shims of versions that are switched off
        program = f'exec {sys.executable} "$@"' if other == name else "exit 127"
        (tmp_path / other).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / other).chmod(0o755)
    command = ["make", "-n", "setup", f"VENV={tmp_path / 'venv'}"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    planned = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert f"\n{name} -m venv" in planned


@pytest.mark.parametrize("given", [["PYTHON="], ["PYTHON=false"]])
def test_make_says_what_is_missing_where_no_python_fits(given, tmp_path):
    command = ["make", "setup", f"VENV={tmp_path / 'venv'}", *given]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "hovle needs Python 3.11, 3.12 or 3.13" in refused.stdout
    assert not (tmp_path / "venv").exists()


def test_without_metadata_of_hovle_the_packages_are_still_tried(monkeypatch):
    def requires(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert [requirement.name for requirement in requirements.required()] == ["torch", "transformers"]
    assert requirements.unmet() is None


@pytest.mark.parametrize(("version", "is_met"), [("2.5.1", False), ("2.6.0+cpu", True), ("2.15.0.dev20261101", True)])
def test_local_and_development_versions_are_compared_like_others(monkeypatch, version, is_met):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    problem = requirements.problem_with(Requirement("torch>=2.6"))
    assert (problem is None) == is_met


def test_a_wheel_carries_every_file_of_the_package(tmp_path):
    root = ROOT
    source = tmp_path / "source"
    shutil.copytree(root / "hovle", source / "hovle", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(root / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, source], check=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("hovle/")}
    assert packed == {str(path.relative_to(root)) for path in (root / "hovle").rglob("*") if is_packed(path)}


def is_packed(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts
