"""`hovle eval attention`: numbers and pictures of one model or two."""

import json

import pytest
from PIL import Image

from hovle.cli import main
from hovle.eval.analyses.drawing import drawable, layer_ticks
from hovle.eval.analyses.model_under_test import ModelUnderTest
from hovle.files.model_folder import short_name


def is_chart(path) -> bool:
    """Whether a PNG file shows more than one colour."""
    with Image.open(path) as drawing:
        return min(drawing.size) > 200 and len(drawing.convert("L").getcolors()) > 10


@pytest.mark.parametrize("other", ["internvl", "no holistic layers", None])
def test_the_command_shows_two_models_side_by_side(
    other, save_hovle, save_internvl, picture_file, tmp_path, capsys, monkeypatch
):
    ours = save_hovle()
    arguments = ["eval", "attention", ours, str(picture_file), "what costs $5 or $6?", "--output", str(tmp_path / "o")]
    arguments += ["--max-new-tokens", "8"]
    if other is not None:
        path = save_internvl() if other == "internvl" else save_hovle("plain", num_embedding_layers=0)
        arguments += ["--compare", path]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "o" / "attention.json").read_text())
    hashes = [model["hash"] for model in result["provenance"]["models"]]
    assert len(hashes) == len(result["models"])
    assert all(len(found) == 16 for found in hashes)
    assert [model["model"] for model in result["models"]] == [ours] + ([] if other is None else [path])
    for model in result["models"]:
        assert model["grid"] == {"columns": 3, "rows": 1, "side": 2, "thumbnail": True}
        for section in model["sections"]:
            assert section["num_image_tokens"] == 16
            assert len(section["answer_maps"]) == len(model["answer_tokens"]) <= 8
            for layer in section["layers"]:
                for rows in layer.values():
                    assert sum(rows["mass"].values()) == pytest.approx(1, abs=2e-3)
            for entry in section["answer_maps"]:
                weights = sum(map(sum, entry["picture"])) + sum(map(sum, entry["thumbnail"]))
                assert weights == pytest.approx(entry["mass"], abs=1e-3)
    assert [len(section["layers"]) for section in result["models"][0]["sections"]] == [2, 2]
    assert is_chart(tmp_path / "o" / "layers.png")
    assert is_chart(tmp_path / "o" / "maps.png")
    assert "text-to-image   mass" in capsys.readouterr().out


def test_the_answer_can_be_given(save_hovle, picture_file, tmp_path):
    arguments = ["eval", "attention", save_hovle(), str(picture_file), "what?", "--output", str(tmp_path / "o")]
    assert main([*arguments, "--answer", "a small cat", "--max-tiles", "1"]) == 0
    [model] = json.loads((tmp_path / "o" / "attention.json").read_text())["models"]
    assert "".join(model["answer_tokens"]) == "asmallcat"
    assert model["sections"][0]["answer_maps"][0]["thumbnail"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picture": "missing.png"}, "missing.png"),
        ({"model": "./missing/model"}, "No model in ./missing/model"),
        ({"--answer": ""}, "The answer to look at is empty"),
        ({"--tokens": "0"}, "--tokens must be at least 1, got 0"),
        ({"--max-new-tokens": "0"}, "--max-new-tokens must be at least 1, got 0"),
    ],
)
def test_wrong_input_is_refused_by_message(change, message, save_hovle, picture_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = change.pop("picture", str(picture_file))
    model = change.pop("model", None) or save_hovle()
    options = [part for option in change.items() for part in option]
    assert main(["eval", "attention", model, picture, "what?", *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "attention").exists()


def test_a_model_of_another_kind_is_refused(tmp_path, picture_file, capsys):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "llama"}')
    assert main(["eval", "attention", str(tmp_path / "text"), str(picture_file), "what?"]) == 1
    assert "is a llama model; the layers and tiles of hovle and internvl are known" in capsys.readouterr().err


def test_a_tile_limit_reaches_transformers_internvl(save_internvl, picture):
    tested = ModelUnderTest(save_internvl())
    assert tested.prepare(picture, "what?").grid.num_tokens == 16
    assert tested.prepare(picture, "what?", max_tiles=1).grid.num_tokens == 4


def test_text_that_a_chart_cannot_draw_is_written_in_another_way():
    assert drawable("$5\n", 9) == r"\$5\n"
    assert drawable("a b", 9) == "a\u2423b"
    assert drawable("word" * 5, 8) == "wordwor\u2026"
    assert drawable("\u4e2d", 9) == "U+4E2D"


def test_layers_are_numbered_from_the_language_models_first():
    assert layer_ticks(4, 30) == {"H1": -3, "H4": 0, **{str(number): number for number in (5, 10, 15, 20, 25, 30)}}
    assert layer_ticks(0, 12) == {"1": 1, **{str(number): number for number in (2, 4, 6, 8, 10, 12)}}
    assert layer_ticks(1, 2) == {"H1": 0, "1": 1, "2": 2}


def test_models_are_called_by_their_folder(tmp_path):
    assert short_name("owner/name") == "name"
    (tmp_path / "instruction_tuning" / "model").mkdir(parents=True)
    assert short_name(str(tmp_path / "instruction_tuning" / "model")) == "instruction tuning"
