"""Tiles equal the released rule, their pixels Pillow's bicubic filter, and counts the real number of tiles."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hovle import HoVLEConfig, HoVLEImageProcessor, HoVLEProcessor
from hovle.model import tiling

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def released_grid(width: int, height: int, fewest: int, most: int, tile: int) -> tuple[int, int]:
    """The rule of the released code, written down anew: columns, rows."""
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if fewest <= i * j <= most]
    best, best_difference = (1, 1), float("inf")
    for i, j in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - i / j)
        is_tie = difference == best_difference
        if difference < best_difference or (is_tie and width * height > 0.5 * tile**2 * i * j):
            best, best_difference = (i, j), difference
    return best


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (max(height // 8, 2), max(width // 8, 2), 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def test_the_grid_is_the_released_one_for_thousands_of_sizes():
    processor = HoVLEImageProcessor()
    rng = np.random.default_rng(0)
    sizes = [tuple(map(int, rng.integers(1, 4000, 2))) for _ in range(2000)]
    sizes += [tuple(map(int, rng.integers(1, 60, 2))) for _ in range(300)]
    # Simple ratios meet exact ties, where the area decides.
    sizes += [(k * i, k * j) for i in range(1, 13) for j in range(1, 13) for k in (1, 37, 100, 224, 317, 448, 900)]
    sizes += [
        (int(448 * i * 0.5**0.5) + d, int(448 * j * 0.5**0.5) + d)
        for i in (1, 2, 3)
        for j in (1, 2, 3)
        for d in (0, 1)
    ]
    for width, height in sizes:
        assert processor.choose_grid(height, width) == released_grid(width, height, 1, 12, 448), (width, height)
    for fewest, most, tile in ((1, 6, 448), (1, 1, 448), (4, 4, 224), (3, 9, 336), (1, 40, 56), (7, 7, 448)):
        kwargs = {"min_tiles": fewest, "max_tiles": most, "tile_size": tile}
        for width, height in sizes[::9]:
            expected = released_grid(width, height, fewest, most, tile)
            assert processor.choose_grid(height, width, kwargs) == expected, (width, height, kwargs)


@pytest.mark.parametrize(("width", "height"), [(100, 50), (448, 448), (300, 700), (1, 1), (2, 300), (640, 480)])
def test_tiles_are_in_reading_order_and_the_thumbnail_is_last(width: int, height: int):
    picture = noise(width, height)
    outputs = HoVLEImageProcessor(tile_size=56)(picture, return_tensors="pt")
    columns, rows = released_grid(width, height, 1, 12, 56)
    canvas = picture.resize((columns * 56, rows * 56), Image.Resampling.BICUBIC)
    expected = [
        canvas.crop((56 * column, 56 * row, 56 * column + 56, 56 * row + 56))
        for row in range(rows)
        for column in range(columns)
    ]
    if len(expected) > 1:
        expected.append(picture.resize((56, 56), Image.Resampling.BICUBIC))
    expected = (np.stack([np.asarray(tile) for tile in expected]) / 255 - MEAN) / STD
    pixel_values = outputs["pixel_values"]
    assert pixel_values.dtype == torch.float32
    assert outputs["num_patches"].tolist() == [len(expected)]
    # Measured worst case: 4e-7.
    np.testing.assert_allclose(pixel_values.numpy(), expected.transpose(0, 3, 1, 2), rtol=0, atol=2e-6)


def test_no_arguments_give_the_released_settings():
    processor = HoVLEImageProcessor()
    outputs = processor(noise(1280, 960), return_tensors="pt")
    assert outputs["pixel_values"].shape == (13, 3, 448, 448)
    assert processor(noise(60, 60), return_tensors="pt")["pixel_values"].shape == (1, 3, 448, 448)


def test_counts_agree_with_the_real_tiles():
    processor = HoVLEImageProcessor(tile_size=28)
    rng = np.random.default_rng(1)
    for _ in range(60):
        width, height = map(int, rng.integers(1, 200, 2))
        most = int(rng.integers(1, 14))
        kwargs = {
            "max_tiles": most,
            "min_tiles": int(rng.integers(1, most + 1)),
            "tile_size": int(rng.choice([14, 28])),
        }
        real = len(processor(noise(width, height), return_tensors="pt", **kwargs)["pixel_values"])
        assert processor.get_number_of_image_patches(height, width, kwargs) == real
    assert processor.get_number_of_image_patches(100, 400) == 5
    assert processor.get_number_of_image_patches(100, 400, {"crop_to_patches": False}) == 1
    assert len(processor(noise(400, 100), crop_to_patches=False)["pixel_values"]) == 1


def test_several_pictures_keep_their_order():
    processor = HoVLEImageProcessor(tile_size=28)
    pictures = [noise(30, 30, 1), noise(90, 30, 2), noise(30, 30, 3)]
    outputs = processor(pictures, return_tensors="pt")
    single = [processor(picture, return_tensors="pt") for picture in pictures]
    assert torch.equal(outputs["pixel_values"], torch.cat([one["pixel_values"] for one in single]))
    assert outputs["num_patches"].tolist() == [1, 4, 1]
    nested = processor([[pictures[0]], pictures[1:]], return_tensors="pt")
    assert torch.equal(nested["pixel_values"], outputs["pixel_values"])


def test_pictures_may_be_paths_arrays_and_odd_modes(tmp_path: Path):
    processor = HoVLEImageProcessor(tile_size=28)
    picture = noise(50, 50)
    picture.save(tmp_path / "a.png")
    array = np.asarray(picture)
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    batch = np.stack([array, array])
    for source in (
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        array,
        torch.from_numpy(array.transpose(2, 0, 1).copy()),
    ):
        assert torch.equal(processor(source, return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(processor(batch, return_tensors="pt")["pixel_values"], torch.cat([expected, expected]))
    white = processor(Image.new("RGBA", (9, 9)), return_tensors="pt")["pixel_values"]
    assert white.min() > 2  # white, not black
    with pytest.raises(ValueError, match=r"picture 2 of the request \(.*gone\.png\): no such file"):
        processor([picture, str(tmp_path / "gone.png")])


def test_impossible_numbers_of_tiles_are_refused():
    for kwargs in ({"min_tiles": 5, "max_tiles": 3}, {"max_tiles": 0}, {"min_tiles": 0}, {"min_tiles": 13}):
        with pytest.raises(ValueError, match="min_tiles"):
            HoVLEImageProcessor(**kwargs)
        with pytest.raises(ValueError, match="min_tiles"):
            HoVLEImageProcessor()(noise(20, 20), **kwargs)
    with pytest.raises(ValueError, match="tile_size"):
        HoVLEImageProcessor(tile_size=0)


def test_a_later_size_is_not_overruled():
    processor = HoVLEImageProcessor(tile_size=56)
    assert (
        processor(noise(20, 20), size={"height": 28, "width": 28}, return_tensors="pt")["pixel_values"].shape[-1] == 28
    )
    processor.size = {"height": 84, "width": 84}
    assert processor(noise(20, 20), return_tensors="pt")["pixel_values"].shape[-1] == 84


def test_save_and_load_with_the_auto_class(tmp_path: Path):
    HoVLEImageProcessor(tile_size=56, max_tiles=5).save_pretrained(tmp_path)
    for processor in (AutoImageProcessor.from_pretrained(tmp_path), HoVLEImageProcessor.from_pretrained(tmp_path)):
        assert type(processor) is HoVLEImageProcessor
        assert (dict(processor.size), processor.max_patches) == ({"height": 56, "width": 56}, 5)
    assert "tile_size" not in processor.to_dict()
    assert HoVLEConfig in AutoImageProcessor.__init__.__globals__["IMAGE_PROCESSOR_MAPPING"]


def test_nothing_needs_torchvision(make_tokenizer, tmp_path: Path):
    """Hide torchvision from a fresh interpreter: the package imports and gives the same pixels."""
    program = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.startswith("torchvision") else find_spec(name, *rest)
sys.modules["torchvision"] = None
import numpy as np, hovle
array = np.arange(4800, dtype=np.uint8).reshape(40, 40, 3)
outputs = hovle.HoVLEImageProcessor(tile_size=28)(array, return_tensors="pt")
print(float(outputs["pixel_values"].double().sum()))
print(type(hovle.HoVLEProcessor.from_pretrained(sys.argv[1]).image_processor).__name__)
"""
    HoVLEProcessor.from_language_model(make_tokenizer(), image_size=56).save_pretrained(tmp_path)
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    array = np.arange(4800, dtype=np.uint8).reshape(40, 40, 3)
    here = HoVLEImageProcessor(tile_size=28)(array, return_tensors="pt")["pixel_values"].double().sum()
    total, name = result.stdout.split()
    assert float(total) == float(here)
    assert name == "HoVLEImageProcessor"


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_a_layout_of_arrays_is_not_taken_from_the_caller(layout: str):
    """It was ignored: red in `(3, 28, 3)` became a grey picture."""
    array = np.zeros((3, 28, 3), dtype=np.uint8)
    array[0] = 255
    with pytest.raises(ValueError, match=f"input_data_format='{layout}' is not taken"):
        HoVLEImageProcessor(tile_size=28)(array, input_data_format=layout)
    red, green, blue = HoVLEImageProcessor(tile_size=28)(torch.tensor(array), do_normalize=False)["pixel_values"][0]
    assert (red.mean(), green.mean(), blue.mean()) == (1, 0, 0)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        *(({"max_patches": most}, "max_tiles") for most in (0, -1, 10**6, 2.5, "12")),
        *(({"min_patches": fewest}, "min_tiles") for fewest in (0, -1, 13)),
        *(({"size": {"height": side, "width": side}}, "tile_size") for side in (0, -56, 10**6)),
        *(({"image_std": std}, "image_std") for std in ([0.0, 1.0, 1.0], [float("nan")] * 3, ["a"] * 3)),
        ({"image_mean": [float("inf")] * 3}, "image_mean"),
        *(({"rescale_factor": factor}, "rescale_factor") for factor in (0.0, float("nan"), -1.0)),
    ],
)
def test_saved_settings_that_cannot_work_are_refused_by_name(tmp_path, settings, name):
    HoVLEImageProcessor().save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ValueError, match=name):
        HoVLEImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [{}, {"do_rescale": False, "do_normalize": False}], ids=["floats", "bytes"])
def test_a_picture_that_is_squeezed_is_told_of_once(options, caplog, monkeypatch):
    tiling.logger.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    processor = HoVLEImageProcessor(tile_size=28, max_tiles=4, **options)
    processor([Image.new("RGB", (60, 60)), Image.new("RGB", (56, 440))])
    assert "squeezed" not in caplog.text
    for _ in range(2):
        processor([Image.new("RGB", (56, 900)), Image.new("RGB", (900, 56)), Image.new("RGB", (900, 900))])
    assert caplog.text.count("squeezed to less than a quarter") == 1
    assert "max_tiles" in caplog.text
