"""The README's Python runs as it stands, on a tiny model in the place of the real one; so do its commands."""

import contextlib
import functools
import importlib
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import types

import pytest
import torch
from PIL import Image
from places import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor, cli

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.M)
COMMANDS = re.findall(r"^hovle .*$", README, re.M)
RUN_HERE = re.compile("hovle (chat .* -q|tiles|doctor)")
"""Commands that end by themselves and within seconds; of the others only the options are read."""
MODEL, LANGUAGE_MODEL = "runs/demo/instruction_tuning/model", "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, make_tokenizer):
    """A folder with everything the README's code names."""
    folder = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    text = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    language_model = LlamaForCausalLM(LlamaConfig(**text, num_hidden_layers=2, num_key_value_heads=2))
    language_model.save_pretrained(folder / LANGUAGE_MODEL)
    make_tokenizer().save_pretrained(folder / LANGUAGE_MODEL)
    model = HoVLEForConditionalGeneration.from_language_model(folder / LANGUAGE_MODEL, 1, image_size=56)
    processor = HoVLEProcessor.from_language_model(folder / LANGUAGE_MODEL, model.config, max_tiles=4)
    model.save_pretrained(folder / MODEL)
    processor.save_pretrained(folder / MODEL)
    for name in ("picture", "a", "b"):
        Image.effect_noise((64, 64), 50).convert("RGB").save(folder / f"{name}.png")
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def serving(port: int):
    """The README's server, which a client may call at this port."""
    command = [sys.executable, "-m", "hovle", "serve", MODEL, "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
                break
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_the_readme_shows_every_use():
    assert len(BLOCKS) >= 9
    used = README.partition("## Use\n")[2].partition("\n## ")[0]
    sections = used.split("\n### ")[1:]
    without_code = {section.partition("\n")[0] for section in sections if "```python" not in section}
    assert without_code == {"In the terminal", "In a browser"}
    shown = "\n".join(BLOCKS)
    for use in ("device_map", "num_beams", "cache_implementation", "torch.compile", "openai", "TextIteratorStreamer"):
        assert use in shown


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_code_of_the_readme_runs(block, workplace, monkeypatch, capsys, whole_graph):
    monkeypatch.chdir(workplace)
    # The default backend would call a C++ compiler for a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    around, port = contextlib.nullcontext(), free_port()
    if "localhost:8000" in block:
        block, around = block.replace("8000", str(port)), serving(port)
    refusal = whole_graph if "fullgraph" in block else contextlib.nullcontext()
    with around, refusal:
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})  # our own text
        if "print(" in block:
            assert capsys.readouterr().out


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)[1:]


@pytest.mark.parametrize("command", [command for command in COMMANDS if RUN_HERE.match(command)])
def test_the_commands_of_the_readme_run(command, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    assert cli.main(words_of(command)) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", [command for command in COMMANDS if not RUN_HERE.match(command)])
def test_long_commands_of_the_readme_have_options_that_exist(command, monkeypatch):
    read = []

    def without_work(name: str) -> types.SimpleNamespace:
        module = importlib.import_module(name)
        actions = getattr(module, "ACTIONS", {})
        return types.SimpleNamespace(__doc__="", add_arguments=module.add_arguments, run=run, ACTIONS=actions)

    def run(arguments) -> int:
        read.append(arguments)
        return 0

    monkeypatch.setattr(cli, "importlib", types.SimpleNamespace(import_module=without_work))
    assert cli.main(words_of(command)) == 0
    assert len(read) == 1
