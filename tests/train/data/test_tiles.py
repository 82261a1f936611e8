"""Tiles of bytes: what `load_picture` reads, cut as the image processor cuts it, normalised to the same numbers."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from hovle import HoVLEImageProcessor
from hovle.model.pictures import PictureFile, load_picture, load_pixels
from hovle.train.data.tiles import PixelNormalization, cut_tiles, picture_key, read_tiles


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Something like a photograph: large soft areas, edges and a little noise, hardly any pure black or white."""
    generator = np.random.default_rng(seed)
    areas = Image.fromarray(generator.integers(50, 200, (6, 8, 3), dtype=np.uint8))
    areas = areas.resize((width, height), Image.Resampling.BICUBIC)
    areas.paste((70, 120, 160), (width // 4, height // 4, width // 2, height // 2))
    noise = generator.integers(-10, 11, (height, width, 3))
    return Image.fromarray((np.asarray(areas).astype(int) + noise).clip(0, 255).astype(np.uint8))


def saved(path: Path, image: Image.Image, **kwargs) -> Path:
    image.save(path, **kwargs)
    return path


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = value
    return exif


JPEGS = {
    "colour": {"quality": 90},
    "without subsampling": {"quality": 75, "subsampling": 0},
    "progressive": {"progressive": True},
    "rgb inside": {"keep_rgb": True},
    "with a comment": {"comment": "x" * 300},
    "upright by EXIF": {"exif": orientation(1)},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_jpeg_is_decoded_fast_to_the_same_bits(tmp_path, monkeypatch, options, mode):
    path = saved(tmp_path / "picture.jpg", photograph(211, 97).convert(mode), **options)
    expected = np.asarray(load_picture(path))
    monkeypatch.setattr("hovle.model.pictures.to_upright_rgb", lambda *_: pytest.fail("a detour over Pillow's image"))
    assert np.array_equal(load_pixels(path), expected)


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()

SPECIAL = {
    "turned": lambda path: photograph(64, 50).save(path, exif=orientation(6)),
    "colour profile": lambda path: photograph(64, 50).save(path, icc_profile=PROFILE),
    "CMYK": lambda path: photograph(64, 50).convert("CMYK").save(path),
    "PNG": lambda path: photograph(64, 50).save(path, format="PNG"),
    "PNG that calls itself JPEG": lambda path: photograph(64, 50).save(path, "PNG"),
}


@pytest.mark.parametrize("save", SPECIAL.values(), ids=SPECIAL)
def test_anything_special_goes_the_careful_way(tmp_path, save):
    path = tmp_path / "picture.jpg"
    save(path)
    assert not PictureFile(path.read_bytes()).is_plain
    image_processor = HoVLEImageProcessor(tile_size=56, max_tiles=1)
    expected = torch.from_numpy(np.array(load_picture(path)))
    assert torch.equal(read_tiles(path, image_processor), cut_tiles(expected, image_processor))


def test_a_truncated_jpeg_is_refused_wherever_it_ends(tmp_path):
    data = saved(tmp_path / "whole.jpg", photograph(120, 80), quality=85).read_bytes()
    image_processor = HoVLEImageProcessor(tile_size=56, max_tiles=1)
    cut = tmp_path / "cut.jpg"
    for length in [*range(0, len(data) - 2, 101), *range(len(data) - 40, len(data) - 1)]:
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.jpg: "):
            read_tiles(cut, image_processor)


def test_what_fast_decoding_takes_the_careful_way_takes_too(tmp_path):
    """Damage anywhere in the file: both ways refuse it or read the same pixels."""
    data = saved(tmp_path / "whole.jpg", photograph(60, 40)).read_bytes()
    generator = np.random.default_rng(0)
    num_decoded = 0
    for _ in range(300):
        damaged = bytearray(data)
        damaged[generator.integers(2, len(data))] = generator.integers(256)
        (tmp_path / "damaged.jpg").write_bytes(damaged)
        try:
            expected = np.asarray(load_picture(tmp_path / "damaged.jpg"))
        except ValueError:
            with pytest.raises(ValueError, match=r"damaged\.jpg: "):
                load_pixels(tmp_path / "damaged.jpg")
        else:
            num_decoded += 1
            assert np.array_equal(load_pixels(tmp_path / "damaged.jpg"), expected)
    assert num_decoded > 30


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = saved(tmp_path / "large.jpg", photograph(64, 50))
    monkeypatch.setattr("hovle.model.pictures.MAX_PIXELS", 64 * 50 - 1)
    with pytest.raises(ValueError, match=r"large\.jpg: 64 x 50 is 0 megapixels; the limit is 0"):
        read_tiles(path, HoVLEImageProcessor())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.jpg: no such file"):
        read_tiles(tmp_path / "gone.jpg", HoVLEImageProcessor())


def test_without_simplejpeg_the_tiles_are_the_same(tmp_path, monkeypatch):
    path = saved(tmp_path / "picture.jpg", photograph(211, 97))
    image_processor = HoVLEImageProcessor(tile_size=56, max_tiles=4)
    fast = read_tiles(path, image_processor)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert torch.equal(read_tiles(path, image_processor), fast)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (90, 40), (40, 33), (56, 56), (700, 128), (64, 64)])
@pytest.mark.parametrize("max_tiles", [1, 6])
def test_tiles_are_those_of_the_image_processor(size, max_tiles):
    image_processor = HoVLEImageProcessor(tile_size=56, max_tiles=max_tiles)
    picture = photograph(*size)
    expected = image_processor([picture], return_tensors="pt", do_normalize=False)["pixel_values"].mul(255).round()
    found = cut_tiles(torch.from_numpy(np.array(picture)), image_processor)
    assert found.dtype == torch.uint8
    assert found.shape == expected.shape
    difference = (found.int() - expected.int()).abs().float()
    assert difference.max() <= 1
    assert difference.mean() < 0.01  # worst 0.0039


def test_another_filter_is_refused():
    with pytest.raises(ValueError, match="resizes with Pillow's filter 2; training resizes with the bicubic one"):
        cut_tiles(torch.zeros(8, 8, 3, dtype=torch.uint8), HoVLEImageProcessor(resample=2))


def test_normalised_tiles_are_the_numbers_of_the_image_processor():
    image_processor = HoVLEImageProcessor(tile_size=64, max_tiles=1, image_mean=[0.5, 0.4, 0.3], image_std=[0.2] * 3)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    expected = image_processor([picture], return_tensors="pt")["pixel_values"]
    tiles = cut_tiles(torch.from_numpy(np.array(picture)), image_processor)
    assert torch.equal(PixelNormalization.of(image_processor)(tiles), expected)


def test_normalised_pixels_are_not_normalised_again():
    with pytest.raises(ValueError, match=r"must be bytes \(uint8\), got torch\.float32: are they normalised already"):
        PixelNormalization()(torch.zeros(1, 3, 8, 8))


def test_a_picture_is_known_by_its_content(tmp_path):
    first, copy = saved(tmp_path / "a.png", photograph(8, 8)), saved(tmp_path / "b.png", photograph(8, 8))
    other = saved(tmp_path / "c.png", photograph(8, 8, seed=1))
    assert picture_key(first) == picture_key(copy) != picture_key(other)
    assert len(picture_key(first)) == 32
