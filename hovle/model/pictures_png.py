"""Walk the chunks of a PNG file for what Pillow does not look at or trips over."""

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from PIL import PngImagePlugin

from .pictures_colour import UNKNOWN, PictureError

SIGNATURE = b"\x89PNG\r\n\x1a\n"

DECISIVE = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iCCP", b"cICP", b"eXIf")
"""Chunks on which pixels depend; damage in others does no harm."""

LEAST_BYTES = {b"pHYs": 9, b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"acTL": 8, b"fcTL": 26}
"""Length below which Pillow refuses the whole file."""

TEXTS = (b"tEXt", b"zTXt", b"iTXt")

ORIENTATION_KEYWORDS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
"""Texts that may hold an orientation."""

MAX_PACKED_CHUNKS = 64
"""Compressed texts whose length is looked at; further ones are left out."""

MAX_PROFILE_BYTES = 16 * 2**20
"""Largest colour profile, unpacked."""


class Png(NamedTuple):
    """A PNG file as Pillow is to see it, and what Pillow does not tell of it."""

    data: bytes
    profile: bytes | None
    """An embedded colour profile that is too large for Pillow."""

    primaries: int
    transfer: int
    """Numbers in ITU-T H.273, from chunk `cICP`."""


def examine(data: bytes) -> Png:
    """Check the checksums of a PNG file, and leave out chunks for which Pillow would refuse it.

    Raises:
        PictureError: When a chunk on which pixels depend is damaged.
    """
    view, kept, kept_until = memoryview(data), [], 0
    profile, codes, num_packed = None, (UNKNOWN, UNKNOWN), 0
    for name, start, end in _chunks(data):
        is_sound = zlib.crc32(view[start - 4 : end]) == int.from_bytes(view[end : end + 4])
        if not is_sound and name in DECISIVE:
            raise PictureError(f"is damaged (the checksum of a chunk {name.decode()} is wrong).")
        packed = _packed_part(name, data[start:end]) if name in (b"zTXt", b"iTXt", b"iCCP") else b""
        num_packed += bool(packed)
        is_large = bool(packed) and (num_packed > MAX_PACKED_CHUNKS or _unpacks_to_more(packed))
        if name == b"cICP" and end - start >= 2:
            codes = data[start], data[start + 1]
        if name == b"iCCP" and is_large:
            profile = _unpacked_profile(packed)
        if is_large or not is_sound or end - start < LEAST_BYTES.get(name, 0):
            kept.append(view[kept_until : start - 8])
            kept_until = end + 4
    return Png(b"".join([*kept, view[kept_until:]]) if kept else data, profile, *codes)


def tells_orientation_late(file: BinaryIO) -> bool:
    """Whether a PNG file holds metadata with an orientation behind its pixels, where reading the header ends."""
    is_behind = False
    file.seek(len(SIGNATURE))
    while len(header := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", header)
        keyword = b""
        if is_behind and name in TEXTS:
            keyword = file.read(min(length, 32))
        if (is_behind and name == b"eXIf") or keyword.startswith(ORIENTATION_KEYWORDS):
            return True
        if name == b"IEND" or not name.isalpha():
            break
        is_behind = is_behind or name == b"IDAT"
        file.seek(length - len(keyword) + 4, 1)
    return False


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name of each whole chunk, and where what it holds begins and ends."""
    offset, name = len(SIGNATURE), b""
    while name != b"IEND" and offset + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, offset)
        start, end = offset + 8, offset + 8 + length
        if end + 4 > len(data) or not name.isalpha():  # Pillow tells what is wrong
            return
        yield name, start, end
        offset = end + 4


def _packed_part(name: bytes, chunk: bytes) -> bytes:
    """What is compressed in a chunk of text or with a profile."""
    _, _, rest = chunk.partition(b"\0")
    if name == b"iTXt":
        return rest[2:].split(b"\0", 2)[-1] if rest.startswith(b"\1") else b""
    return rest[1:]


def _unpacks_to_more(packed: bytes) -> bool:
    """Whether there is more in it than Pillow reads."""
    stream = zlib.decompressobj()
    try:
        stream.decompress(packed, PngImagePlugin.MAX_TEXT_CHUNK)
    except zlib.error:  # Pillow ignores the chunk
        return False
    return bool(stream.unconsumed_tail)


def _unpacked_profile(packed: bytes) -> bytes:
    stream = zlib.decompressobj()
    profile = stream.decompress(packed, MAX_PROFILE_BYTES)
    if stream.unconsumed_tail:
        raise PictureError(f"holds a colour profile of more than {MAX_PROFILE_BYTES / 2**20:g} MiB.")
    return profile
