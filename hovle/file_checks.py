"""Find the damage that decoders pass over in silence.

Each check knows one file format; `pictures.py` calls it for files that Pillow has recognised.
"""

import contextlib
import re
import threading
from collections.abc import Iterator

from PIL import Image, ImageFile

from .colours import PictureError

LOST_PLACE = ("bad Huffman code", "premature end of data segment", "found marker", "bad arithmetic code")
"""Words of libjpeg's warnings after which pixels are wrong. (Where a file just ends, Pillow refuses it itself.)"""

MAX_LEFT_OVER_BYTES = 8
"""Bytes between the last pixel of a JPEG and what follows that are taken for a camera's habit."""


class _Strictness:
    """How many threads are decoding, and what Pillow's switch for truncated files was before the first began."""

    lock = threading.Lock()
    num_threads = 0
    loads_truncated = False


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


def strictly_decoded(image: Image.Image, data: bytes) -> Image.Image:
    """A JPEG with simplejpeg's pixels, where it is installed: Pillow's in less time, and damage is told."""
    try:
        import simplejpeg
    except ImportError:
        return image
    colours = {"RGB": "RGB", "L": "GRAY"}.get(image.mode, "CMYK")
    try:
        pixels = simplejpeg.decode_jpeg(data, colours)
    except ValueError as error:
        if _is_damage(str(error), data):
            raise PictureError(f"is damaged ({error}).") from error
        return image
    if colours == "CMYK":  # Pillow knows by Adobe's mark whether the inks are stored inverted
        return image
    decoded = Image.fromarray(pixels.squeeze(-1) if colours == "GRAY" else pixels)
    decoded.info = image.info
    return decoded


def _is_damage(warning: str, data: bytes) -> bool:
    """Whether libjpeg's first remark on a file means lost pixels; many sound files earn one.

    Bytes left over behind the last pixel are a few in the files of some cameras, or padding with zeros. Where there
    are more, the decoder has lost its place before.
    """
    if left_over := re.search(r"(\d+) extraneous bytes before marker", warning):
        num_bytes = int(left_over[1])
        return num_bytes > MAX_LEFT_OVER_BYTES and bytes(num_bytes) + b"\xff\xd9" not in data
    return any(words in warning for words in LOST_PLACE)


def refuse_lost_pixels(image: Image.Image, data: bytes) -> None:
    """Refuse a JPEG 2000 file that became black although it holds more than black takes: OpenJPEG lost its place."""
    image.load()
    num_bytes = len(data) - data.find(b"\xff\x93")  # where the pixels begin
    is_black = all(band.getextrema()[1] == 0 for band in image.split())
    if is_black and num_bytes > 256 + image.width * image.height // 256:
        raise PictureError("is damaged (its pixels cannot be decoded and would be black).")
