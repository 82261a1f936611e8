"""`hovle bench engines`: engines take turns over the same prompts, and what is compared is what they say."""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_models import TEXT, shake
from transformers import LlamaConfig

from hovle import HoVLEConfig, HoVLEForConditionalGeneration, HoVLEProcessor, cli
from hovle.bench import engines as bench
from hovle.bench import engines_peer
from hovle.bench.generate_models import IMAGE, build


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, make_tokenizer) -> Path:
    """One holistic layer and one of the language model."""
    folder = tmp_path_factory.mktemp("hovle") / "tiny" / "model"
    torch.manual_seed(0)
    text_config = LlamaConfig(**{**TEXT, "vocab_size": 416, "num_hidden_layers": 2, "max_position_embeddings": 512})
    config = HoVLEConfig(text_config=text_config, num_embedding_layers=1, image_size=56, image_token_id=402)
    shake(HoVLEForConditionalGeneration(config)).save_pretrained(folder)
    HoVLEProcessor.from_language_model(make_tokenizer(), config, max_tiles=2).save_pretrained(folder)
    return folder


def check(result: dict, weights: int) -> None:
    """Figures of a run over four prompts, of torch and another engine."""
    torch_engine, other = result["engines"].values()
    assert torch_engine["parity"] is None
    assert other["parity"] == 1
    assert result["parity_positions"] == 16
    assert torch_engine["size_bytes"] == weights
    for figures in (torch_engine, other):
        assert weights <= figures["size_bytes"] < 10 * weights
        assert figures["median_tokens_per_second"] <= figures["tokens_per_second"]
        assert 0 < figures["seconds_to_first_token"] <= figures["median_seconds_to_first_token"]
        assert figures["peak_memory_bytes"] > 2e8


def command(model_folder: Path, engines: str, *options: str) -> list[str]:
    counts = ["--rounds", "2", "--tokens", "4", "--threads", "1"]
    return ["bench", "engines", str(model_folder), "--engines", engines, *counts, *options]


def test_figures_are_kept_with_their_circumstances_and_shown_in_a_table(model_folder, tmp_path, capsys, monkeypatch):
    turns = []

    @contextlib.contextmanager
    def run_here(name, folder, prompts, num_threads):
        bench._load(name, folder, prompts, num_threads)
        with ThreadPoolExecutor(1) as executor:
            submit = executor.submit
            executor.submit = lambda *task: turns.append((name, *task[:2])) or submit(*task)
            yield executor

    monkeypatch.setattr(bench, "run_apart", run_here)
    monkeypatch.setitem(bench.ENGINES, "again", dataclasses.replace(bench.ENGINES["torch"], number_format="f32"))
    out = tmp_path / "speed" / "engines.json"
    assert cli.main(command(model_folder, "again", "--out", str(out))) == 0
    result = json.loads(out.read_text())
    assert list(result["engines"]) == ["torch", "again"]
    assert result["model"] == "tiny"
    assert result["environment"]["threads"] == 1
    assert "onnxruntime" in result["environment"]
    check(result, (model_folder / "model.safetensors").stat().st_size)
    assert turns[:4] == [(name, bench.answer, prompt) for prompt in (0, 1) for name in ("torch", "again")]
    lines = capsys.readouterr().out.splitlines()
    assert "reference" in next(line for line in lines if line.startswith("torch"))
    assert "100.0%" in next(line for line in lines if line.startswith("again"))


@pytest.mark.slow
def test_engines_run_in_processes_of_their_own(model_folder, tmp_path):
    out = tmp_path / "engines.json"
    assert cli.main(command(model_folder, "torch,onnx", "--out", str(out))) == 0
    result = json.loads(out.read_text())
    assert list(result["engines"]) == ["torch", "onnx"]
    check(result, (model_folder / "model.safetensors").stat().st_size)
    assert not bench._HERE


@pytest.fixture
def here(model_folder):
    """The torch engine in this process."""
    prompts = [bench.encode(HoVLEProcessor.from_pretrained(model_folder), shape) for shape in bench.SHAPES]
    threads = torch.get_num_threads()
    bench._load("torch", model_folder, prompts, threads)
    yield bench._HERE["model"]
    bench._HERE.clear()


def test_parity_counts_next_tokens_behind_torchs_own_words(here):
    ids = bench.answer(0, 6).ids
    assert bench.next_tokens(0, ids) == ids
    changed = [*ids[:2], ids[2] + 1, *ids[3:]]
    with ThreadPoolExecutor(1) as worker:
        assert bench.parity(worker, [ids]) == 1
        assert bench.parity(worker, [changed]) < 1


def test_an_answer_forgets_what_the_last_one_read_and_has_the_length_asked_for(here, monkeypatch):
    calls = []
    monkeypatch.setattr(type(here), "forget", lambda model: calls.append("forgotten"), raising=False)
    here.generation_config.eos_token_id = bench.answer(3, 2).ids[0]  # it would end at once
    found = bench.answer(3, 5)
    assert len(found.ids) == 5
    assert found.seconds_to_first_token > 0
    assert found.seconds_of_others > 0
    assert len(calls) == 2


def test_engines_that_are_not_installed_are_told_or_refused_where_they_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    chosen, left_out = bench.choose(None)
    assert chosen == ["torch"]
    assert "pip install 'hovle[openvino]'" in left_out["openvino"]
    assert left_out.keys() == bench.ENGINES.keys() - {"torch"}
    with pytest.raises(ValueError, match=r"pip install 'hovle\[onnx\]'"):
        bench.choose("onnx")
    with pytest.raises(ValueError, match="tensorrt is none of torch"):
        bench.choose("tensorrt")


def test_a_format_that_cannot_hold_a_model_is_told_or_refused_where_it_is_named(model_folder, tmp_path, monkeypatch):
    def refuse(source, target, to):
        raise ValueError(f"{to} is not for it")

    monkeypatch.setattr(bench, "export", refuse)
    folders, refused = bench.export_for(["torch", "onnx"], model_folder, tmp_path, is_named=False)
    assert folders == {"torch": model_folder}
    assert refused == {"onnx": "onnx is not for it"}
    with pytest.raises(ValueError, match="onnx is not for it"):
        bench.export_for(["torch", "onnx"], model_folder, tmp_path, is_named=True)


# --- the peer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "count"), [(None, 0), ((448, 448), 1), ((1200, 600), 7), ((300, 700), 3)])
def test_the_peer_is_shown_as_many_words_and_the_tiles_that_cover_a_picture(shape, count):
    inputs = engines_peer.peer_prompt(shape, 12)
    assert inputs["input_ids"].shape == (1, 12 + 64 * count)
    assert int((inputs["input_ids"] == IMAGE).sum()) == 64 * count
    assert len(inputs.get("pixel_values", ())) == count


def test_the_peers_encoder_makes_what_transformers_makes():
    model = build(engines_peer.VARIANT, 0.01, torch.device("cpu"), torch.float32)
    tiles = engines_peer.peer_prompt((700, 300), 1)["pixel_values"]
    with torch.no_grad():
        found = engines_peer.VisionEncoder(model)(tiles)
        expected = model.model.get_image_features(pixel_values=tiles[None]).pooler_output
    assert found.shape == (3, 64, 576)
    torch.testing.assert_close(found.flatten(0, 1), torch.cat(list(expected)))


@pytest.mark.slow
def test_the_peer_runs_beside_the_model(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "write_peer", lambda folder: engines_peer.write_peer(folder, 0.1))
    out = tmp_path / "engines.json"
    assert cli.main(command(model_folder, f"torch,{bench.PEER}", "--out", str(out))) == 0
    peer = json.loads(out.read_text())["engines"][bench.PEER]
    assert peer["parity"] is None
    assert peer["tokens_per_second"] > 0
    assert "another model" in next(line for line in capsys.readouterr().out.splitlines() if bench.PEER in line)


def test_a_single_token_has_no_rate():
    with pytest.raises(argparse.ArgumentTypeError, match="at least 2"):
        bench.answer_length("1")
