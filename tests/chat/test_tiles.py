"""`hovle tiles`: the counts are the processor's, the drawing is written, and bad input ends in a message."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hovle import HoVLEImageProcessor, HoVLEProcessor
from hovle.chat.tiles import LINE_SHADOW, draw_tiles, plan_tiles
from hovle.cli import main


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    array = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(array).resize((1280, 960)).save(path)
    return path


def test_the_released_numbers_are_printed_and_drawn(photo: Path, tmp_path: Path, capsys):
    assert main(["tiles", str(photo), "--out", str(tmp_path / "out.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("1280 x 960 px")
    assert lines[1].endswith("4 x 3 tiles of 448 px + thumbnail")
    assert lines[2].split() == ["tiles", "13"]
    assert lines[3].endswith(" 256")
    assert "3,330 (" in lines[4]
    with Image.open(tmp_path / "out.png") as drawing:
        assert drawing.width > 960
        assert drawing.height > 720


def test_options_change_the_numbers(photo: Path, tmp_path: Path, capsys):
    options = ["--tile-size", "56", "--max-tiles", "1", "--patch-size", "7", "--shuffle-factor", "1"]
    assert main(["tiles", str(photo), "--out", str(tmp_path / "out.jpg"), *options]) == 0
    out = capsys.readouterr().out
    assert "one tile of 56 px" in out
    assert "66 (with" in out


def test_a_model_folder_gives_its_own_numbers(photo: Path, tmp_path: Path, make_tokenizer, capsys):
    processor = HoVLEProcessor.from_language_model(make_tokenizer(), image_size=56, max_tiles=4)
    processor.save_pretrained(tmp_path / "model")
    arguments = ["tiles", str(photo), "--out", str(tmp_path / "out.png"), "--model", str(tmp_path / "model")]
    for options, max_tiles in (([], 4), (["--max-tiles", "12"], 12)):
        assert main([*arguments, *options]) == 0
        data = processor._get_num_multimodal_tokens(image_sizes=[(960, 1280)], max_tiles=max_tiles)
        assert f" {data.num_image_tokens[0]} (" in capsys.readouterr().out
    assert main([*arguments, "--patch-size", "7"]) == 1
    assert "belong to the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tile-size", "440"], "multiple of 28 pixels, the side of one token; the nearest valid sizes: 420 and 448"),
        (["--min-tiles", "5", "--max-tiles", "3"], "min_tiles"),
        (["--patch-size", "0"], "--patch-size must be at least 1"),
        (["--max-image-tokens", "100"], "max_image_tokens (100) is too small"),
        (["--out", "no/such/folder/x.png"], "cannot be written"),
        (["--out", "x.unknown"], "x.unknown: cannot be written"),
        (["--model", "no/such/model"], "no/such/model"),
    ],
)
def test_bad_options_end_in_a_message(photo: Path, options: list[str], words: str, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["tiles", str(photo), *options]) == 1
    assert words in capsys.readouterr().err


def test_a_bad_picture_ends_in_a_message(tmp_path: Path, capsys):
    (tmp_path / "notes.txt").write_text("hello")
    for name, words in (("notes.txt", "not a picture"), ("gone.png", "no such file")):
        assert main(["tiles", str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert name in error
        assert words in error


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 3000), (3000, 1), (50, 40), (2000, 1990), (900, 300)])
def test_pictures_of_any_shape_can_be_drawn(width: int, height: int):
    processor = HoVLEImageProcessor()
    (plan,) = plan_tiles([(height, width)], processor, 28)
    assert plan.grid.num_tiles == processor.get_number_of_image_patches(height, width)
    drawing = draw_tiles(Image.new("RGB", (width, height), "navy"), plan, title="a picture")
    colors = {color for _, color in drawing.getcolors(2**20)}
    assert tuple(bytes.fromhex(LINE_SHADOW[1:])) in colors
    assert (0, 0, 128) in colors


def test_several_pictures_share_a_budget_as_in_the_processor(photo: Path, tmp_path: Path, make_tokenizer, capsys):
    processor = HoVLEProcessor.from_language_model(make_tokenizer(), image_size=56, max_tiles=4)
    processor.save_pretrained(tmp_path / "model")
    wide = tmp_path / "wide.png"
    Image.new("RGB", (400, 100), "navy").save(wide)
    arguments = ["tiles", str(photo), str(wide), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "t.png")]
    for options, budget in (([], 10**6), (["--max-image-tokens", "30"], 30)):
        assert main([*arguments, *options]) == 0
        out = capsys.readouterr().out
        grids, tokens = processor.spread_tiles([(960, 1280), (100, 400)], budget)
        found = [int(line.split()[3]) for line in out.splitlines() if line.startswith("tokens in all")]
        assert found == tokens
        together = next(line for line in out.splitlines() if line.startswith("together"))
        assert together.split()[1] == str(sum(tokens)) == str(sum(found))
        assert ("of at most 30" in together) == bool(options)
        assert sum(tokens) <= budget
        assert (sum(grids) < 8) == bool(options)
    for number in (1, 2):
        with Image.open(tmp_path / f"t-{number}.png") as drawing:
            assert drawing.width > 960


def test_a_picture_that_is_squeezed_says_what_is_left_of_it(tmp_path: Path, capsys):
    for size, left, is_lost in [
        ((1080, 40_000), "41% of its width, 13% of its height", True),
        ((800, 800), "", False),
    ]:
        Image.new("RGB", size).save(tmp_path / "long.png")
        assert main(["tiles", str(tmp_path / "long.png"), "--out", str(tmp_path / "out.png")]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("what is left"))
        assert left in line
        assert ("small print is lost" in line) == is_lost
