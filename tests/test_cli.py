"""The `hovle` command."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hovle import cli


def test_help_lists_every_command_with_a_line_of_help(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    for name, (_, summary) in cli.COMMANDS.items():
        assert name in printed
        assert summary.split()[0] in printed


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([name, "--help"])
    assert exit_info.value.code == 0
    explanation = importlib.import_module(cli.COMMANDS[name][0]).__doc__
    assert explanation.strip().splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["fly"], ["train"], ["convert", "only-one"]])
def test_wrong_usage_ends_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(argv)
    assert exit_info.value.code == 2
    assert "usage: hovle" in capsys.readouterr().err


def test_what_a_user_got_wrong_is_one_line_and_exit_code_1(capsys, tmp_path):
    assert cli.main(["tiles", str(tmp_path / "missing.png")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hovle tiles: ")
    assert "missing.png" in error
    assert "Traceback" not in error


def test_the_package_runs_as_a_module_without_extras():
    program = (
        "import sys, runpy\n"
        "for name in ('accelerate', 'peft', 'timm', 'gguf', 'matplotlib', 'datasets'):\n"
        "    sys.modules[name] = None\n"
        "import hovle\n"
        "sys.argv = ['hovle', '--help']\n"
        "runpy.run_module('hovle', run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "commands" in result.stdout


def test_a_command_says_nothing_that_nobody_asked_for():
    command = [sys.executable, "-m", "hovle", "tiles", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stderr == ""


def options_of(source: str) -> Iterator[str]:
    """Names under which the options of a module arrive."""
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            given = [keyword.value.value for keyword in call.keywords if keyword.arg == "dest"]
            names = [name.value for name in call.args if isinstance(name, ast.Constant)]
            yield from given or [name[2:] for name in names if name.startswith("--")][:1]


def test_no_option_is_accepted_and_ignored():
    sources = [path.read_text(encoding="utf-8") for path in Path(cli.__file__).parent.rglob("*.py")]
    options = {option.replace("-", "_") for source in sources for option in options_of(source)}
    assert len(options) > 100
    asked_for = re.compile("|".join(rf"\.({option})\b|[\"']({option})[\"']" for option in options))
    found = {name for source in sources for match in asked_for.finditer(source) for name in match.groups()}
    assert options <= found
