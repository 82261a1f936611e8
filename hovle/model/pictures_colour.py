"""Bring whatever Pillow has decoded to upright 8-bit sRGB on white.

Large pictures are converted in bands of rows: beside the decoded picture and its RGB result, both 4 bytes a pixel in
Pillow, memory holds one band of intermediate values. All conversions look at one pixel at a time, so the bands do not
show.
"""

import functools
import io
import struct
from collections.abc import Callable, Iterator

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .pictures_hdr import HLG, PQ, PRIMARIES, names_other_than_srgb, to_srgb

PIXELS_AT_ONCE = 2**20
"""Pixels of one band."""

UNKNOWN = 2
"""Number of unknown primaries and of an unknown transfer function in ITU-T H.273."""

DECODING_ERRORS = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    ArithmeticError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    struct.error,
)
"""What Pillow raises on damaged files and metadata."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what stands the picture upright."""

SIDEWAYS = (5, 6, 7, 8)
"""Orientations that exchange width and height."""

FROM_THE_END = (3, 4, 6, 7)
"""Orientations in which the stored picture's last row comes first, as a row or as a column."""

OVERSHOOT = 1e-3
"""Share of full scale by which float values may lie outside; resizing overshoots a little."""

FLOAT_RANGES = (1, 255, 65535)
"""Values of white that float pictures use."""

OVERSHOT_BY = 16
"""A float picture whose brightest value is less than this part of a range is not taken to be of that range."""

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262
"""Numbers of TIFF tags."""

SRGB_TOLERANCE = 4
"""Levels of 255 by which profiles of sRGB differ among each other."""

Conversion = Callable[[Image.Image], Image.Image]
"""Turns a band of a picture, of any mode, into RGB."""


class PictureError(Exception):
    """A fault with a message of our own; `load_picture` adds the picture's name."""


def to_upright_rgb(image: Image.Image, primaries: int = UNKNOWN, transfer: int = UNKNOWN) -> Image.Image:
    """Decode the first frame, turn it upright and bring any mode to RGB.

    Args:
        image: In any mode; an upright RGB picture is returned as it is.
        primaries: By ITU-T H.273, where the file names them.
        transfer: Transfer function by ITU-T H.273; PQ and HLG are mapped to sRGB before any colour profile counts.

    Raises:
        PictureError: When Pillow cannot convert the mode, when grey values lie out of range, or when the picture is
            of high dynamic range and its primaries are not known.
    """
    key = _transparent_colour(image)
    image.load()
    convert = _conversion(image, primaries, transfer)
    orientation = orientation_of(image)
    if convert is None and orientation == 1:
        return image
    width, height = image.size
    upright = Image.new("RGB", (height, width) if orientation in SIDEWAYS else (width, height))
    for top, band in _bands(image):
        if key is not None:
            band.info["transparency"] = key
        if convert is not None:
            band = convert(band)
        start = height - top - band.height if orientation in FROM_THE_END else top
        if orientation != 1:
            band = band.transpose(TURNS[orientation])
        upright.paste(band, (start, 0) if orientation in SIDEWAYS else (0, start))
    return upright


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where the metadata are damaged."""
    try:
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)  # PNG's own method decodes first
    except DECODING_ERRORS:
        return 1
    return orientation if orientation in TURNS else 1


def scaled_to_uint8(array: np.ndarray, full_scale: float) -> np.ndarray:
    """Map values from 0..`full_scale` to 0..255, rounded; what lies outside is clipped."""
    return np.rint(np.clip(array.astype(np.float32) * (255 / full_scale), 0, 255)).astype(np.uint8)


def _transparent_colour(image: Image.Image) -> int | tuple[int, ...] | None:
    """The one colour a PNG file makes transparent, where Pillow leaves it at another scale than the pixels.

    Loading forgets how many bits they had.
    """
    key = image.info.get("transparency")
    depth = next((tile[3] for tile in getattr(image, "tile", ()) if image.format == "PNG"), None)
    if isinstance(key, tuple) and depth == "RGB;16B":
        return tuple(value >> 8 for value in key)  # Pillow drops the lower byte of pixels, too
    if isinstance(key, int) and depth in ("L;2", "L;4"):
        return key * {"L;2": 85, "L;4": 17}[depth]
    return None


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """First row and pixels of each band of a picture."""
    width, height = image.size
    rows = max(1, PIXELS_AT_ONCE // width)
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def _conversion(image: Image.Image, primaries: int, transfer: int) -> Conversion | None:
    """What brings the picture to RGB; None where it is."""
    has_own_profile = image.format == "AVIF" and image.info.get("icc_profile")  # in a PNG the numbers come first
    if transfer in (PQ, HLG) or (names_other_than_srgb(primaries, transfer) and not has_own_profile):
        return _tone_mapping(image, primaries, transfer)
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_scaling(image)
    profile = _profile_conversion(image)
    if image.mode == "RGB" and not image.has_transparency_data and profile is None:
        return None
    return lambda band: _to_rgb(band if profile is None else profile(band))


def _to_rgb(band: Image.Image) -> Image.Image:
    """Any mode of 8-bit channels to RGB, transparency to white."""
    if band.has_transparency_data:
        return _on_white(band)
    try:
        return band.convert("RGB")
    except ValueError as error:
        raise PictureError(f"pictures in mode {band.mode} are not read ({error}).") from error


def _on_white(band: Image.Image) -> Image.Image:
    if band.mode == "La":
        band = band.convert("LA")
    band = band.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB")


def _profile_conversion(image: Image.Image) -> Conversion | None:
    """Apply an embedded colour profile (Adobe RGB, Display P3, CMYK presses, ...); without one, pixels are sRGB."""
    data = image.info.get("icc_profile")
    if not data or image.mode not in ("L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"):
        return None
    try:
        from PIL import ImageCms  # missing where Pillow was built without LittleCMS
    except ImportError:
        return None
    out_mode = "RGBA" if image.has_transparency_data else "RGB"
    is_ready = image.mode in ("L", "RGB", "CMYK") if out_mode == "RGB" else image.mode == "RGBA"
    in_mode = image.mode if is_ready else out_mode
    try:
        if _is_srgb(data):
            return None
        source = ImageCms.ImageCmsProfile(io.BytesIO(data))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), in_mode, out_mode)
    except (*DECODING_ERRORS, ImageCms.PyCMSError):  # damaged metadata, or a profile of another mode
        return None
    return lambda band: transform.apply(band if is_ready else band.convert(in_mode))


@functools.lru_cache(maxsize=8)
def _is_srgb(profile: bytes) -> bool:
    """Whether a colour profile is called sRGB and is; linear ones bear the name, too."""
    from PIL import ImageCms

    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if "srgb" not in ImageCms.getProfileDescription(source).lower():
        return False
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3)
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "RGB", "RGB")
    found = np.asarray(transform.apply(Image.fromarray(colours)))
    return bool(np.abs(found.astype(int) - colours).max() <= SRGB_TOLERANCE)


def _tone_mapping(image: Image.Image, primaries: int, transfer: int) -> Conversion:
    """The tones and colours of an HDR picture, or of one that names others than sRGB's; they would look washed out."""
    if primaries not in PRIMARIES:
        raise PictureError(
            f"is an HDR picture with primaries {primaries} (ITU-T H.273); known are "
            f"{', '.join(map(str, PRIMARIES))}. Map its colours to sRGB first."
        )
    if image.mode.startswith("I"):  # grey of 16 bits; Pillow's conversion to RGB would clip it
        return lambda band: _grey_on_white(to_srgb(_grey_as_rgb(band), transfer, primaries), band)
    has_alpha = image.has_transparency_data

    def convert(band: Image.Image) -> Image.Image:
        pixels = np.asarray(band.convert("RGBA" if has_alpha else "RGB"))
        mapped = Image.fromarray(to_srgb(pixels[..., :3], transfer, primaries))
        if has_alpha:
            mapped.putalpha(Image.fromarray(np.ascontiguousarray(pixels[..., 3])))
        return _to_rgb(mapped)

    return convert


def _grey_scaling(image: Image.Image) -> Conversion:
    """Scale 16-bit, 32-bit and float grey values to 8 bits."""
    full_scale = _full_scale(image)
    is_negative = _tiff_tag(image, PHOTOMETRIC) == 0  # white is zero; Pillow turns only 8 bits and fewer

    def convert(band: Image.Image) -> Image.Image:
        grey = scaled_to_uint8(np.asarray(band), full_scale)
        return _grey_on_white(255 - grey if is_negative else grey, band)

    return convert


def _grey_as_rgb(band: Image.Image) -> np.ndarray:
    """The values of 16 bits once for each channel, shape `(H, W, 3)`, uint16."""
    return np.repeat(np.asarray(band).astype(np.uint16)[..., None], 3, axis=-1)


def _grey_on_white(pixels: np.ndarray, band: Image.Image) -> Image.Image:
    """Make an RGB picture of converted grey values; the value the file makes transparent becomes white."""
    key = band.info.get("transparency")
    if key is not None:
        pixels[np.asarray(band) == key] = 255
    return Image.fromarray(pixels).convert("RGB")


def _full_scale(image: Image.Image) -> int:
    """The value of white.

    The mode `I;16` is 16 bits by name, of which TIFF files may use 12. `I` and `F` do not tell their range, so the
    smallest usual one that holds the values is taken: 0..1 (`F`), 0..255, 0..65535.
    """
    if image.mode.startswith("I;16") and _tiff_tag(image, BITS_PER_SAMPLE) == (12,):
        return 4095
    # PPM files and, with older Pillow, PNG files of 16 bits have no mode of their own.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 65535
    extremes = [(values.min(), values.max()) for values in (np.asarray(band) for _, band in _bands(image))]
    low, high = np.min(extremes), np.max(extremes)  # not-a-number where any value is
    return _float_full_scale(low, high) if image.mode == "F" else _whole_full_scale(low, high)


def _tiff_tag(image: Image.Image, tag: int) -> int | tuple[int, ...] | None:
    return image.tag_v2.get(tag) if image.format == "TIFF" and hasattr(image, "tag_v2") else None


def _whole_full_scale(low: int, high: int) -> int:
    for full_scale in (255, 65535):
        if low >= 0 and high <= full_scale:
            return full_scale
    raise PictureError(f"values of mode I must lie in 0..65535, found {low}..{high}.")


def _float_full_scale(low: float, high: float) -> int:
    """The range of float values; a little more than a range is overshoot, what lies between two could be either."""
    for full_scale in FLOAT_RANGES:
        least = 0 if full_scale == FLOAT_RANGES[0] else full_scale / OVERSHOT_BY
        if low >= -OVERSHOOT * full_scale and least <= high <= full_scale * (1 + OVERSHOOT):
            return full_scale
    raise PictureError(
        f"float values must lie in 0..1, 0..255 or 0..65535 and reach a {OVERSHOT_BY}th of it, found "
        f"{low:.6g}..{high:.6g}. Bring them to 0..1; of a picture of high dynamic range, map the tones first."
    )
