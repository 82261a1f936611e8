"""`hovle bench caption`: both ways answer the same, and what is written says so."""

import json
import shutil

import pytest
import torch
from PIL import Image
from tiny_models import shake

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor, cli
from hovle.bench.caption import measure_caption


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config, make_tokenizer):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config()
    shake(HoVLEForConditionalGeneration(config)).save_pretrained(folder)
    HoVLEProcessor.from_language_model(make_tokenizer(), config, max_tiles=4).save_pretrained(folder)
    return folder


def test_both_ways_answer_the_same_and_the_result_says_how_it_was_made(folder, tmp_path, capsys):
    out = tmp_path / "results" / "caption.json"
    options = {"num-pictures": 3, "rounds": 1, "batch-size": 2, "max-new-tokens": 4, "dtype": "float32"}
    argv = ["bench", "caption", "--model", str(folder), "--out", str(out)]
    assert cli.main([*argv, *(str(part) for name in options for part in (f"--{name}", options[name]))]) == 0
    result = json.loads(out.read_text())
    assert result["same_answers"] == "3 of 3"
    assert set(result["pictures_per_second"]) == {"caption", "pipeline"}
    assert min(result["pictures_per_second"].values()) > 0
    assert (result["num_pictures"], result["batch_size"], result["dtype"]) == (3, 2, "float32")
    assert '"bench": "caption"' in capsys.readouterr().out


def test_rounds_take_turns_after_warming_up_and_differing_answers_are_counted():
    calls = []

    def way(name: str, answers: list[str]):
        return lambda paths: calls.append((name, len(paths))) or answers[: len(paths)]

    ways = {"caption": way("caption", ["a", "b", "c"]), "pipeline": way("pipeline", ["a", "x", "c"])}
    result = measure_caption(ways, [None] * 3, 2)
    assert calls == [("caption", 2), ("pipeline", 2), *[("caption", 3), ("pipeline", 3)] * 2]
    assert result["same_answers"] == "2 of 3"


def test_counts_of_none_are_refused(folder, capsys):
    assert cli.main(["bench", "caption", "--model", str(folder), "--rounds", "0"]) == 1
    assert "--rounds, --num-pictures, --batch-size, --max-new-tokens and --workers" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_is_named(folder, tmp_path, capsys):
    Image.new("RGB", (60, 60)).save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    argv = ["bench", "caption", "--model", str(folder), "--pictures", str(tmp_path), "--num-pictures", "2"]
    assert cli.main([*argv, "--max-new-tokens", "1"]) == 1
    assert "b.jpg: cannot be decoded" in capsys.readouterr().err


def test_fewer_tiles_than_the_model_begins_with_are_those_of_both_ways(folder, tmp_path, capsys):
    wide = shutil.copytree(folder, tmp_path / "model")
    processor = HoVLEProcessor.from_pretrained(wide)
    processor.image_processor.min_tiles = 2
    processor.save_pretrained(wide)
    options = {"num-pictures": 2, "rounds": 1, "max-new-tokens": 2, "max-tiles": 1, "dtype": "float32"}
    argv = ["bench", "caption", "--model", str(wide)]
    assert cli.main([*argv, *(str(part) for name in options for part in (f"--{name}", options[name]))]) == 0
    assert json.loads(capsys.readouterr().out)["same_answers"] == "2 of 2"
