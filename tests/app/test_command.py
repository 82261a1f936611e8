"""`hovle app`."""

import importlib.util

import pytest

from hovle.cli import main


def test_without_gradio_one_line_says_what_brings_it(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else real(name))
    assert main(["app", "model"]) == 1
    assert capsys.readouterr().err == (
        "hovle app: The page needs gradio, which is not installed: pip install 'hovle[app]'\n"
    )


@pytest.mark.parametrize("option", ["--port=70000", "--engine=vllm", "--max-new-tokens=0"])
def test_options_that_cannot_work_are_wrong_usage(option, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["app", "model", option])
    assert exit_info.value.code == 2
    assert option.partition("=")[0] in capsys.readouterr().err
