"""A damaged model folder is one line that names it, whichever command reads it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor, cli

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 9\n"


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half a file")


def put_pointer(name: str) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / name).write_text(POINTER)

    return put


def lose_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def change_sizes(folder: Path) -> None:
    change(folder, "config.json", lambda content: find_text(content).update(intermediate_size=64))


def without_heads(folder: Path) -> None:
    change(folder, "config.json", lambda content: find_text(content).update(num_attention_heads=0))


def empty_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def break_template(folder: Path) -> None:
    for name in ("chat_template.jinja", "chat_template.json"):
        if (folder / name).exists():
            (folder / name).write_text("{% for message in messages %}{{ message.content }")
            return
    raise AssertionError("no chat template to break")


def cut_config(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text()[:-20])


def change(folder: Path, name: str, edit: Callable[[dict], None]) -> None:
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


def find_text(config: dict) -> dict:
    return config.get("text_config", config)


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "weights cut off": ("weights", cut, "model.safetensors in .* no safetensors file"),
    "weights garbled": ("weights", garble, "model.safetensors in .* no safetensors file"),
    "weights a pointer": ("weights", put_pointer("model.safetensors"), "model.safetensors in .* is a Git LFS pointer"),
    "shard missing": ("weights", lose_shard, "model-00002-of-00002.safetensors in .* is missing"),
    "weights of other sizes": ("sizes", change_sizes, "cannot be loaded"),
    "config cut off": ("config", cut_config, r"config.json( in \S+)? cannot be read as JSON"),
    "config a pointer": ("config", put_pointer("config.json"), r"config.json( in \S+)? is a Git LFS pointer"),
    "config without sense": ("values", without_heads, "num_attention_heads must lie between 1 and"),
    "tokenizer a pointer": ("config", put_pointer("tokenizer.json"), "tokenizer.json is a Git LFS pointer"),
    "tokenizer empty": ("tokenizer", empty_tokenizer, "cannot be loaded|gives no tokenizer"),
    "template broken": ("template", break_template, "chat template is no Jinja template: line 1"),
}
"""What is wrong -> which part of a folder that is, how it is done, what is said."""

HOVLE = {
    "chat": (["chat", "--model", "FOLDER", "-q", "?"], "config values tokenizer template weights sizes"),
    "serve": (["serve", "FOLDER"], "config values tokenizer template weights sizes"),
    "tiles": (["tiles", "PICTURE", "--model", "FOLDER"], "config tokenizer template"),
    "convert": (["convert", "FOLDER", "OUT", "--to", "released"], "weights"),
    "export": (["export", "FOLDER", "OUT", "--to", "llama"], "config values tokenizer template weights sizes"),
    "merge": (["merge", "FOLDER", "HOVLE", "--weight", "0.5", "--out", "OUT"], "config values weights"),
    "replay": (
        ["data", "replay", "FOLDER", "--tokens", "8", "--out", "OUT", "--dtype", "float32"],
        "config values tokenizer template weights sizes",
    ),
    "train": (["train", "FROM_CHECKPOINT"], "config values tokenizer template weights sizes"),
    "dry run": (["train", "FROM_CHECKPOINT", "--dry-run"], "config values tokenizer template weights sizes"),
    "data doctor": (["data", "doctor", "FROM_CHECKPOINT"], "config tokenizer template"),
    "plan": (["plan", "FROM_CHECKPOINT"], "config values"),
    "benchmarks": (["eval", "benchmarks", "FOLDER", "--suite", "offline", "--limit", "1"], "config values"),
    "attention": (["eval", "attention", "FOLDER", "PICTURE", "?"], "config values tokenizer template weights sizes"),
    "embeddings": (["eval", "embeddings", "FOLDER", "PICTURE"], "config values tokenizer template weights sizes"),
    "retention": (
        ["eval", "retention", "FOLDER", "--language-model", "BARE", "--window", "32", "--num-tokens", "64"],
        "config values",
    ),
}
"""Every command that takes a HoVLE's folder -> its arguments, and the parts of the folder it cannot do without."""

BARE = {
    "merge": (["merge", "HOVLE", "FOLDER", "--weight", "0.5", "--out", "OUT"], "config values weights"),
    "replay": (
        ["data", "replay", "FOLDER", "--tokens", "8", "--out", "OUT", "--dtype", "float32"],
        "config values tokenizer weights sizes",
    ),
    "train": (["train", "FROM_LANGUAGE_MODEL"], "config values tokenizer template weights sizes"),
    "data doctor": (["data", "doctor", "FROM_LANGUAGE_MODEL"], "config tokenizer template"),
    "plan": (["plan", "FROM_LANGUAGE_MODEL"], "config values"),
    "embeddings": (
        ["eval", "embeddings", "HOVLE", "PICTURE", "--language-model", "FOLDER"],
        "config values weights sizes",
    ),
    "retention": (
        ["eval", "retention", "HOVLE", "--language-model", "FOLDER", "--window", "32", "--num-tokens", "64"],
        "config values tokenizer weights sizes",
    ),
}
"""The same for the folder of a bare language model."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_tokenizer) -> dict[str, Path]:
    """A tiny language model, a HoVLE around it, a picture and a conversation about it."""
    root = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).save_pretrained(root / "bare")
    make_tokenizer().save_pretrained(root / "bare")
    model = HoVLEForConditionalGeneration.from_language_model(root / "bare", 1, image_size=56)
    model.save_pretrained(root / "hovle")
    HoVLEProcessor.from_language_model(root / "bare", model.config).save_pretrained(root / "hovle")
    Image.new("RGB", (56, 56)).save(root / "picture.png")
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "0 1"}]}
    (root / "chat.jsonl").write_text(json.dumps(row))
    return {name: root / name for name in ("bare", "hovle", "picture.png", "chat.jsonl")}


def cases(commands: dict[str, tuple[list[str], str]]) -> list:
    return [
        pytest.param(arguments, damage, id=f"{command}, {damage}")
        for command, (arguments, parts) in commands.items()
        for damage, (part, *_) in DAMAGES.items()
        if part in parts.split()
    ]


def refuse(arguments: list[str], damage: str, folders: dict[str, Path], kind: str, tmp_path, monkeypatch, capfd):
    """Damage a copy of a folder, run the command, and expect a single line about it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: pytest.fail("it serves a damaged model"))
    _, do, message = DAMAGES[damage]
    folder = Path(shutil.copytree(folders[kind], tmp_path / "damaged"))
    do(folder)
    recipe = {
        "output": "run",
        "objective": {"name": "next_token"},
        "trainable": ["stem"],
        "data": {"source": "chat", "path": str(folders["chat.jsonl"])},
        "num_steps": 1,
        "rows_per_batch": 1,
        "row_length": 64,
        "learning_rate": 0.001,
        "dtype": "float32",
    }
    starts = {"FROM_CHECKPOINT": {"checkpoint": str(folder)}, "FROM_LANGUAGE_MODEL": {"language_model": str(folder)}}
    for name, start in starts.items():
        Path(name).write_text(yaml.safe_dump({**recipe, "model": start}))
    places = {"FOLDER": folder, "OUT": "out", "PICTURE": folders["picture.png"], "BARE": folders["bare"]}
    places["HOVLE"] = folders["hovle"]
    assert cli.main([str(places.get(argument, argument)) for argument in arguments]) == 1
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hovle ")]
    assert len(told) == 1, told
    assert re.search(message, told[0]), told[0]
    assert "damaged" in told[0]
    assert not Path("run").exists()
    assert not Path("out").exists()


@pytest.mark.parametrize(("arguments", "damage"), cases(HOVLE))
def test_a_damaged_hovle_is_one_line(arguments, damage, folders, tmp_path, monkeypatch, capfd):
    refuse(arguments, damage, folders, "hovle", tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize(("arguments", "damage"), cases(BARE))
def test_a_damaged_language_model_is_one_line(arguments, damage, folders, tmp_path, monkeypatch, capfd):
    refuse(arguments, damage, folders, "bare", tmp_path, monkeypatch, capfd)
