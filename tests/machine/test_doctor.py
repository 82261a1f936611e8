"""`hovle doctor`: what it finds, what it advises, and when it fails."""

import importlib.metadata
import json
import logging
import re
import tomllib

import pytest
import torch
from packaging.requirements import Requirement
from places import ROOT

from hovle.cli import main
from hovle.machine import doctor


def test_the_report_names_versions_device_and_fast_paths(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^\+ torch +{re.escape(torch.__version__.split('+')[0])}", text, re.MULTILINE)
    for topic in (
        "python",
        "transformers",
        "device",
        "number format",
        "torch.compile",
        "attention",
        "pictures",
        "accelerate",
    ):
        assert topic in text


def test_the_report_is_also_json(capsys):
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {"topic", "found", "advice", "is_problem"} == set(findings[0])


def test_what_is_missing_comes_with_the_command_that_installs_it(monkeypatch, capsys):
    real = importlib.metadata.version

    def version(package: str) -> str:
        if package in ("timm", "flash-attn"):
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^- timm +missing", text, re.MULTILINE)
    assert "for teachers for distillation: pip install 'hovle[teacher]'" in text
    assert "pip install 'hovle[flash]'" in text


@pytest.mark.parametrize(
    ("package", "version", "expected"),
    [
        ("accelerate", "0.5", ">=1.10"),
        ("datasets", "1.0", ">=5.2"),
        ("timm", "0.4", ">=1.0.20"),
        ("open_clip_torch", "2.0", ">=3.3"),
        ("simplejpeg", "0.1", ">=1.8"),
        ("sentencepiece", "0.1.9", ">=0.2"),
        ("openai", "1.0", ">="),
        ("lmms_eval", "0.2", ">=0.7.3"),
    ],
)
def test_an_optional_package_of_another_version_is_named(monkeypatch, package, version, expected):
    real = importlib.metadata.version
    same = package.replace("_", "-")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == same else real(name))
    finding = doctor._optional(package, *doctor.OPTIONAL[package])
    assert finding.found == version
    assert expected in finding.advice
    assert f"pip install '{doctor.OPTIONAL[package][0]}'" in finding.advice


def test_what_pillow_was_built_without_is_named(monkeypatch):
    assert doctor._pillow_parts().advice == ""
    monkeypatch.setattr("PIL.features.check", lambda part: part not in ("avif", "littlecms2"))
    finding = doctor._pillow_parts()
    assert finding.found == "Pillow lacks avif, littlecms2"
    assert "without littlecms2 ICC profiles are left aside" in finding.advice


def test_every_package_of_an_extra_is_looked_for():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = settings["project"]["optional-dependencies"]
    names = {
        (Requirement(line).name.lower().replace("_", "-"), extra)
        for extra, lines in extras.items()
        for line in lines
        if extra != "dev"
    }
    known = {name.lower().replace("_", "-"): requirement for name, (requirement, _) in doctor.OPTIONAL.items()}
    also = {
        ("gguf", "llamacpp"),
        ("hovle", "demo"),
        ("hovle", "smol"),
        ("levenshtein", "smol"),
        ("matplotlib", "smol"),
        ("transformers", "serve"),
        ("pydantic", "serve"),
        ("sentencepiece", "eval"),
        ("matplotlib", "eval"),
        ("onnxruntime", "ocr"),
    }
    for name, extra in names - also:
        assert known[name] == f"hovle[{extra}]"
    served = {"fastapi", "uvicorn", "openai", "prometheus-client"}  # without the first three transformers has none
    assert {name for name, requirement in known.items() if requirement == "hovle[serve]"} == served


def test_flex_attention_is_there_wherever_it_can_be_compiled(monkeypatch):
    for problem, is_listed in ((None, True), ("no C++ compiler", False)):
        monkeypatch.setattr("hovle.machine.facts.compiler_problem", lambda problem=problem: problem)
        found = {finding.topic: finding.found for finding in doctor.examine()}
        assert ("flex_attention" in found["attention"]) == is_listed


def test_a_core_package_that_is_too_old_fails(monkeypatch, capsys):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.10.0" if name == "transformers" else real(name))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"^x transformers +5\.10\.0", text, re.MULTILINE)
    assert "hovle needs transformers>=" in text
    assert "device" not in text  # what hovle cannot find out then is left out


def test_without_a_compiler_the_report_says_what_is_lost(monkeypatch):
    monkeypatch.setattr("hovle.machine.facts.compiler_problem", lambda: "no C++ compiler")
    text = doctor.report(doctor.examine())
    assert "fails: no C++ compiler" in text
    assert "install a C++ compiler" in text


def test_on_a_gpu_the_report_speaks_of_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("hovle.machine.facts.compiler_problem", lambda: "Cannot find a working triton installation")
    monkeypatch.setattr(doctor, "_device", list)  # this machine's cannot be asked
    text = doctor.report(doctor.examine())
    assert "fails: Cannot find a working triton installation" in text
    assert "install triton" in text


def test_remarks_about_a_missing_gpu_do_not_precede_the_report(monkeypatch, caplog):
    def remark(*args, **kwargs):
        logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found")
        return lambda values: values

    monkeypatch.setattr(torch, "compile", remark)
    doctor.examine()
    assert "No CUDA runtime" not in caplog.text
