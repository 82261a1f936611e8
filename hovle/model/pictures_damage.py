"""Find the damage that decoders pass over in silence.

Each check knows one file format; `pictures.py` calls it for files that Pillow has recognised.
"""

import contextlib
import os
import re
import threading
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFile

from .pictures_colour import PictureError

LOST_PLACE = ("bad Huffman code", "premature end of data segment", "found marker", "bad arithmetic code")
"""Words of libjpeg's warnings after which pixels are wrong. (Where a file just ends, Pillow refuses it itself.)"""

MAX_LEFT_OVER_BYTES = 8
"""Bytes between the last pixel of a JPEG and what follows that are taken for a camera's habit."""

MAX_SCANS = 100
"""Scans of a JPEG, as in libtiff; programs write 1 to a dozen or two, and each takes time for all pixels."""

MAX_SCANNED_PIXELS = 2_000_000_000
"""Pixels of a JPEG times its scans: 11 scans of the largest picture, about 5 seconds."""

FAX = ("group3", "group4", "tiff_ccitt")
"""Pillow's names of compressions in which libtiff paints over damage."""

TIFF_SUBFILE_TYPE, TIFF_SAMPLES, TIFF_ROWS_PER_STRIP, TIFF_PLANAR = 254, 277, 278, 284
TIFF_TILE_WIDTH, TIFF_TILE_HEIGHT, TIFF_BYTE_COUNTS = 322, 323, 279
TIFF_OFFSETS = {"strips": 273, "tiles": 324}


JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
"""A marker that begins a segment with a length, or ends the picture."""

START_OF_SCAN = 0xDA


class _Strictness:
    """How many threads are decoding, and what Pillow's switch for truncated files was before the first began."""

    lock = threading.Lock()
    num_threads = 0
    loads_truncated = False

    @classmethod
    def start_anew(cls) -> None:
        """In a forked process no other thread goes on, so none would open the lock again."""
        cls.lock, cls.num_threads = threading.Lock(), 0


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_Strictness.start_anew)


@contextlib.contextmanager
def refusing_truncated_files() -> Iterator[None]:
    """Have Pillow refuse truncated files, whatever `ImageFile.LOAD_TRUNCATED_IMAGES` is; other packages set it.

    The switch is put back when the last thread is done, so threads decode side by side.
    """
    with _Strictness.lock:
        if not _Strictness.num_threads:
            _Strictness.loads_truncated = ImageFile.LOAD_TRUNCATED_IMAGES
        _Strictness.num_threads += 1
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        with _Strictness.lock:
            _Strictness.num_threads -= 1
            if not _Strictness.num_threads and _Strictness.loads_truncated:
                ImageFile.LOAD_TRUNCATED_IMAGES = True


def checked(image: Image.Image, data: bytes) -> Image.Image | np.ndarray:
    """The picture after the checks of its format, perhaps decoded; of a JPEG perhaps its pixels, `(H, W, C)`.

    Args:
        image: As opened by Pillow.
        data: All bytes of its file.

    Raises:
        PictureError: When its pixels are damaged, not all there, or made to take for ever.
    """
    if image.format in ("JPEG", "MPO"):
        refuse_endless_scans(image, data)
        return _strictly_decoded(image, data)
    if image.format == "TIFF":
        _check_tiff(image)
        if image.info.get("compression") in FAX:
            _refuse_lost_fax(image)
    if image.format == "JPEG2000":
        _refuse_lost_pixels(image, data)
    return image


def refuse_endless_scans(image: Image.Image, data: bytes) -> None:
    """Refuse a JPEG whose scans repeat until decoding takes minutes: a few bytes each, over all pixels."""
    most = min(MAX_SCANS, max(1, MAX_SCANNED_PIXELS // (image.width * image.height)))
    if _has_one_scan(image, data) or data.count(b"\xff\xda") <= most:  # metadata may hold the same two bytes
        return
    num_scans = sum(marker == START_OF_SCAN for marker, _, _ in _segments(data))
    if num_scans > most:
        raise PictureError(f"has {num_scans} scans; JPEGs of {image.width} x {image.height} may have {most}.")


def _has_one_scan(image: Image.Image, data: bytes) -> bool:
    """Whether the first scan of a JPEG holds all of every pixel; decoders stop after it."""
    first = next((start for marker, start, _ in _segments(data) if marker == START_OF_SCAN), len(data))
    return "progressive" not in image.info and data[first + 4 : first + 5] == bytes([len(image.getbands())])


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment of the first picture in a JPEG file, up to its last scan."""
    offset = 2
    while (found := JPEG_MARKER.search(data, offset)) and found[1] != b"\xd9":
        offset = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
        yield found[1][0], found.start(), offset


def _strictly_decoded(image: Image.Image, data: bytes) -> Image.Image | np.ndarray:
    """The pixels of a JPEG by simplejpeg, where it is installed: Pillow's in less time, and damage is told."""
    try:
        import simplejpeg
    except ImportError:
        return image
    colours = {"RGB": "RGB", "L": "GRAY"}.get(image.mode, "CMYK")
    try:
        pixels = simplejpeg.decode_jpeg(data, colours)
    except ValueError as error:
        clean = _without_stray_bytes(data)
        if len(clean) < len(data):
            return _strictly_decoded(image, clean)
        if _is_damage(str(error), data):
            raise PictureError(f"is damaged ({error}).") from error
        return image
    return image if colours == "CMYK" else pixels  # Pillow knows by Adobe's mark whether inks are stored inverted


def _without_stray_bytes(data: bytes) -> bytes:
    """A JPEG without what lies between the segments before its pixels: decoders skip that, simplejpeg refuses it."""
    parts = [data[:2]]
    for marker, start, end in _segments(data):
        if marker == START_OF_SCAN:
            return b"".join([*parts, data[start:]])
        parts.append(data[start:end])
    return data


def _is_damage(warning: str, data: bytes) -> bool:
    """Whether libjpeg's first remark on a file means lost pixels; many sound files earn one.

    Bytes left over behind the last pixel are a few in the files of some cameras, or padding with zeros. Where there
    are more, the decoder has lost its place before.
    """
    if left_over := re.search(r"(\d+) extraneous bytes before marker", warning):
        num_bytes = int(left_over[1])
        return num_bytes > MAX_LEFT_OVER_BYTES and bytes(num_bytes) + b"\xff\xd9" not in data
    return any(words in warning for words in LOST_PLACE)


def _refuse_lost_pixels(image: Image.Image, data: bytes) -> None:
    """Refuse a JPEG 2000 file that became black although it holds more than that takes: OpenJPEG lost its place.

    What is not black may take twice its size in memory.
    """
    image.load()
    num_bytes = len(data) - data.find(b"\xff\x93")  # where the pixels begin
    shown = [band for name, band in zip(image.getbands(), image.split(), strict=True) if name not in ("A", "a")]
    num_lit = sum(int(np.count_nonzero(np.asarray(band))) * np.asarray(band).itemsize for band in shown)
    num_black = 64 + 64 * data.count(b"\xff\x90") + image.width * image.height // 256  # the marker begins a tile
    if num_bytes > num_black + 2 * num_lit:
        raise PictureError("is damaged (its pixels cannot be decoded and would be black).")


def _check_tiff(image: Image.Image) -> None:
    """Refuse a TIFF file that lists less than its picture, or shows a preview of another one."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if tags.get(TIFF_SUBFILE_TYPE, 0) == 1:
        raise PictureError("shows a preview only, as camera raw files do; save the picture itself as TIFF or PNG.")
    kind, expected = _tiff_parts(image)
    if len(tags.get(TIFF_OFFSETS[kind], ())) < expected:
        found = len(tags.get(TIFF_OFFSETS[kind], ()))
        raise PictureError(
            f"is damaged ({found} {kind} are listed where {image.width} x {image.height} take {expected})."
        )


def _tiff_parts(image: Image.Image) -> tuple[str, int]:
    """Whether a TIFF is made of strips or tiles, and of how many."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    width, height = tags[256], tags[257]  # as stored, not as turned upright
    if TIFF_OFFSETS["strips"] in tags:
        kind, num_parts = "strips", -(-height // tags.get(TIFF_ROWS_PER_STRIP, height))
    else:
        kind, num_parts = "tiles", -(-width // tags[TIFF_TILE_WIDTH]) * -(-height // tags[TIFF_TILE_HEIGHT])
    return kind, num_parts * (tags.get(TIFF_SAMPLES, 1) if tags.get(TIFF_PLANAR) == 2 else 1)


def _refuse_lost_fax(image: Image.Image) -> None:
    """Refuse a fax of one colour that holds more than that takes: libtiff lost its place and filled the rest."""
    image.load()
    tags = image.tag_v2  # type: ignore[attr-defined]
    row = 1 if image.info["compression"] == "group4" else 40  # fax machines fill up rows of group 3
    is_blank = len(set(image.convert("L").getextrema())) == 1
    if is_blank and sum(tags.get(TIFF_BYTE_COUNTS, ())) > 256 + image.height * row:
        raise PictureError("is damaged (its pixels cannot be decoded and would be of one colour).")
