"""`hovle bench`: what it measures is what it says."""

import json

import pytest
import torch

from hovle import HoVLEImageProcessor, cli
from hovle.bench import data as bench
from hovle.train.data.tiles import read_tiles


def test_bench_data_writes_figures_with_their_circumstances(tmp_path, capsys):
    out = tmp_path / "speed" / "data.json"
    options = ["--num-pictures", "2", "--rounds", "1", "--tile-size", "112", "--out", str(out)]
    assert cli.main(["bench", "data", *options]) == 0
    result = json.loads(out.read_text())
    assert result == json.loads(capsys.readouterr().out)
    assert set(result["pictures_per_second"]) == {"training", "pillow", "processor", "bytes"}
    assert min(result["pictures_per_second"].values()) > 0
    assert result["max_difference_grey_levels"] <= 2
    assert result["mean_difference_grey_levels"] < 0.05
    assert result["decoded_fast_ratio"] == 1
    assert result["environment"]["threads"] == 1
    assert result["environment"]["torch"] == torch.__version__.partition("+")[0]
    assert 25_000 < result["mean_file_bytes"] < 60_000


def test_the_pillow_route_cuts_the_tiles_of_the_image_processor(tmp_path):
    image_processor = HoVLEImageProcessor(tile_size=56, max_tiles=6)
    picture = bench.generate_photograph(3)
    picture.save(tmp_path / "a.png")
    expected = image_processor([picture], return_tensors="pt", do_normalize=False)["pixel_values"]
    assert len(expected) > 2
    assert torch.equal(bench.pillow_tiles(tmp_path / "a.png", image_processor).float(), (expected * 255).round())


def test_own_pictures_are_measured(tmp_path):
    bench.generate_photograph(0).save(tmp_path / "a.jpg")
    result = bench.measure_data([tmp_path / "a.jpg"], HoVLEImageProcessor(tile_size=56, max_tiles=1), 1)
    assert result["training_over_pillow"] > 0
    assert read_tiles(tmp_path / "a.jpg", HoVLEImageProcessor(tile_size=56, max_tiles=1)).shape == (1, 3, 56, 56)


def test_a_folder_without_jpegs_and_empty_counts_are_refused(tmp_path, capsys):
    assert cli.main(["bench", "data", "--pictures", str(tmp_path)]) == 1
    assert "holds no JPEG files" in capsys.readouterr().err
    assert cli.main(["bench", "data", "--rounds", "0"]) == 1
    assert "--rounds and --num-pictures must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_is_put_back(tmp_path, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cli.main(["bench", "data", "--num-pictures", "1", "--rounds", "1", "--tile-size", "28"])
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
