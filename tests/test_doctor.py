"""`hovle doctor`: what it finds, what it advises, and when it fails."""

import importlib.metadata
import json
import re

import torch

from hovle import doctor
from hovle.cli import main


def test_the_report_names_versions_device_and_fast_paths(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^\+ torch +{re.escape(torch.__version__.split('+')[0])}", text, re.MULTILINE)
    for topic in ("python", "transformers", "device", "number format", "torch.compile", "attention", "accelerate"):
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
    assert "pip install 'flash-attn'" in text


def test_a_core_package_that_is_too_old_fails(monkeypatch, capsys):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.10.0" if name == "transformers" else real(name))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"^x transformers +5\.10\.0", text, re.MULTILINE)
    assert "hovle needs transformers>=" in text
    assert "device" not in text  # what hovle cannot find out then is left out


def test_without_a_compiler_the_report_says_what_is_lost(monkeypatch):
    monkeypatch.setattr("hovle.machine.compiler_problem", lambda: "no C++ compiler")
    text = doctor.report(doctor.examine())
    assert "fails: no C++ compiler" in text
    assert "install a C++ compiler" in text
