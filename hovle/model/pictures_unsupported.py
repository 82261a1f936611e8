"""Name what people take for a picture file and no decoder here reads, so that an error can say what to do."""

import re
import zlib

BEGINNING = 2**20
"""Bytes from the start of a file that are looked at."""

JPEG_XL = "a JPEG XL picture; save it as PNG or JPEG first"
CAMERA_RAW = "a camera's raw file; develop it to a PNG or JPEG first"

SIGNS = {
    b"%PDF-": "a PDF document; render the page you want to a PNG first",
    b"#?RADIANCE": "a Radiance HDR picture; map its tones to a PNG first",
    b"\x76\x2f\x31\x01": "an OpenEXR picture; map its tones to a PNG first",
    b"%!PS": "a PostScript document; render the page you want to a PNG first",
    b"\xc5\xd0\xd3\xc6": "a PostScript document; render the page you want to a PNG first",
    b"\xff\x0a": JPEG_XL,
    b"\x0cJXL ": JPEG_XL,
    b"8BPS": "a Photoshop document; export it as PNG or JPEG first",
    b"IIRO": CAMERA_RAW,
    b"IIRS": CAMERA_RAW,
    b"IIU\x00": CAMERA_RAW,
    b"FUJIFILMCCD-RAW": CAMERA_RAW,
    b"FOVb": CAMERA_RAW,
}
"""First bytes -> what the file is and what to do."""

ROOTS = {
    "svg": "an SVG drawing; render it to a PNG first",
    "html": "an HTML page; save the picture it shows and give that",
}
"""First element of a text -> the same."""

HEIC = "an HEIC picture, as phones take them; save it as JPEG or PNG first"
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")


def document_kind(beginning: bytes) -> str | None:
    """What a file that is no readable picture is, and what to do with it; None when that is not known either.

    Args:
        beginning: The first `BEGINNING` bytes of the file, or all.
    """
    text = beginning.lstrip(b"\xef\xbb\xbf\x00\x04\t\r\n ")  # a printer's end-of-file may precede PostScript
    for sign, kind in SIGNS.items():
        if text.startswith(sign) or (sign == b"%PDF-" and sign in beginning[:1024]):  # readers allow bytes before it
            return kind
    if beginning[4:8] == b"ftyp":
        if beginning[8:12] == b"crx ":
            return CAMERA_RAW
        length = int.from_bytes(beginning[:4])
        return HEIC if beginning[8:12] in HEIC_BRANDS and b"avif" not in beginning[8:length] else None
    return ROOTS.get(_root_element(_as_text(beginning)))


def _as_text(data: bytes) -> str:
    """A text that may be compressed (SVGZ) or in UTF-16 or -32; whatever is not text gives nonsense, not an error."""
    if data.startswith(b"\x1f\x8b"):
        try:
            data = zlib.decompressobj(wbits=31).decompress(data, BEGINNING)
        except zlib.error:
            return ""
    if data.startswith((b"\xff\xfe\x00\x00", b"<\x00\x00\x00")):
        return data.decode("utf-32-le", errors="replace")
    if data.startswith((b"\x00\x00\xfe\xff", b"\x00\x00\x00<")):
        return data.decode("utf-32-be", errors="replace")
    if data.startswith((b"\xff\xfe", b"<\x00")):
        return data.decode("utf-16-le", errors="replace")
    if data.startswith((b"\xfe\xff", b"\x00<")):
        return data.decode("utf-16-be", errors="replace")
    return data.decode("utf-8", errors="replace")


def _root_element(text: str) -> str:
    """Name of the first element of an XML or HTML text in lower case, without prefix; empty where there is none."""
    position = 0
    while (start := text.find("<", position)) >= 0 and not text[position:start].strip("\ufeff \t\r\n"):
        if text.startswith("<!--", start):
            last, closing = start + 4, "-->"
        elif text.startswith("<?", start):
            last, closing = start, "?>"
        elif text.startswith("<!", start):
            subset, end = text.find("[", start), text.find(">", start)
            last, closing = (text.find("]", subset) if 0 <= subset < end else start), ">"
        else:
            name = re.compile(r"<(?:[\w.-]+:)?([\w.-]+)").match(text, start)
            return name[1].lower() if name else ""
        end = text.find(closing, last)
        if last < 0 or end < 0:
            break
        position = end + len(closing)
    return ""
