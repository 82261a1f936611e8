"""`hovle chat`."""

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor, cli
from hovle.chat.conversation import Conversation


@pytest.fixture
def model_folder(tmp_path, make_tokenizer, tiny_config):
    """A tiny model with random weights and its processor, saved."""
    torch.manual_seed(0)
    config = tiny_config()
    HoVLEForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    HoVLEProcessor.from_language_model(make_tokenizer(), config, max_tiles=4).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pictures(tmp_path):
    """Two picture files."""
    paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path, colour in zip(paths, ["red", "blue"], strict=True):
        Image.new("RGB", (90, 60), colour).save(path)
    return paths


def test_one_question_prints_one_answer(model_folder, pictures, capsys):
    first, second = pictures
    arguments = ["chat", "--model", str(model_folder), "--image", str(first), "--image", str(second)]
    assert cli.main([*arguments, "-q", "what differs?", "--max-new-tokens", "5"]) == 0
    conversation = Conversation(str(model_folder), max_new_tokens=5)
    conversation.add_images([str(first), str(second)])
    assert capsys.readouterr().out == conversation.answer("what differs?") + "\n"


def test_a_conversation_remembers_turns_and_pictures(model_folder, pictures):
    conversation = Conversation(str(model_folder), max_new_tokens=4)
    conversation.add_images([str(pictures[0])])
    conversation.answer("what is it?")
    conversation.answer("and now?")
    kinds = [[item["type"] for item in message["content"]] for message in conversation.messages]
    assert kinds == [["image", "text"], ["text"], ["text"], ["text"]]
    conversation.restart()
    assert conversation.messages == []


@pytest.mark.parametrize("option", ["--label-images", "--label-pictures"])
def test_pictures_can_share_a_budget_and_be_numbered(model_folder, pictures, monkeypatch, capsys, option):
    prompts = []
    monkeypatch.setattr(
        HoVLEForConditionalGeneration,
        "generate",
        lambda self, input_ids, **kwargs: prompts.append(input_ids[0].tolist()) or input_ids,
    )
    shown = [argument for path in pictures for argument in ("--image", str(path))]
    command = ["chat", "--model", str(model_folder), *shown, "-q", "what differs?"]
    processor = HoVLEProcessor.from_pretrained(model_folder)
    budget = sum(processor.spread_tiles([(60, 90)] * 2, 10**6)[1]) - 1
    assert cli.main(command) == 0
    assert cli.main([*command, "--max-image-tokens", str(budget), option]) == 0
    plain, numbered = prompts
    assert numbered.count(processor.image_token_id) + 4 <= budget < plain.count(processor.image_token_id) + 4
    for label in ("Image-1: ", "Image-2: "):
        assert label in processor.decode(numbered)
        assert label not in processor.decode(plain)
    assert cli.main([*command, "--max-image-tokens", "5"]) == 1
    assert "max_image_tokens (5) is too small" in capsys.readouterr().err


def test_a_broken_picture_does_not_end_a_conversation(model_folder, pictures, monkeypatch, capsys, tmp_path):
    (tmp_path / "broken.png").write_bytes(pictures[0].read_bytes()[:40])
    lines = iter([f"/image {tmp_path / 'broken.png'}", f"/image {pictures[0]}", "what is it?", "/new", "", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.main(["chat", "--model", str(model_folder), "--max-new-tokens", "3"]) == 0
    assert "broken.png" in capsys.readouterr().out
    assert next(lines, None) is None


def converse(model_folder, monkeypatch, lines: list[str]) -> Conversation:
    """Hold a conversation of these lines."""
    rest = iter(lines)
    held = []
    real = Conversation.__init__
    monkeypatch.setattr("builtins.input", lambda prompt: next(rest))
    monkeypatch.setattr(Conversation, "__init__", lambda self, *args: held.append(self) or real(self, *args))
    assert cli.main(["chat", "--model", str(model_folder), "--max-new-tokens", "1"]) == 0
    return held[0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/image", "/image: expected a path or URL after it"),
        ("/image ''", "/image: expected a path or URL after it"),
        ("/images a.png", "/images: no command"),
        ("/quti", "/quti: no command"),
        ("what is \udcff?", "bytes that are no UTF-8"),
    ],
    ids=ascii,
)
def test_a_mistyped_line_is_no_question(model_folder, monkeypatch, capsys, line, reason):
    assert converse(model_folder, monkeypatch, [line, "/quit"]).messages == []
    assert f"! {reason}" in capsys.readouterr().out.replace("The line holds ", "")


def test_help_is_given_and_a_space_makes_a_question_of_a_command(model_folder, monkeypatch, capsys):
    held = converse(model_folder, monkeypatch, ["/help", " /quit what?", "/quit"])
    assert capsys.readouterr().out.count("/image PATH adds a picture") == 2
    assert held.messages[0]["content"][-1]["text"] == "/quit what?"


def test_paths_may_be_quoted_and_start_at_home(model_folder, pictures, monkeypatch):
    monkeypatch.setenv("HOME", str(pictures[0].parent))
    spaced = pictures[0].rename(pictures[0].with_name("a b.png"))
    lines = [f'/image "{spaced}"', f"/image '{spaced}'", f"/image {spaced}", "/image ~/a b.png", "/quit"]
    assert len(converse(model_folder, monkeypatch, lines).images) == 4


def test_bytes_of_another_encoding_do_not_end_a_conversation(model_folder):
    finished = subprocess.run(
        [sys.executable, "-m", "hovle", "chat", "--model", str(model_folder), "--max-new-tokens", "1"],
        input=b"caf\xe9?\n/help\n",
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert b"no UTF-8" in finished.stdout
    assert finished.stdout.count(b"/image PATH adds a picture") == 2


def test_a_missing_picture_is_named_before_the_model_is_read(model_folder, monkeypatch, capsys):
    monkeypatch.setattr(HoVLEProcessor, "from_pretrained", lambda *_: pytest.fail("the model would be read"))
    assert cli.main(["chat", "--model", str(model_folder), "--image", "gone.png", "-q", "?"]) == 1
    assert "gone.png" in capsys.readouterr().err


def test_a_folder_without_a_processor_is_told_so(model_folder, capsys):
    (model_folder / "processor_config.json").unlink()
    assert cli.main(["chat", "--model", str(model_folder), "-q", "?"]) == 1
    assert "holds a model but no processor (preprocessor_config.json missing)" in capsys.readouterr().err


def test_the_end_of_input_ends_the_conversation(model_folder, monkeypatch):
    def end(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert cli.main(["chat", "--model", str(model_folder)]) == 0


def test_a_missing_model_or_picture_is_named(model_folder, tmp_path, capsys):
    assert cli.main(["chat", "--model", str(tmp_path / "nowhere"), "-q", "?"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert cli.main(["chat", "--model", str(model_folder), "--image", str(tmp_path / "gone.png"), "-q", "?"]) == 1
    assert "gone.png" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["runs/x", "runs/demo/x", "nowhere/demo/x", "./x", "/nowhere/x", "~/x", "../x", "x"])
def test_a_missing_folder_is_named_at_once_and_no_hub_is_asked(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HoVLEProcessor, "from_pretrained", lambda *_, **__: pytest.fail("the Hub would be asked"))
    assert cli.main(["chat", "--model", name, "-q", "?"]) == 1
    assert f"No model in {name}, as there is no such folder: expected a folder" in capsys.readouterr().err
