"""Every kind of picture source, every colour mode, and every way a picture can be bad."""

import base64
import concurrent.futures
import contextlib
import gzip
import http.server
import io
import ipaddress
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import pillow_heif
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, ImageOps

from hovle import HoVLEImageProcessor
from hovle.model import pictures, pictures_damage, pictures_heic
from hovle.model import pictures_hdr as hdr
from hovle.model import pictures_png as png_chunks
from hovle.model.pictures import is_public, load_picture, load_pixels, picture_bytes, picture_size

SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>'
WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)


def sample(width: int = 40, height: int = 30) -> Image.Image:
    """A smooth picture with three different channels."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 255 // (width + height - 2)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encoded(image: Image.Image, name: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **kwargs)
    return buffer.getvalue()


def pixels(source, **kwargs) -> np.ndarray:
    image = load_picture(source, **kwargs)
    assert image.mode == "RGB"
    return np.asarray(image)


# --- sources ---------------------------------------------------------------------------------------------------------


def test_every_source_gives_the_same_picture(tmp_path: Path):
    image, data = sample(), encoded(sample())
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    array = np.asarray(image)
    sources = [
        image,
        path,
        str(path),
        data,
        bytearray(data),
        io.BytesIO(data),
        text,
        "\n".join(text[start : start + 60] for start in range(0, len(text), 60)),
        text.rstrip("="),
        text.replace("+", "-").replace("/", "_"),
        "data:image/png;base64," + text,
        array,
        array.astype(np.float32) / 255,
        array.astype(np.float64) / 255,
        array.astype(np.int64),
        array.transpose(2, 0, 1),
        torch.from_numpy(array.transpose(2, 0, 1).copy()),
        torch.from_numpy(array.transpose(2, 0, 1) / 255).to(torch.float32),
        torch.from_numpy(array.copy()),
    ]
    for source in sources:
        assert np.array_equal(pixels(source), array), type(source)
    assert np.array_equal(pixels(text, kind="base64"), array)
    assert np.array_equal(pixels(str(path), kind="path"), array)


def test_the_byte_order_of_an_array_does_not_matter():
    values = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    for array in (values, values // 300, values / np.float32(65535)):
        expected = pixels(array)
        for order in "<>":
            assert np.array_equal(pixels(array.astype(array.dtype.newbyteorder(order))), expected)


def test_a_torch_picture_three_pixels_wide_has_its_channels_first():
    array = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(pixels(array), array)
    assert np.array_equal(pixels(torch.from_numpy(array)), array.transpose(1, 2, 0))


def test_bfloat16_and_gradients_do_not_matter():
    picture = torch.full((3, 4, 5), 0.5, dtype=torch.bfloat16, requires_grad=True)
    assert (pixels(picture) == 128).all()


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((4, 4, 3), 200.0), "0..1"),
        (np.full((4, 4, 3), -1.5), "0..1"),
        (np.full((4, 4, 3), np.nan), "0..1"),
        (np.full((4, 4, 3), 300), "0..255"),
        (np.full((4, 4, 3), -1), "0..255"),
        (np.eye(4, dtype=np.int64), "would be black"),
        (np.zeros((5, 6, 2), dtype=np.uint8), "(H, W)"),
        (np.zeros((2, 4, 4, 3), dtype=np.uint8), "(H, W)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "no pixels"),
        (np.zeros((4, 4), dtype=np.complex64), "complex64"),
        (np.array([["a", "b"]]), "not pictures"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(array, words):
    with pytest.raises(ValueError, match=r"^picture 7: ") as caught:
        load_picture(array, "picture 7")
    assert words in str(caught.value)


@pytest.mark.parametrize("source", [None, 3, 2.5, [1], {"type": "image"}, object()])
def test_other_objects_are_refused(source):
    with pytest.raises(ValueError, match=r"must be (a Pillow image, path|{.bytes.: bytes)"):
        load_picture(source)


# --- colour modes ----------------------------------------------------------------------------------------------------


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (pixels(clear) == 255).all()
    assert (pixels(encoded(clear)) == 255).all()
    assert (pixels(Image.new("LA", (4, 4), (0, 0))) == 255).all()
    assert (pixels(np.zeros((4, 4, 4), dtype=np.uint8)) == 255).all()
    half = pixels(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))
    assert ((half > 120) & (half < 135)).all()


def test_the_fourth_byte_of_a_tga_or_bmp_that_holds_no_alpha_is_not_taken_for_it():
    clear = sample().convert("RGBA")
    clear.putalpha(0)
    tga = bytearray(encoded(clear, "TGA"))
    bitmap = encoded(clear, "BMP")
    assert np.array_equal(pixels(bytes(tga)), sample())
    assert np.array_equal(pixels(bmp_with_alpha_mask(bitmap)), sample())
    clear.putalpha(Image.new("L", clear.size, 128))
    tga = bytearray(encoded(clear, "TGA"))
    assert pixels(bytes(tga)).min() > 120  # on white
    tga[17] &= 0xF0
    assert np.array_equal(pixels(bytes(tga)), sample())


def bmp_with_alpha_mask(data: bytes) -> bytes:
    """A BMP of 32 bits whose header, of version 4, names which bits are alpha."""
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    header = (108).to_bytes(4, "little") + data[18:30] + (3).to_bytes(4, "little") + data[34:54] + masks
    start = 14 + len(header)
    rows = data[int.from_bytes(data[10:14], "little") :]
    return (
        data[:2] + (start + len(rows)).to_bytes(4, "little") + bytes(4) + start.to_bytes(4, "little") + header + rows
    )


def test_what_the_first_frame_of_a_gif_leaves_free_is_white():
    image = Image.new("P", (50, 40), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(0, (0, 0, 10, 10))
    for options, corner in (({}, BLACK), ({"transparency": 0}, WHITE)):
        data = bytearray(encoded(image, "GIF", **options))
        data[6:10] = struct.pack("<HH", 100, 90)
        frame = data.index(b"\x2c" + bytes(4))
        data[frame + 1 : frame + 5] = struct.pack("<HH", 30, 20)
        expected = Image.new("RGB", (100, 90), "white")
        expected.paste((255, 0, 0), (30, 20, 80, 60))
        expected.paste(corner, (30, 20, 40, 30))
        assert np.array_equal(pixels(bytes(data)), expected)


def test_palette_pictures_keep_their_colours_and_lose_their_transparency():
    image = sample().convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(pixels(encoded(image)), np.asarray(image.convert("RGB")))
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 255, 0, 0])
    assert (pixels(encoded(image, transparency=0)) == 255).all()
    assert (pixels(encoded(image, transparency=1)) == (10, 20, 30)).all()
    grey = Image.new("L", (4, 4), 7)
    assert (pixels(encoded(grey, transparency=7)) == 255).all()


def test_sixteen_bit_pictures_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.rint(ramp / 257).astype(np.uint8)
    for source in (
        Image.fromarray(ramp),
        encoded(Image.fromarray(ramp)),
        encoded(Image.fromarray(ramp), "TIFF"),
        ramp,
    ):
        assert np.array_equal(pixels(source)[..., 0], expected)
    dark = np.full((4, 4), 200, dtype=np.uint16)  # nearly black in 16 bits, and must stay so
    assert (pixels(encoded(Image.fromarray(dark))) == 1).all()


def png(depth: int, colour_type: int, row: bytes, width: int, key: bytes) -> bytes:
    """A PNG of one row whose chunk `tRNS` makes a colour transparent."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    header = width.to_bytes(4) + (1).to_bytes(4) + bytes([depth, colour_type, 0, 0, 0])
    chunks = {b"IHDR": header, b"tRNS": key, b"IDAT": zlib.compress(b"\0" + row), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in chunks.items())


@pytest.mark.parametrize(
    ("depth", "row"), [(1, b"\x40"), (2, b"\x1b"), (4, b"\x1b"), (8, b"\x10\x80"), (16, b"\x10\0\x80\0")]
)
def test_a_transparent_grey_value_becomes_white_at_every_depth(depth: int, row: bytes):
    values = np.unpackbits(np.frombuffer(row, dtype=np.uint8)).reshape(-1, depth)[:2]
    first, second = (int("".join(map(str, bits)), 2) for bits in values)
    grey = round(first * 255 / (2**depth - 1))
    found = pixels(png(depth, 0, row, 2, second.to_bytes(2)))
    assert found.tolist() == [[[grey] * 3, list(WHITE)]]


def test_a_transparent_colour_of_sixteen_bits_becomes_white():
    colours = np.array([[0x1234, 0x5678, 0x9ABC], [0x3412, 0x7856, 0xBC9A]], dtype=">u2")
    found = pixels(png(16, 2, colours.tobytes(), 2, colours[1].tobytes()))
    assert found.tolist() == [[[0x12, 0x56, 0x9A], list(WHITE)]]


def test_integer_and_float_modes_find_their_range():
    grey = sample().convert("L")
    expected = np.asarray(grey.convert("RGB"))
    assert np.array_equal(pixels(grey.convert("I")), expected)
    assert np.array_equal(pixels(grey.convert("F")), expected)
    values = np.asarray(grey, dtype=np.float32)
    assert np.array_equal(pixels(Image.fromarray(values / 255)), expected)
    assert np.array_equal(pixels(Image.fromarray(values * 257)), expected)
    assert np.array_equal(pixels(Image.fromarray(values.astype(np.int32) * 257)), expected)
    for bad in (values - 500, values * 1e6, values * np.nan):
        with pytest.raises(ValueError, match=r"0\.\.65535"):
            load_picture(Image.fromarray(bad))


def test_float_pictures_a_hair_outside_their_range_do_not_become_black():
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    expected = pixels(ramp).astype(int)
    for full_scale in (1, 255, 65535):
        for values in (ramp * 1.0005, ramp - 5e-4):
            overshot = Image.fromarray((values * full_scale).astype(np.float32))
            for source in (overshot, encoded(overshot, "TIFF"), encoded(overshot, "PPM")):
                assert np.abs(pixels(source) - expected).max() <= 1


@pytest.mark.parametrize("brightest", [1.02, 1.5, 12.0, 300.0, 4000.0])
def test_float_pictures_of_no_certain_range_are_refused(brightest: float):
    values = np.linspace(0, brightest, 64, dtype=np.float32).reshape(8, 8)
    for source in (Image.fromarray(values), encoded(Image.fromarray(values), "TIFF")):
        with pytest.raises(ValueError, match=r"^picture 2: float values must lie in 0\.\.1, .* found 0\.\."):
            load_picture(source, "picture 2")


def test_a_dark_picture_in_a_ppm_file_of_sixteen_bits_stays_dark():
    assert (pixels(b"P5\n4 4\n65535\n" + np.full(16, 200, dtype=">u2").tobytes()) == 1).all()


def test_other_modes_become_rgb():
    assert (pixels(Image.new("1", (4, 4), 1)) == 255).all()
    assert (pixels(np.ones((4, 4), dtype=bool)) == 255).all()
    assert (pixels(Image.new("CMYK", (4, 4), (0, 255, 255, 0))) == RED).all()
    red = pixels(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)).astype(int)
    assert abs(red - RED).max() < 8
    assert np.abs(pixels(sample().convert("YCbCr")).astype(int) - np.asarray(sample())).max() < 4
    assert np.abs(pixels(sample().convert("HSV")).astype(int) - np.asarray(sample())).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_stands_upright(orientation: int):
    image = sample()
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = image.transpose(turns[orientation]) if orientation > 1 else image
    loaded = load_picture(encoded(image, exif=exif))
    assert np.array_equal(np.asarray(loaded), np.asarray(upright))
    assert load_picture(loaded).size == upright.size  # turned once, not twice


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_in_the_header_is_that_of_the_upright_picture(name, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if name in ("GIF", "BMP") else {"exif": exif}  # these know no orientation
    data = encoded(sample(), name, **options)
    (tmp_path / "picture").write_bytes(data)
    loaded = load_picture(data)
    for source in (data, tmp_path / "picture", str(tmp_path / "picture")):
        assert picture_size(source) == (loaded.height, loaded.width)


def test_the_size_is_read_without_the_pixels_and_what_is_no_picture_is_refused(tmp_path):
    data = encoded(sample())
    assert picture_size(data[: len(data) // 2]) == (30, 40)
    truncated = tmp_path / "cut.tif"
    truncated.write_bytes(encoded(sample(), "TIFF")[:-900])
    for bad, message in (
        (truncated, "^[^:]*cut.tif: cannot be decoded"),
        (b"", "is empty"),
        (b"words", "not a picture file"),
        (tmp_path / "gone.png", "gone.png: no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            picture_size(bad)


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    for name in ("GIF", "PNG", "WEBP", "TIFF"):
        kwargs = {"lossless": True} if name == "WEBP" else {}
        data = encoded(frames[0], name, save_all=True, append_images=frames[1:], **kwargs)
        assert (pixels(data) == RED).all(), name


# --- bad files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"not a picture", b"\x00" * 4096, b"%PDF-1.7 ...", b"<svg></svg>", b"\x89PNG"]
)
def test_files_that_are_no_pictures_are_named(tmp_path: Path, content: bytes):
    path = tmp_path / "notes.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.png"):
        load_picture(path)
    with pytest.raises(ValueError, match=r"^picture 2 of the request \(.*notes\.png\): "):
        load_picture(str(path), "picture 2 of the request")


def test_missing_files_directories_and_pipes_are_named(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("gone.png", "no such file"), ("", "directory"), ("pipe", "not a regular file")):
        for source in (tmp_path / name, str(tmp_path / name)):
            with pytest.raises(ValueError, match=words) as caught:
                load_picture(source)
            assert str(tmp_path / name) in str(caught.value)
    for source in ("", "cats", "a\x00b.png", "x" * 10_000):
        with pytest.raises(ValueError, match="no such file"):
            load_picture(source)
    with pytest.raises(ValueError, match="no such file"):
        load_picture(base64.b64encode(encoded(sample())).decode(), kind="path")


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_truncated_files_never_become_pictures(name: str):
    data = encoded(sample(64, 64), name)
    assert load_picture(data).size == (64, 64)
    for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9):
        with pytest.raises(ValueError, match="picture 3"):
            load_picture(data[: int(len(data) * share)], "picture 3")


@pytest.mark.parametrize("name", ["PNG", "GIF", "BMP", "TIFF", "PPM"])
def test_truncated_files_are_refused_where_another_package_has_told_pillow_to_load_them(name: str, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(sample(64, 64), name)
    for source in (data[: len(data) // 2], Image.open(io.BytesIO(data[: len(data) // 2]))):
        with pytest.raises(ValueError, match="picture 3"):
            load_picture(source, "picture 3")
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_threads_that_decode_at_once_leave_pillows_switch_as_they_found_it(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(sample(64, 64))

    def load(number: int) -> None:
        source = data if number % 2 else data[: len(data) // 2]
        with contextlib.nullcontext() if number % 2 else pytest.raises(ValueError, match="the picture"):
            load_picture(source)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(load, range(200)))
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_process_forked_while_another_thread_decodes_is_not_stuck():
    code = """
import os, signal
from PIL import Image
from hovle.model import pictures, pictures_damage, pictures_heic
pictures_damage._Strictness.lock.acquire()
if not os.fork():
    signal.alarm(20)
    pictures.load_picture(Image.new("L", (4, 4)))
    os._exit(0)
assert os.wait()[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_two_thousand_damaged_files_give_a_picture_or_a_value_error():
    rng = np.random.default_rng(0)
    slowest, per_format = 0.0, 2000 // len(pictures.FORMATS[:-1]) + 1
    for name in pictures.FORMATS[:-1]:  # HEIF belongs to a package of its own, which hides damage
        frames = {"save_all": True, "append_images": [sample(32, 32)]} if name == "MPO" else {}
        data = encoded(sample(32, 32), name, **frames)
        assert load_picture(data).size == (32, 32)
        for number in range(per_format):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), size=1 + number % 8):
                damaged[place] = rng.integers(256)
            if number % 5 == 0:  # a piece of the file repeated or lost
                first, last = sorted(rng.integers(0, len(data), size=2))
                damaged[first:last] = damaged[first:last] * 2 if number % 2 else b""
            started = time.monotonic()
            try:
                image = load_picture(bytes(damaged))
                assert image.mode == "RGB"
                assert np.asarray(image).any(), f"{name} {number} became black"
            except ValueError as error:
                assert str(error).startswith("the picture: ")  # noqa: PT017 - both outcomes are right
            slowest = max(slowest, time.monotonic() - started)
    assert slowest < 5


def photograph(mode: str = "RGB") -> Image.Image:
    """Noise on a smooth picture, so that a JPEG of it is dense."""
    noise = np.random.default_rng(0).integers(-20, 20, (240, 320, 3))
    return Image.fromarray((np.asarray(sample(320, 240)) + noise).clip(0, 255).astype(np.uint8)).convert(mode)


KINDS_OF_JPEG = {
    "plain": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 4},
    "turned": {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", KINDS_OF_JPEG.values(), ids=KINDS_OF_JPEG)
def test_jpegs_have_pillows_pixels_with_and_without_simplejpeg(mode, options, monkeypatch):
    data = encoded(photograph(mode), "JPEG", **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(pixels(data), expected)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert np.array_equal(pixels(data), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", ["plain", "restarts", "turned"])
def test_most_jpegs_whose_middle_is_overwritten_are_refused_where_simplejpeg_is_installed(mode, kind, monkeypatch):
    data = encoded(photograph(mode), "JPEG", **KINDS_OF_JPEG[kind])
    sound = pixels(data).astype(int)
    rng = np.random.default_rng(0)
    num_loaded, num_loaded_by_pillow = 0, 0
    for start in rng.integers(len(data) // 4, len(data) // 2, size=40):
        # Without the byte that begins markers, which Pillow itself trips over.
        damaged = data[:start] + rng.integers(0, 255, 400, dtype=np.uint8).tobytes() + data[start + 400 :]
        with contextlib.suppress(ValueError):
            num_loaded += np.abs(pixels(damaged) - sound).max() > 60
        with monkeypatch.context() as patch, contextlib.suppress(ValueError):
            patch.setitem(sys.modules, "simplejpeg", None)
            num_loaded_by_pillow += np.abs(pixels(damaged) - sound).max() > 60
    assert num_loaded_by_pillow > 20
    assert num_loaded <= 12  # of 40. Measured: 0 to 10, whose last code ends within 8 bytes of the last marker


def test_the_error_of_a_damaged_jpeg_says_what_was_found():
    data = encoded(photograph(), "JPEG")
    middle = len(data) // 2
    with pytest.raises(ValueError, match=r"^picture 2: is damaged \(Corrupt JPEG data: "):
        load_picture(data[:middle] + bytes(400) + data[middle + 400 :], "picture 2")


def test_a_jpeg_whose_scans_repeat_is_refused_before_they_are_decoded(monkeypatch):
    plain = encoded(Image.new("L", (3000, 3000), 128), "JPEG", progressive=True)
    last = plain[plain.rindex(b"\xff\xc4", 0, plain.rindex(b"\xff\xda")) : -2]
    thumbnail = b"\xff\xe1" + (2 + 4 * 150).to_bytes(2) + b"\xff\xda\0\2" * 150
    assert load_picture(plain[:2] + thumbnail + plain[2:]).size == (3000, 3000)  # markers in metadata are no scans
    for most, copies in ((pictures.MAX_PIXELS, 2000), (3000 * 3000, 95)):
        data = plain[:-2] + last * copies + plain[-2:]
        monkeypatch.setattr(pictures_damage, "MAX_SCANNED_PIXELS", most * 11)
        started = time.monotonic()
        with pytest.raises(ValueError, match=r"^picture 2: has \d+ scans; JPEGs of 3000 x 3000 may have"):
            load_picture(data, "picture 2")
        with pytest.raises(ValueError, match="scans"):
            load_pixels(data)
        assert time.monotonic() - started < 1


def test_jpegs_with_harmless_oddities_load():
    data = encoded(photograph(), "JPEG")
    sound = pixels(data)
    end = data[-2:]
    jfif = data.index(b"JFIF\0")
    odd = {
        "garbage behind the end": data + b"garbage" * 1000,
        "a second picture behind the first": data + data,
        "a few bytes before the end": data[:-2] + b"\x12\x34\x56\x78\x9a\xbc" + end,
        "zeros before the end": data[:-2] + bytes(5000) + end,
        "an unknown version of JFIF": data[: jfif + 5] + b"\x07" + data[jfif + 6 :],
        "fill bytes before a marker": data[:2] + b"\xff" * 9 + data[2:],
    }
    for name, changed in odd.items():
        assert np.array_equal(pixels(changed), sound), name


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["plain", "progressive"])
@pytest.mark.parametrize("before", [b"\xff\xdb", b"\xff\xc4", b"\xff\xda"], ids=["tables", "codes", "pixels"])
@pytest.mark.parametrize(
    "stray", [b" " * 9, b"\xff\x00" * 1000, bytes(40) + b"\xff" * 3], ids=["few", "many", "filled"]
)
def test_bytes_between_the_header_segments_of_a_jpeg_do_no_harm_and_hide_no_damage(before, stray, options):
    data = encoded(photograph(), "JPEG", **options)
    sound, place = pixels(data), data.index(before)
    odd = data[:place] + stray + data[place:]
    assert np.array_equal(pixels(odd), sound)
    middle = len(odd) - len(data) // 3
    with pytest.raises(ValueError, match="is damaged"):
        load_picture(odd[:middle] + bytes(400) + odd[middle + 400 :])


def test_a_jpeg_2000_that_becomes_black_is_refused_and_a_black_one_is_not():
    data = bytearray(encoded(sample(32, 32), "JPEG2000"))
    for options in ({}, {"tile_size": (64, 64)}):
        assert not pixels(encoded(Image.new("RGB", (640, 480)), "JPEG2000", **options)).any()
    data[data.index(b"\xff\x5c") + 5] = 0xA7  # the exponent of the lowest frequencies
    with pytest.raises(ValueError, match="would be black"):
        load_picture(bytes(data))


def tiff(strips: list[bytes], height: int, bits: int = 8, photometric: int = 1, width: int = 8) -> bytes:
    """An uncompressed grey TIFF of strips with 4 rows each, little-endian."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 4, 279: 0}
    tables = 8 + 2 + 12 * len(tags) + 4
    data = tables + 8 * len(strips)
    offsets = [data + sum(map(len, strips[:number])) for number in range(len(strips))]
    for tag, values, place in ((273, offsets, tables), (279, list(map(len, strips)), tables + 4 * len(strips))):
        tags[tag] = values[0] if len(strips) == 1 else place
    entries = b"".join(
        struct.pack("<HHII", tag, 4, len(strips) if tag in (273, 279) else 1, value) for tag, value in tags.items()
    )
    lengths = struct.pack(f"<{2 * len(strips)}I", *offsets, *map(len, strips))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + lengths + b"".join(strips)


def test_a_tiff_that_lists_fewer_strips_than_it_has_rows_is_refused():
    strip = bytes([200]) * 32
    assert (pixels(tiff([strip] * 4, height=16)) == 200).all()
    with pytest.raises(ValueError, match=r"^picture 2: is damaged \(2 strips are listed where 8 x 16 take 4\)"):
        load_picture(tiff([strip] * 2, height=16), "picture 2")
    with pytest.raises(ValueError, match=r"1 strips are listed where 8 x 2228272 take 557068"):
        load_picture(tiff([strip], height=2_228_272))


def test_a_tiff_of_twelve_bits_has_white_at_4095():
    assert (pixels(tiff([b"\xff" * 48], height=4, bits=12)) == 255).all()
    assert (pixels(tiff([b"\x80\x08\x00" * 16], height=4, bits=12)) == 128).all()  # 2048


def test_a_tiff_of_sixteen_bits_in_which_zero_is_white_is_no_negative():
    ramp = np.linspace(0, 65535, 32).astype("<u2")
    expected = pixels(tiff([ramp.tobytes()], height=4, bits=16))
    assert np.array_equal(pixels(tiff([(65535 - ramp).tobytes()], height=4, bits=16, photometric=0)), expected)


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_a_fax_that_becomes_blank_is_refused_and_a_blank_one_is_not(compression):
    for colour in (0, 1):
        blank = Image.new("1", (1700, 2200), colour)
        assert (pixels(encoded(blank, "TIFF", compression=compression)) == colour * 255).all()
    data = encoded(photograph().convert("1"), "TIFF", compression=compression)
    assert pixels(data).any()
    start, length = (Image.open(io.BytesIO(data)).tag_v2[tag][0] for tag in (273, 279))
    filling = b"\xff" if compression == "group4" else b"\x00"
    with pytest.raises(ValueError, match="would be of one colour"):
        load_picture(data[:start] + filling * length + data[start + length :])


def test_the_preview_in_a_camera_raw_file_is_not_taken_for_its_picture():
    data = encoded(sample(), "TIFF", tiffinfo={254: 1})
    with pytest.raises(ValueError, match="shows a preview only"):
        load_picture(data)


def with_chunk(data: bytes, name: bytes, body: bytes, before: bytes = b"IDAT", checksum: bytes | None = None) -> bytes:
    """A PNG with one more chunk."""
    place = data.index(before) - 4
    checksum = checksum or zlib.crc32(name + body).to_bytes(4)
    return data[:place] + len(body).to_bytes(4) + name + body + checksum + data[place:]


def test_a_png_whose_checksums_are_wrong_is_refused():
    data = encoded(photograph())
    unfinished = data[: len(data) * 6 // 10].ljust(len(data) - 12, b"\0") + data[-12:]
    middle = data.index(b"IDAT") + 500
    changed = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    clear = with_chunk(data, b"tRNS", bytes(6), checksum=b"none")
    for damaged, name in ((unfinished, "IDAT"), (changed, "IDAT"), (clear, "tRNS")):
        with pytest.raises(ValueError, match=rf"^picture 2: is damaged \(the checksum of a chunk {name} is wrong"):
            load_picture(damaged, "picture 2")


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_a_png_with_large_or_damaged_metadata_loads(before: bytes):
    sound, text = encoded(sample()), zlib.compress(b"a" * 2**21)
    for name, body, checksum in (
        (b"zTXt", b"diagram\0\0" + text, None),
        (b"iTXt", b"diagram\0\1\0\0\0" + text, None),
        (b"tEXt", b"words\0words", b"none"),
        (b"pHYs", bytes(3), None),
        (b"gAMA", bytes(3), None),
        (b"cHRM", bytes(31), None),
    ):
        data = with_chunk(sound, name, body, before, checksum)
        assert np.array_equal(pixels(data), sample()), name
        assert picture_size(data) == (30, 40)


def test_a_png_with_a_large_colour_profile_becomes_srgb(monkeypatch):
    profile = swapped_profile()
    profile = (len(profile) + 2**21).to_bytes(4) + profile[4:] + bytes(2**21)
    data = with_chunk(encoded(Image.new("RGB", (4, 4), "red")), b"iCCP", b"big\0\0" + zlib.compress(profile))
    assert np.abs(pixels(data)[0, 0].astype(int) - (0, 255, 0)).max() <= 2
    monkeypatch.setattr(png_chunks, "MAX_PROFILE_BYTES", 2**20)
    with pytest.raises(ValueError, match="colour profile of more than 1 MiB"):
        load_picture(data)


@pytest.mark.parametrize("kind", ["exif", "xmp"])
def test_an_orientation_behind_the_pixels_of_a_png_counts_for_its_size(kind: str, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    name, body = {
        "exif": (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")),
        "xmp": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    }[kind]
    data = with_chunk(encoded(sample()), name, body, before=b"IEND")
    (tmp_path / "late.png").write_bytes(data)
    loaded = load_picture(data)
    assert loaded.size == (30, 40)
    assert picture_size(data) == picture_size(tmp_path / "late.png") == (40, 30)


def test_a_jpeg_2000_that_becomes_black_but_for_a_corner_is_refused_and_a_small_bright_spot_is_not():
    data = encoded(photograph(), "JPEG2000")
    spot = photograph()
    spot.paste((0, 0, 0), (0, 0, 320, 200))
    spot.paste((0, 0, 0), (20, 0, 320, 240))
    for mode in ("RGB", "L", "RGBA"):
        assert np.array_equal(pixels(encoded(spot.convert(mode), "JPEG2000")), spot.convert(mode).convert("RGB"))
    for mode in ("RGB", "RGBA"):
        lost = Image.new("RGB", photograph().size)
        lost.paste(photograph().crop((0, 0, 36, 36)))
        lost = lost.convert(mode)
        lost.format = "JPEG2000"
        with pytest.raises(pictures_damage.PictureError, match="would be black"):
            pictures_damage.checked(lost, data)


def test_huge_pictures_are_refused_by_their_header():
    header = bytearray(encoded(Image.new("1", (8, 8))))
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4)
    started = time.monotonic()
    for limit in (Image.MAX_IMAGE_PIXELS, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            with pytest.raises(ValueError, match=r"bomb|megapixels|decoded"):
                load_picture(bytes(header))
    assert time.monotonic() - started < 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "MAX_PIXELS", 1000)
        with pytest.raises(ValueError, match="40 x 30"):
            load_picture(sample())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns up to twice that; our own limit counts
        assert load_picture(encoded(sample())).size == (40, 30)


def test_pictures_without_pixels_are_refused():
    for size in ((0, 5), (5, 0), (0, 0)):
        with pytest.raises(ValueError, match="no pixels"):
            load_picture(Image.new("RGB", size))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "is a PostScript document"),
        (b"%PDF-1.7\n1 0 obj\n", "is a PDF document; render the page"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG drawing; render it"),
        (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 1 +X 1\n", "is a Radiance HDR picture"),
        (b"\x76\x2f\x31\x01" + bytes(40), "is an OpenEXR picture"),
        (SVG[:21] + b"<!--" + b" made by hand" * 200 + b"-->" + SVG[21:], "is an SVG drawing"),
        (
            b'<!DOCTYPE svg [<!ENTITY ns "http://x/">]>\n<s:svg xmlns:s="http://www.w3.org/2000/svg"/>',
            "is an SVG drawing",
        ),
        (SVG.decode().encode("utf-16"), "is an SVG drawing"),
        (SVG.decode().encode("utf-16-be"), "is an SVG drawing"),
        (gzip.compress(SVG, mtime=0), "is an SVG drawing"),
        (SVG.decode().encode("utf-32"), "is an SVG drawing"),
        (SVG.decode().encode("utf-32-be"), "is an SVG drawing"),
        (b"\xff\x0a" + bytes(50), "is a JPEG XL picture; save it as"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "is a JPEG XL picture"),
        (b"8BPS\0\1" + bytes(50), "is a Photoshop document; export it"),
        (b"\xc5\xd0\xd3\xc6\x20\0\0\0" + bytes(50), "is a PostScript document"),
        (b"FUJIFILMCCD-RAW 0201" + bytes(50), "is a camera's raw file; develop it"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(40), "is a camera's raw file"),
        (b"<!DOCTYPE html>\n<html><body>" + SVG + b"</body></html>", "is an HTML page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "is an HEIC picture, as phones take them; save it as"),
        (b"just words", "not a picture file of a known format"),
        (b"<div>" + SVG + b"</div>", "not a picture file of a known format"),
        (b"<!-- never closed <svg>", "not a picture file of a known format"),
        (b"\x1f\x8b\x08 not gzip at all", "not a picture file of a known format"),
        (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(40), "cannot be decoded"),
    ],
)
def test_documents_and_formats_that_are_not_read_are_refused_by_name(data, message, tmp_path):
    (tmp_path / "file").write_bytes(data)
    for read in (load_picture, picture_size):
        for source, name in ((data, "the picture"), (tmp_path / "file", str(tmp_path / "file"))):
            with pytest.raises(ValueError, match=message) as caught:
                read(source)
            assert str(caught.value).count(f"{name}: ") == 1


# --- pictures of phones ----------------------------------------------------------------------------------------------


@pytest.fixture
def opener_of_heic(monkeypatch):
    """Whether HEIC can be read is as Pillow's openers say; those of this test are forgotten after it."""
    Image.init()
    for table in ("OPEN", "MIME", "EXTENSION", "SAVE"):
        monkeypatch.setattr(
            Image, table, {key: value for key, value in getattr(Image, table).items() if "HEI" not in key}
        )
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])


def heic(image: Image.Image, **kwargs) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=100, chroma=444, **kwargs)
    return buffer.getvalue()


@pytest.mark.usefixtures("opener_of_heic")
def test_pictures_of_phones_are_read_where_the_extra_is_installed(tmp_path):
    data = heic(sample())
    (tmp_path / "a.heic").write_bytes(data)
    for source in (data, tmp_path / "a.heic"):
        assert np.abs(pixels(source).astype(int) - np.asarray(sample())).max() <= 8
        assert picture_size(source) == (30, 40)
        assert np.array_equal(load_pixels(source), pixels(source))


@pytest.mark.usefixtures("opener_of_heic")
def test_without_the_extra_a_picture_of_a_phone_is_refused_with_its_name(monkeypatch):
    monkeypatch.setattr(pictures_heic.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"an HEIC picture, as phones take them; .*pip install 'hovle\[heic\]'"):
        load_picture(heic(sample()))


@pytest.mark.usefixtures("opener_of_heic")
def test_an_opener_that_someone_registered_is_used(monkeypatch):
    data = heic(sample())
    pillow_heif.register_heif_opener()
    monkeypatch.setattr(pictures, "register_opener", lambda: pytest.fail("there is one already"))
    assert pixels(data).shape == (30, 40, 3)


@pytest.mark.usefixtures("opener_of_heic")
@pytest.mark.parametrize("left", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_picture_of_a_phone_is_refused(left):
    data = heic(sample(200, 100))
    with pytest.raises(ValueError, match="the picture: "):
        load_picture(data[: int(left * len(data))])


# --- Pillow's images and datasets' items -----------------------------------------------------------------------------


def left_behind(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image


def loaded_and_closed(path: Path) -> Image.Image:
    image = Image.open(path)
    image.load()
    image.close()
    return image


def of_a_closed_file(path: Path) -> Image.Image:
    with open(path, "rb") as file:
        return Image.open(file)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "PPM", "TGA", "GIF"])
@pytest.mark.parametrize("close", [left_behind, loaded_and_closed, of_a_closed_file])
def test_a_picture_whose_file_was_closed_is_named(tmp_path, kind, close):
    path = tmp_path / f"a.{kind.lower()}"
    sample().save(path, kind)
    image = close(path)
    with pytest.raises(ValueError, match=r"^picture 2 of the request.*: its file was closed before its pixels"):
        load_picture(image, "picture 2 of the request")


def test_a_file_opened_as_text_is_refused_with_the_mode_to_take(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    with open(tmp_path / "a.txt") as file, pytest.raises(ValueError, match='open it with mode "rb"'):
        load_picture(file)


def test_items_of_datasets_are_read_by_bytes_or_path(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(sample()))
    for item in (
        {"bytes": encoded(sample()), "path": None},
        {"bytes": encoded(sample()), "path": "elsewhere/a.png"},
        {"bytes": encoded(sample())},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        {"path": tmp_path / "a.png"},
    ):
        assert np.array_equal(pixels(item), np.asarray(sample()))


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"bytes": None, "path": None}, "with bytes or a path"),
        ({"bytes": "text", "path": "x.png"}, "x.png: a dictionary must be"),
        ({}, "got the keys none"),
        ({"pixels": b"x"}, "got the keys 'pixels'"),
        ({"bytes": b"", "path": "x.png"}, "x.png: is empty"),
        ({"path": "https://example.org/a.png"}, "no such file"),
    ],
)
def test_other_dictionaries_are_refused(item, reason):
    with pytest.raises(ValueError, match=reason):
        load_picture(item)


# --- colour profiles and extreme sizes -------------------------------------------------------------------------------


def swapped_profile() -> bytes:
    """An ICC profile that is sRGB with red and green exchanged, under another name."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exchanged = profile.replace(b"rXYZ", b"----").replace(b"gXYZ", b"rXYZ").replace(b"----", b"gXYZ")
    return exchanged.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


def test_embedded_colour_profiles_become_srgb():
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert tuple(pixels(encoded(image, icc_profile=plain))[0, 0]) == (255, 0, 0)
    assert np.abs(pixels(encoded(image, icc_profile=swapped_profile()))[0, 0].astype(int) - (0, 255, 0)).max() <= 2
    palette = image.quantize(4)
    assert np.abs(pixels(encoded(palette, icc_profile=swapped_profile()))[0, 0].astype(int) - (0, 255, 0)).max() <= 2
    keyed = encoded(image, icc_profile=swapped_profile(), transparency=(255, 0, 0))
    assert tuple(pixels(keyed)[0, 0]) == WHITE
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert tuple(pixels(encoded(clear, icc_profile=swapped_profile()))[0, 0]) == WHITE


def profile_with_gamma(name: str, gamma: float) -> bytes:
    """An ICC profile with the colours of sRGB, another curve of tones, and a name."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    number = int.from_bytes(profile[128:132])
    entries = [struct.unpack_from(">4sII", profile, 132 + 12 * place) for place in range(number)]
    contents = {tag: profile[start : start + length] for tag, start, length in entries}
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    contents |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    text = name.encode("utf-16-be")
    contents[b"desc"] = b"mluc" + bytes(4) + struct.pack(">II4sII", 1, 12, b"enUS", len(text), 28) + text
    table, body = b"", b""
    for tag, content in contents.items():
        start = 132 + 12 * number + len(body)
        table += struct.pack(">4sII", tag, start, len(content))
        body += content + bytes(-len(content) % 4)
    data = profile[4:132] + table + body
    return (len(data) + 4).to_bytes(4) + data


@pytest.mark.parametrize(
    ("name", "gamma"), [("sRGB-elle-V2-g10.icc", 1.0), ("scRGB linear sRGB", 1.0), ("Rec709", 1.0)]
)
def test_a_linear_profile_counts_whatever_its_name(name, gamma):
    grey = Image.new("RGB", (4, 4), (55,) * 3)
    for file_format in ("PNG", "JPEG"):
        found = pixels(encoded(grey, file_format, icc_profile=profile_with_gamma(name, gamma)))
        assert np.abs(found.astype(int) - 128).max() <= 1


def test_a_damaged_or_unfit_profile_leaves_the_pixels_alone():
    image = sample()
    for profile in (b"no profile", swapped_profile()[:200]):
        assert np.array_equal(pixels(encoded(image, icc_profile=profile)), np.asarray(image))
    grey = image.convert("L")
    found = pixels(encoded(grey, icc_profile=swapped_profile()))  # a profile for colours on a grey picture
    assert np.array_equal(found, np.asarray(grey.convert("RGB")))


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"]),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    orientation=st.integers(1, 8),
)
def test_any_mode_size_and_orientation_gives_upright_rgb(mode, width, height, orientation):
    image = Image.new(mode, (width, height))
    image.getexif()[0x0112] = orientation
    found = load_picture(image)
    assert found.mode == "RGB"
    assert found.size == ((height, width) if orientation > 4 else (width, height))


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 600), height=st.integers(1, 600))
def test_any_shape_is_tiled(width, height):
    processor = HoVLEImageProcessor(tile_size=28)
    batch = processor([load_picture(Image.new("RGB", (width, height), "white"))], return_tensors="pt")
    num_tiles = int(batch["num_patches"][0])
    assert batch["pixel_values"].shape == (num_tiles, 3, 28, 28)
    assert 1 <= num_tiles <= 13


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (10, 2000), (4000, 20)])
def test_extreme_shapes_are_tiled_without_losing_their_colour(size):
    processor = HoVLEImageProcessor(tile_size=28, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    values = processor([load_picture(Image.new("RGB", size, (255, 0, 0)))], return_tensors="pt")["pixel_values"]
    assert torch.equal(values[:, 0], torch.ones_like(values[:, 0]))
    assert not values[:, 1:].any()


PEAKS = """
import os, sys
from hovle import HoVLEImageProcessor
from hovle.machine.memory import peak_resident_bytes

processor = HoVLEImageProcessor()
for file in sys.argv[1:]:
    if os.fork():  # a child starts counting at what is held now
        assert os.wait()[1] == 0
        continue
    before = peak_resident_bytes()
    assert len(processor([file])["pixel_values"]) > 1
    print(peak_resident_bytes() - before)
    sys.stdout.flush()
    os._exit(0)
"""


def peaks(folder: Path, files: dict[str, bytes]) -> list[int]:
    """Most memory that each picture took on its way to tiles, in bytes; this process's own does not count."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    command = [sys.executable, "-c", PEAKS, *(str(folder / name) for name in files)]
    return list(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))


def test_a_hundred_megapixels_stay_within_a_memory_bound(tmp_path: Path):
    picture = Image.new("RGB", (12_500, 8_000), "red")
    (peak,) = peaks(tmp_path, {"large.png": encoded(picture, compress_level=1)})
    # Pillow stores 4 bytes a pixel, 0.37 GiB; measured: 0.42 GiB.
    assert peak < 0.6 * 2**30


def test_converting_a_large_picture_holds_it_twice_and_no_more(tmp_path: Path):
    size, turned = (4000, 3000), Image.Exif()
    turned[0x0112] = 6
    red = Image.new("RGBA", size, (255, 0, 0, 99))
    files = {
        "turned.jpg": encoded(red.convert("RGB"), "JPEG", exif=turned),
        "clear.png": encoded(red, compress_level=1),
        "everything.png": encoded(red, compress_level=1, icc_profile=swapped_profile(), exif=turned),
        "deep.png": encoded(Image.new("I;16", size, 40_000), compress_level=1),
        "tones.png": png_with_transfer(hdr.PQ, image=red),
    }
    found = {name: peak / (size[0] * size[1]) for name, peak in zip(files, peaks(tmp_path, files), strict=True)}
    # Bytes a pixel: 8, and at this size some for tiles and bands. Measured: 8.8 to 11.4. (Without bands,
    # at 20 megapixels: 14.3 to 20.7.)
    assert max(found.values()) < 13, found


def test_base64_is_limited_and_checked(monkeypatch: pytest.MonkeyPatch):
    for text in ("data:image/png;base64,@@@@", "data:image/png;base64", "data:image/png,hello", "data:,"):
        with pytest.raises(ValueError, match="the picture: "):
            load_picture(text)
    with pytest.raises(ValueError, match="not valid base64"):
        load_picture("A", kind="base64")
    text = base64.b64encode(encoded(sample())).decode()
    monkeypatch.setattr(pictures, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="limit"):
        load_picture("data:image/png;base64," + text)
    with pytest.raises(ValueError, match="limit"):
        load_picture(text, kind="base64")
    with pytest.raises(ValueError, match="no such file") as caught:
        load_picture(text * 1000)
    assert len(str(caught.value)) < 300


# --- URLs ------------------------------------------------------------------------------------------------------------


class PictureServer(http.server.BaseHTTPRequestHandler):
    """A server with good and bad manners, by path."""

    asked: ClassVar[list[str]] = []
    """What it was asked for, as it was sent."""

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = urllib.parse.urlsplit(self.path).path  # a proxy is asked for the whole URL
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has had enough
            getattr(self, "get_" + path.strip("/").translate(str.maketrans(".%", "__")).lower())()

    def reply(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def get_picture_png(self) -> None:
        self.reply(encoded(sample()), Content_Type="image/png")

    def get_page(self) -> None:
        self.reply(b"<html>hello</html>")

    def get_missing(self) -> None:
        self.reply(b"no", status=404)

    def get_redirect(self) -> None:
        self.reply(b"", status=302, Location="/picture.png")

    def get_to_umlaut(self) -> None:
        self.reply(b"", status=302, Location="/bild ä.png".encode().decode("latin-1"))

    def get_bild_20_c3_a4_png(self) -> None:
        self.get_picture_png()

    def get_loop(self) -> None:
        self.reply(b"", status=302, Location=f"/loop?{time.monotonic_ns()}")

    def get_to_file(self) -> None:
        self.reply(b"", status=302, Location="file:///etc/hostname")

    def get_to_ftp(self) -> None:
        self.reply(b"", status=301, Location="ftp://127.0.0.1/x.png")

    def get_announced(self) -> None:
        self.reply(b"", Content_Length=str(10**12))

    def get_endless(self) -> None:
        self.reply(b"")
        for _ in range(10_000):
            self.wfile.write(b"x" * 65536)

    def get_slow(self) -> None:
        self.reply(b"")
        for _ in range(100):
            self.wfile.write(b"x")
            self.wfile.flush()
            if self.server.stopping.wait(0.05):
                return

    def get_silent(self) -> None:
        self.server.stopping.wait(5)

    def get_cut(self) -> None:
        data = encoded(sample())
        self.reply(data[: len(data) // 2], Content_Length=str(len(data)))


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), PictureServer) as server:
        server.daemon_threads = True
        server.stopping = threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.stopping.set()
        server.shutdown()
        thread.join()


@pytest.fixture(params=["httpx", "httpx2"])
def client(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads by the client that this or that version of huggingface_hub brings."""
    pytest.importorskip(request.param)
    for other in {"httpx", "httpx2"} - {request.param}:
        monkeypatch.setitem(sys.modules, other, None)


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch, client: None) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.usefixtures("no_proxy")
def test_a_url_is_read_and_redirects_are_followed(server: str):
    for path in ("picture.png", "redirect"):
        assert np.array_equal(pixels(f"{server}/{path}"), np.asarray(sample()))
    assert np.array_equal(pixels(f"{server}/picture.png?a=1", kind="url"), np.asarray(sample()))


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize("path", ["bild ä.png", "bild%20%C3%A4.png", "bild ä.png?größe=1 2#oben", "to_umlaut"])
def test_a_url_is_read_as_people_write_it(server: str, path: str):
    for kind in (None, "url"):
        assert np.array_equal(pixels(f" {server}/{path}\n", kind=kind), sample())


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("bücher.example:8080/picture.png?q=[1]&r=ü#x", "xn--bcher-kva.example:8080/"),
        ("user:p%40w@example:8080/picture.png?q=[1]&r=ü#x", "example:8080/"),
    ],
)
def test_a_host_beyond_ascii_is_encoded_and_what_follows_stays(server: str, url, sent, monkeypatch):
    monkeypatch.setenv("http_proxy", server)
    monkeypatch.delenv("no_proxy", raising=False)
    assert np.array_equal(pixels(f"http://{url}"), sample())
    assert PictureServer.asked[-1] == f"http://{sent}picture.png?q=[1]&r=%C3%BC"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("::127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::a00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:4136:e378:8000:63bf:80ff:fffe", False),  # Teredo, of 127.0.0.1
    ],
)
def test_addresses_of_this_machine_and_its_networks_are_not_public(address: str, expected: bool):
    assert is_public(ipaddress.ip_address(address)) == expected


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "[::ffff:127.0.0.1]"])
def test_a_strangers_url_reaches_no_address_that_is_not_allowed(server: str, host: str):
    url = server.replace("127.0.0.1", host)
    asked = []

    def may_reach(host, address) -> bool:
        asked.append(address)
        return is_public(address)

    with pytest.raises(ValueError, match="its address is not a public one"):
        picture_bytes(f"{url}/picture.png", "a picture", may_reach)
    assert asked


@pytest.mark.usefixtures("no_proxy")
def test_every_hop_is_asked_about_and_no_name_is_looked_up_twice(server: str, monkeypatch):
    port = server.rpartition(":")[2]
    looked_up, asked = [], []
    real = socket.getaddrinfo

    def resolve(host, *args, **kwargs):
        looked_up.append(host)
        return real("127.0.0.1" if host == "a.test" else host, *args, **kwargs)

    monkeypatch.setattr("socket.getaddrinfo", resolve)

    def may_reach(host, address) -> bool:
        asked.append((host, str(address)))
        return len(asked) != 3

    data = picture_bytes(f"http://a.test:{port}/redirect", "a picture", may_reach)
    assert np.array_equal(pixels(data), np.asarray(sample()))
    assert asked == [("a.test", "127.0.0.1")] * 2
    assert looked_up.count("a.test") == 2  # else another address could be reached than the one looked at
    asked.pop()
    with pytest.raises(ValueError, match="its address is not a public one"):
        picture_bytes(f"http://a.test:{port}/redirect", "a picture", may_reach)
    assert len(asked) == 3


@pytest.mark.parametrize("url", ["/etc/hostname", "file:///etc/hostname", "ftp://a.test/x.png", "AAAA"])
def test_a_strangers_url_is_no_path_and_no_base64(url: str):
    with pytest.raises(ValueError, match="only http and https URLs are read"):
        picture_bytes(url, "a picture", lambda host, address: True)


def test_data_urls_are_read_in_any_case_and_escaped():
    data = encoded(sample())
    text = base64.b64encode(data).decode()
    escaped = text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    for url in (
        f"DATA:image/png;base64,{text}",
        f"data:image/png;BASE64,{text}",
        f" data:image/png;base64,{text}",
        f"data:image/png;base64,{escaped}",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in data),
    ):
        assert np.array_equal(pixels(url), sample()), url[:30]


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("page", "is an HTML page"),
        ("missing", "404"),
        ("loop", "5 redirects"),
        ("to_file", "only http and https"),
        ("to_ftp", "only http and https"),
        ("announced", "limit of 1 MiB"),
        ("endless", "limit of 1 MiB"),
        ("slow", "longer than 0.5 seconds"),
        ("silent", "longer than 0.5 seconds"),
        ("cut", "failed|decoded"),
    ],
)
def test_bad_servers_end_in_a_value_error_with_the_url(
    server: str, path: str, words: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pictures, "MAX_BYTES", 2**20)
    monkeypatch.setattr(pictures, "MAX_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(ValueError, match=words) as caught:
        load_picture(f"{server}/{path}", "picture 1")
    assert f"picture 1 ({server}/{path}): " in str(caught.value)
    assert time.monotonic() - started < 3


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/hostname",
        "ftp://127.0.0.1/x.png",
        "gopher://x/",
        "http://",
        "http://127.0.0.1:1/x",
        "https://a b/",
    ],
)
def test_other_urls_are_refused(url: str):
    for kind in (None, "url"):
        with pytest.raises(ValueError, match=r"the download failed|only http"):
            load_picture(url, kind=kind)


def test_a_url_item_cannot_read_a_local_file(tmp_path: Path):
    sample().save(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="only http and https"):
        load_picture(str(tmp_path / "secret.png"), kind="url")


# --- high dynamic range ----------------------------------------------------------------------------------------------


def png_with_transfer(transfer: int, primaries: int = 9, image: Image.Image | None = None) -> bytes:
    """A PNG whose `cICP` chunk, right after the header, names primaries and a transfer function."""
    data = encoded(image or Image.new("RGB", (4, 4), "red"))
    body = b"cICP" + bytes([primaries, transfer, 0, 1])
    chunk = (4).to_bytes(4) + body + zlib.crc32(body).to_bytes(4)
    header = 8 + 25
    return data[:header] + chunk + data[header:]


def avif_with_transfer(transfer: int, primaries: int = 9, image: Image.Image | None = None) -> bytes:
    image = image or Image.new("RGB", (4, 4), "red")
    head, box, rest = encoded(image, "AVIF", quality=100, subsampling="4:4:4").partition(b"colrnclx")
    assert box
    return head + box + primaries.to_bytes(2) + transfer.to_bytes(2) + rest[4:]


@pytest.mark.parametrize("make", [png_with_transfer, avif_with_transfer])
@pytest.mark.parametrize("transfer", [hdr.PQ, hdr.HLG])
def test_tones_of_high_dynamic_range_become_srgb(make, transfer):
    signal = {hdr.PQ: 148, hdr.HLG: 191}[transfer]  # 58 % and 75 %: diffuse white, by ITU-R BT.2408
    strip = Image.new("RGB", (8, 8), (signal,) * 3)
    strip.paste((255, 255, 255), (0, 0, 4, 4))
    strip.paste((signal // 2,) * 3, (4, 0, 8, 4))
    found = np.asarray(load_picture(make(transfer, image=strip))).astype(int)
    assert (found.max(axis=-1) - found.min(axis=-1)).max() <= 3  # grey stays grey
    brightest, dark, white = (found[place].mean() for place in ((1, 1), (1, 6), (6, 6)))
    assert 238 <= white <= 250  # read as sRGB it would be the signal
    assert brightest > white
    assert dark < white - 100  # below the knee light is kept


def test_wide_colours_of_high_dynamic_range_keep_their_hue_and_transparency_lies_on_white():
    green = Image.new("RGBA", (4, 4), (0, 110, 0, 255))
    green.putpixel((0, 0), (0, 0, 0, 0))
    found = np.asarray(load_picture(png_with_transfer(hdr.PQ, image=green))).astype(int)
    assert tuple(found[0, 0]) == (255, 255, 255)
    assert found[2, 2, 1] > 4 * max(found[2, 2, 0], found[2, 2, 2])
    with pytest.raises(ValueError, match=r"picture 3: is an HDR picture with primaries 5 .* known are 1, 9, 12"):
        load_picture(png_with_transfer(hdr.PQ, primaries=5), "picture 3")


@pytest.mark.parametrize("make", [png_with_transfer, avif_with_transfer])
@pytest.mark.parametrize(
    ("primaries", "transfer", "red"),
    [(12, 13, (234, 51, 35)), (9, 14, (207, 74, 34)), (12, 1, (234, 51, 35)), (1, 13, (255, 0, 0))],
)
def test_colours_named_by_number_become_srgb(make, primaries, transfer, red):
    found = pixels(make(transfer, primaries, Image.new("RGB", (8, 8), red))).astype(int)
    assert np.abs(found[4, 4] - RED).max() <= (3 if make is png_with_transfer else 12)
    grey = pixels(make(transfer, primaries, Image.new("RGB", (8, 8), (77, 77, 77)))).astype(int)
    assert np.abs(grey - 77).max() <= 1


@pytest.mark.parametrize(("transfer", "grey"), [(8, 128), (4, 52), (13, 55)])
def test_the_curve_that_a_png_names_by_number_counts(transfer, grey):
    found = pixels(png_with_transfer(transfer, 1, Image.new("RGB", (4, 4), (55, 55, 55)))).astype(int)
    assert np.abs(found - grey).max() <= 2


def test_grey_tones_of_sixteen_bits_are_those_of_eight_and_finer():
    coarse = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    for transfer in (hdr.PQ, hdr.HLG):
        expected = pixels(png_with_transfer(transfer, image=Image.fromarray(coarse)))
        fine = Image.fromarray(coarse.astype(np.uint16) * 257)
        assert np.array_equal(pixels(png_with_transfer(transfer, image=fine)), expected)
    ramp = np.linspace(0, 65535, 4096).astype(np.uint16)[None]
    shades = pixels(png_with_transfer(hdr.PQ, image=Image.fromarray(ramp)))[0, :, 0].astype(int)
    assert len(set(shades)) > 200
    assert (np.diff(shades) >= 0).all()
    keyed = encoded(Image.fromarray(ramp), transparency=int(ramp[0, 7]))
    header = 8 + 25
    tones = png_with_transfer(hdr.PQ)[header : header + 16]
    assert tuple(pixels(keyed[:header] + tones + keyed[header:])[0, 7]) == WHITE


def test_light_of_signals_is_that_of_the_standards():
    assert hdr.pq_light(np.array([0.0, 0.5081, 1.0])) == pytest.approx([0, 100, 10_000], rel=2e-3, abs=1e-6)
    assert hdr.hlg_scene(np.array([0.0, 0.5, 1.0])) == pytest.approx([0, 1 / 12, 1], abs=1e-6)
    assert hdr.rgb_to_xyz(9)[1] == pytest.approx([0.2627, 0.6780, 0.0593], abs=1e-4)  # luminance by ITU-R BT.2020
    assert hdr.rgb_to_xyz(1)[1] == pytest.approx([0.2126, 0.7152, 0.0722], abs=1e-4)


def test_a_large_picture_of_high_dynamic_range_is_mapped_in_bands(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (13, 7, 3), dtype=np.uint8)
    expected = hdr.to_srgb(pixels, hdr.HLG, 12)
    monkeypatch.setattr(hdr, "PIXELS_AT_ONCE", 20)
    assert np.array_equal(hdr.to_srgb(pixels, hdr.HLG, 12), expected)


@pytest.mark.parametrize("make", [png_with_transfer, avif_with_transfer])
def test_pictures_that_name_the_transfer_of_srgb_are_read(make):
    red, green, blue = load_picture(make(13)).getpixel((1, 1))
    assert red > 240
    assert max(green, blue) < 15


def test_a_png_that_ends_within_a_chunk_is_refused_as_damaged():
    with pytest.raises(ValueError, match="cannot be decoded"):
        load_picture(png_with_transfer(16)[:36])
