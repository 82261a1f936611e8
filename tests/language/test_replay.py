"""Text that a tiny language model writes: the same from a seed, whole after every kind of end, without repeats."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TopPLogitsWarper

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor, cli
from hovle.errors import StopRunError
from hovle.language import replay
from hovle.language.replay import (
    ChatTurns,
    Draw,
    ReplaySettings,
    Writer,
    load_bare_model,
    runs_in_circles,
    write_replay,
)

SETTINGS = ReplaySettings(
    model="tiny", seed=0, chats=0.5, batch_size=4, length=12, temperature=1.0, top_p=0.95, dtype="float32"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_tokenizer) -> Path:
    """A tiny language model of random weights with its tokenizer; read only."""
    folder = tmp_path_factory.mktemp("tiny")
    text = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(**text, num_hidden_layers=1, num_key_value_heads=2, eos_token_id=2, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(folder):
    return load_bare_model(str(folder), torch.float32)


@pytest.fixture
def writer(parts):
    """`writer(field=value, ...)`: a writer with other settings."""
    return lambda **fields: Writer(*parts, dataclasses.replace(SETTINGS, **fields))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_file_holds_chats_and_prose_in_shares_of_its_tokens(writer, tmp_path):
    path = tmp_path / "replay.jsonl"
    progress = write_replay(writer(chats=0.5), 600, path)
    rows = rows_of(path)
    assert {tuple(row) for row in rows} == {("messages",), ("text",)}
    assert all([item["role"] for item in row.get("messages", [])] in ([], ["user", "assistant"]) for row in rows)
    assert len(rows) == progress.counts["kept"]
    assert progress.total >= 600
    assert progress.num_tokens["chats"] / progress.total == pytest.approx(0.5, abs=0.2)
    assert os.listdir(tmp_path) == ["replay.jsonl"]


def test_training_reads_the_file(writer, tmp_path, folder):
    from hovle.train.data.language import read_documents

    write_replay(writer(), 200, tmp_path / "replay.jsonl")
    processor = HoVLEProcessor.from_language_model(str(folder), image_size=56, patch_size=14)
    documents = list(read_documents(str(tmp_path / "replay.jsonl"), processor))
    assert len(documents) == len(rows_of(tmp_path / "replay.jsonl"))
    assert all(documents)


def test_the_same_seed_gives_the_same_file_and_another_seed_another(writer, tmp_path):
    state = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_replay(writer(seed=seed), 300, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("moment", ["Progress.save", "os.fsync"])
def test_a_run_that_was_interrupted_goes_on_as_an_unbroken_one(writer, tmp_path, moment):
    straight, broken = tmp_path / "straight.jsonl", tmp_path / "broken.jsonl"
    write_replay(writer(), 400, straight)
    calls = 0
    owner, name = (replay.Progress, "save") if moment == "Progress.save" else (os, "fsync")
    original = getattr(owner, name)

    def die_in_the_third(*args):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, die_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            write_replay(writer(), 400, broken)
    assert not broken.exists()
    with (tmp_path / "broken.jsonl.partial").open("ab") as file:
        file.write(b'{"text": "half of a li')
    write_replay(writer(), 400, broken)
    assert broken.read_bytes() == straight.read_bytes()


def test_a_killed_process_loses_and_repeats_nothing(folder, tmp_path, capsys):
    def command(name: str) -> list[str]:
        options = ["--tokens", "1500", "--length", "12", "--batch", "4", "--dtype", "float32"]
        return ["data", "replay", str(folder), *options, "--out", str(tmp_path / name)]

    killed = subprocess.Popen([sys.executable, "-m", "hovle", *command("killed")], stderr=subprocess.DEVNULL)
    progress = tmp_path / "killed.progress"
    while killed.poll() is None and not (progress.is_file() and replay.Progress.load(progress).num_batches > 2):
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert cli.main(command("killed")) == 0
    shown = capsys.readouterr()
    assert "documents kept" in shown.out
    assert "killed:" in shown.err  # the bar
    assert cli.main(command("straight")) == 0
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "straight").read_bytes()


def test_other_settings_do_not_go_on_with_an_unfinished_file(writer, tmp_path):
    replay.resume(tmp_path / "a.partial", tmp_path / "a.progress", SETTINGS)
    with pytest.raises(ValueError, match=r"begun with other settings \(seed: 0 -> 3; length: 12 -> 13\)"):
        write_replay(writer(seed=3, length=13), 100, tmp_path / "a")


def test_a_finished_file_is_not_overwritten(writer, tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ValueError, match="exists: name another file"):
        write_replay(writer(), 100, tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


def test_documents_that_were_written_before_are_left_out(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(Writer, "_continue", lambda _, prompts, draw, __: [[300, 301 + draw % 3] for _ in prompts])
    monkeypatch.setattr(replay, "MOST_EMPTY_BATCHES", 3)
    with pytest.raises(StopRunError, match=r"3 batches in a row gave nothing to keep: .* repeated"):
        write_replay(writer(chats=1.0), 10_000, tmp_path / "a")
    rows = rows_of(tmp_path / "a.partial")
    assert len(rows) == len({row["messages"][0]["content"] for row in rows}) == 3


def test_text_that_runs_in_circles_is_left_out_and_counted(writer, tmp_path, monkeypatch):
    texts = iter(range(1000))
    monkeypatch.setattr(
        Writer,
        "_continue",
        lambda self, prompts, draw, length: [
            [300, 301] * 20 if place else [300 + next(texts) % 80, 40 + next(texts)] for place in range(len(prompts))
        ],
    )
    progress = write_replay(writer(chats=0.0), 20, tmp_path / "a")
    assert progress.counts["in circles"] == 3 * progress.num_batches
    assert "in circles" in replay.describe(progress)


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([1, 2, 3] * 10, True),
        ([7] * 12, True),
        ([*range(100), *[1, 2] * 20], True),
        ([*range(40)], False),
        ([1, 2, 3], False),
        ([5, 5, 5, 5, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11], False),
    ],
)
def test_circles_are_found_anywhere_but_not_in_short_or_varied_text(ids, found):
    assert runs_in_circles(ids) is found


def test_special_tokens_and_rows_beyond_the_tokenizer_are_never_written(writer, parts):
    _, tokenizer = parts
    found = writer()._continue([[300]] * 16, 0, 64)
    ids = {token for row in found for token in row}
    assert len(ids) > 100
    assert not ids & {*tokenizer.all_special_ids, *range(len(tokenizer), 512)}


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "has no chat template"),
        ("{% for message in messages %}{{ message['role'] }}{% endfor %}", "shows no user's turn"),
        ("{{ raise_exception('no users') }}", "refuses a user's turn"),
        ("{% for message in messages %}Q: {{ message['content'] }}\nA:{% endfor %}", "no special token tells"),
    ],
)
def test_a_template_without_users_turns_is_refused(make_tokenizer, template, problem):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"{problem}.*--chats 0"):
        ChatTurns(tokenizer)


def test_without_a_template_prose_can_be_written(folder, parts, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    found = list(Writer(parts[0], tokenizer, dataclasses.replace(SETTINGS, chats=0.0)).prose(0, set()))
    assert found


def test_documents_longer_than_the_models_positions_are_refused(writer):
    with pytest.raises(ValueError, match=r"--length 5000 may take \d+ positions, the model has 2048"):
        writer(length=5000)


def test_of_a_hovle_its_bare_language_model_writes(folder, parts, tmp_path):
    torch.manual_seed(1)
    model = HoVLEForConditionalGeneration.from_language_model(str(folder), 2, dtype=torch.float32, image_size=56)
    for layer in model.model.embedding_layers:
        layer.mlp.down_proj.weight.data.normal_()
    model.save_pretrained(tmp_path / "hovle")
    HoVLEProcessor.from_language_model(str(folder), model.config).save_pretrained(tmp_path / "hovle")
    bare, tokenizer = load_bare_model(str(tmp_path / "hovle"), torch.float32)
    expected, _ = parts
    ids = torch.randint(20, 400, (2, 30))
    with torch.no_grad():
        found = bare(input_ids=ids).logits[..., :400]
        torch.testing.assert_close(found, expected(input_ids=ids).logits[..., :400], rtol=1e-4, atol=1e-5)
    progress = write_replay(Writer(bare, tokenizer, SETTINGS), 100, tmp_path / "a")
    assert progress.total >= 100


def test_a_model_that_is_nowhere_is_refused(tmp_path, capsys):
    assert cli.main(["data", "replay", str(tmp_path / "no"), "--tokens", "1", "--out", str(tmp_path / "a")]) == 1
    assert "No model in" in capsys.readouterr().err


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.95), (0.5, 0.6), (1.3, 1.0)])
def test_words_are_drawn_as_the_library_draws_them(temperature, top_p):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0))
    settings = dataclasses.replace(SETTINGS, temperature=temperature, top_p=top_p)
    draw = Draw(settings, [3, 7], torch.Generator().manual_seed(1))
    drawn = draw(torch.zeros(20_000, 1), logits.expand(20_000, -1)).argmax(dim=-1)
    logits[[3, 7]] = -torch.inf
    expected = TopPLogitsWarper(top_p)(torch.zeros(1, 1), logits[None] / temperature).softmax(dim=-1)[0]
    found = drawn.bincount(minlength=40) / 20_000
    assert not found[expected == 0].any()
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)
