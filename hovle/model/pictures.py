"""Load a picture from wherever it is, as upright 8-bit RGB, or say which picture is bad and why.

Read from top to bottom: `load_picture` -> where the bytes come from (file, URL, base64) -> decoding -> arrays;
`pictures_colour.py` goes on from there. Whatever is found to be wrong with a picture ends in a `ValueError` that names
it.

Not all damage can be found. Truncated files are refused in every format, and PNG files by their checksums. Changed
bytes inside a JPEG show only where the decoder loses its place: Pillow then fills the rest in silence, simplejpeg (an
extra) tells of most such files.
"""

import base64
import binascii
import contextlib
import http
import importlib.util
import io
import ipaddress
import os
import socket
import threading
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from .pictures_colour import (
    DECODING_ERRORS,
    SIDEWAYS,
    UNKNOWN,
    PictureError,
    orientation_of,
    scaled_to_uint8,
    to_upright_rgb,
)
from .pictures_damage import checked, refusing_truncated_files
from .pictures_heic import advice as heic_advice
from .pictures_heic import colour_codes as heic_colour_codes
from .pictures_heic import register_opener
from .pictures_objects import is_closed, undecoded
from .pictures_png import SIGNATURE as PNG_SIGNATURE
from .pictures_png import examine as examine_png
from .pictures_png import tells_orientation_late
from .pictures_unsupported import BEGINNING, HEIC, document_kind

MAX_PIXELS = 178_956_970
"""Largest picture that is decoded, read from its header; the size from which Pillow itself refuses."""

MAX_BYTES = 32 * 2**20
"""Largest download and largest base64 picture, in bytes of the encoded file."""

MAX_SECONDS = 10.0
"""Total time of one download, from connecting to the last byte."""

MAX_REDIRECTS = 5
"""Redirects followed by one download."""

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "HEIF")
"""Formats that are read, HEIF with an extra. Others Pillow knows (EPS runs an external program) are refused."""

Kind = Literal["url", "path", "base64"]
"""How a string is to be read."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MayReach = Callable[[str, Address], bool]
"""Says whether a download may connect to a host, by the name in its URL and the address it has."""


def load_picture(source: Any, name: str | None = None, *, kind: Kind | None = None) -> Image.Image:
    """Load one picture.

    Args:
        source: A Pillow image, which comes back as it is where it is upright RGB already; a path; a URL (http or
            https); base64 text, bare or as a `data:` URL; the bytes of a picture file or an open binary file;
            `{"bytes": ..., "path": ...}` as `datasets` gives it; a numpy array or torch tensor. Arrays hold `(H, W)`,
            `(H, W, C)` or `(C, H, W)` with 1, 3 or 4 channels: uint8 in 0..255, uint16 in 0..65535, bool, or float in
            0..1.
        name: What an error calls the picture, for instance "picture 2 of the request".
        kind: Read a string only as `"url"`, `"path"` or `"base64"`; by default it is whatever it looks like.

    Returns:
        The picture in mode RGB, upright by its EXIF orientation; the first frame of an animation; transparency lies
        on white; 16-bit values are scaled, not clipped; 8-bit colours of an embedded ICC profile become sRGB, and
        so do tones and colours that a PNG or AVIF file names by number, high dynamic range (PQ, HLG) among them.

    Raises:
        ValueError: When the picture is missing, unreadable, damaged, empty or too large; it names the picture.
    """
    if kind is not None and not isinstance(source, str | os.PathLike):
        kind = None  # a picture object says itself what it is
    with _naming(_label(source, name, kind)):
        return _load(source, kind)


def _load(source: Any, kind: Kind | None) -> Image.Image:
    if isinstance(source, Image.Image):
        return _from_pillow(source)
    if isinstance(source, dict):
        return _load(*undecoded(source))
    if isinstance(source, np.ndarray | torch.Tensor):
        return to_upright_rgb(_check_size(_from_array(source)))
    if kind == "path" or (kind is None and isinstance(source, os.PathLike)):
        return PictureFile(_read_file(source)).picture()
    if isinstance(source, str):
        return _from_text(source, kind).picture()
    if isinstance(source, bytes | bytearray | memoryview):
        return PictureFile(bytes(source)).picture()
    if hasattr(source, "read"):
        data = source.read()
        if not isinstance(data, bytes):
            raise PictureError(f'its file gives {type(data).__name__}, no bytes: open it with mode "rb".')
        return PictureFile(data).picture()
    raise PictureError(
        "a picture must be a Pillow image, path, URL, base64 text, bytes, numpy array or torch tensor, "
        f"got {type(source).__name__}."
    )


def _from_pillow(image: Image.Image) -> Image.Image:
    with refusing_truncated_files():  # it may be a file whose pixels are still to be read
        try:
            return to_upright_rgb(_check_size(image))
        except (AssertionError, *DECODING_ERRORS) as error:
            if not is_closed(image):
                raise
            raise PictureError(
                "its file was closed before its pixels were read: open it again, or call its load() before closing."
            ) from error


def picture_size(source: str | os.PathLike | bytes) -> tuple[int, int]:
    """Read height and width of a picture, upright by its EXIF orientation, from the header of its file.

    Args:
        source: Path or bytes of the file. The pixels behind a sound header may still turn out damaged.

    Raises:
        ValueError: As `load_picture`, for a missing file or a header that makes no sense.
    """
    with _naming(_label(Path(source) if isinstance(source, str) else source, None, None)):
        if not isinstance(source, bytes):
            _check_file(Path(source))
        upright = _size_in_header(source)
        if upright is None:
            upright = _load(source, None if isinstance(source, bytes) else "path").size
        return upright[1], upright[0]


def _size_in_header(source: str | os.PathLike | bytes) -> tuple[int, int] | None:
    """Width and height of the upright picture; None where the file must be decoded to know."""
    with refusing_truncated_files():
        try:
            image = _open_image(io.BytesIO(source) if isinstance(source, bytes) else source)
        except DECODING_ERRORS:  # perhaps for metadata only
            return None
        with image:
            width, height = _check_size(image).size
            if image.format == "TIFF":  # versions of Pillow differ in whether its header gives the upright size
                return None
            if image.format == "PNG" and _tells_orientation_late(source):
                return None
            return (height, width) if orientation_of(image) in SIDEWAYS else (width, height)


def _tells_orientation_late(source: str | os.PathLike | bytes) -> bool:
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb", buffering=0) as file:
        return tells_orientation_late(file)


def load_pixels(source: str | os.PathLike | bytes) -> np.ndarray:
    """Load one picture as `load_picture` does, but give its pixels, shape `(H, W, 3)`, uint8.

    Args:
        source: Path or bytes of the file.
    """
    with _naming(_label(Path(source) if isinstance(source, str) else source, None, None)):
        return PictureFile(source if isinstance(source, bytes) else _read_file(source)).pixels()


def _label(source: Any, name: str | None, kind: Kind | None) -> str:
    """Name a picture for an error: what the caller calls it, and its file or URL."""
    where = None
    if isinstance(source, os.PathLike) or kind == "path":
        where = os.fspath(source)
    elif isinstance(source, str) and kind != "base64" and not _is_data_url(source):
        where = source if len(source) <= 300 else None  # longer is base64, not a name
    elif isinstance(source, Image.Image):
        where = getattr(source, "filename", None)
    elif isinstance(source, dict) and isinstance(source.get("path"), str | os.PathLike):
        where = os.fspath(source["path"])
    if isinstance(where, bytes):
        where = os.fsdecode(where)
    if name and where:
        return f"{name} ({where})"
    return name or str(where or "the picture")


@contextlib.contextmanager
def _naming(label: str) -> Iterator[None]:
    """Turn whatever is wrong with a picture into a `ValueError` that names it."""
    try:
        yield
    except PictureError as error:
        raise ValueError(f"{label}: {error}") from error.__cause__
    except DECODING_ERRORS as error:
        raise ValueError(f"{label}: cannot be decoded as a picture ({_reason(error)}).") from error


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS / 1e6:.0f} megapixels: {text}"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture file of a known format"
    return text or type(error).__name__


# --- where the bytes come from ---------------------------------------------------------------------------------------


def _read_file(path: str | os.PathLike) -> bytes:
    """Read a regular file; pipes and devices could block for ever."""
    file = Path(path)
    try:
        _check_file(file)
        return file.read_bytes()
    except (OSError, ValueError) as error:
        raise PictureError(f"cannot be read ({error}).") from error


def _check_file(file: Path) -> None:
    if file.is_file():
        return
    if file.is_dir():
        raise PictureError("is a directory, not a picture file.")
    raise PictureError("is not a regular file." if file.exists() else "no such file.")


def _from_text(text: str, kind: Kind | None) -> "PictureFile":
    """Open what a string stands for: a URL, an existing file, or base64."""
    if kind == "base64" or _is_data_url(text):
        return PictureFile(_decode_base64(text))
    scheme = text.partition("://")[0].strip().lower() if "://" in text[:32] else ""
    if scheme in ("http", "https"):
        return PictureFile(_download(text))
    if scheme or kind == "url":
        raise PictureError("only http and https URLs are read.")
    if os.path.exists(text):
        return PictureFile(_read_file(text))
    try:
        return PictureFile(_decode_base64(text))
    except (*DECODING_ERRORS, PictureError):
        raise PictureError("no such file, and not a picture in base64 either.") from None


def _is_data_url(text: str) -> bool:
    return text[:32].lstrip()[:5].lower() == "data:"


def _decode_base64(text: str) -> bytes:
    """Decode base64, with or without `data:...;base64,`, padding and line breaks; both alphabets."""
    if len(text) > MAX_BYTES * 3 // 2 + 128:  # base64 takes 4 characters for 3 bytes, and line breaks
        raise PictureError(f"the base64 picture is larger than the limit of {_mebibytes(MAX_BYTES)}.")
    if _is_data_url(text):
        header, comma, text = text.partition(",")
        if not comma:
            raise PictureError("the data URL has no comma before its data.")
        if not header.rstrip().lower().endswith(";base64"):
            return urllib.parse.unquote_to_bytes(text)
        text = urllib.parse.unquote(text)
    text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PictureError(f"is not valid base64 ({error}).") from error


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet's and not of this machine or a network around it.

    IPv6 has forms that stand for an IPv4 address (mapped, compatible, 6to4, Teredo, NAT64): then that one counts.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast
    if inner := _address_inside(address):
        return is_public(inner)
    return address.is_global and not (address.is_multicast or address.is_site_local)


def _address_inside(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if inner := address.ipv4_mapped or address.sixtofour:
        return inner
    if address.teredo:
        return address.teredo[1]
    carriers = ("::/96", "64:ff9b::/96", "64:ff9b:1::/48")  # compatible, NAT64 and its local form
    if any(address in ipaddress.IPv6Network(carrier) for carrier in carriers):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None


def picture_bytes(url: str, name: str, may_reach: MayReach) -> bytes:
    """Read the file of a picture from a stranger's URL (http, https or `data:`), without decoding it.

    Args:
        url: The URL.
        name: What an error calls the picture.
        may_reach: Asked at each hop, after the host's name has become addresses, of which all must do.

    Raises:
        ValueError: As `load_picture`.
    """
    with _naming(_label(url, name, "url")):
        if _is_data_url(url):
            return _decode_base64(url)
        if url.partition("://")[0].strip().lower() not in ("http", "https"):
            raise PictureError("only http and https URLs are read.")
        return _download(url, may_reach)


def _download(url: str, may_reach: MayReach | None = None) -> bytes:
    """Read a URL within the limits of time, bytes and redirects.

    The work happens in a thread of its own, so that the time limit holds while a server sends one byte a second.
    """
    result: dict[str, Any] = {}
    deadline = time.monotonic() + MAX_SECONDS

    def work() -> None:
        try:
            result["data"] = _read_url(url.strip(), deadline, may_reach)
        except (
            OSError,
            ValueError,
            ImportError,
            PictureError,
        ) as error:  # ImportError: a proxy no client is there for
            result["error"] = error

    thread = threading.Thread(target=work, name="hovle-download", daemon=True)
    thread.start()
    thread.join(MAX_SECONDS)
    error = result.get("error")
    if isinstance(error, PictureError):
        raise error
    if isinstance(error, TimeoutError) or not result:
        raise PictureError(f"the download took longer than {MAX_SECONDS:g} seconds.")
    if error is not None:
        raise PictureError(f"the download failed ({_reason(error)}).") from error
    return result["data"]


def _read_url(url: str, deadline: float, may_reach: MayReach | None) -> bytes:
    # It comes with huggingface_hub: since its version 2 as httpx2. Only here, as importing it takes time.
    httpx = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")
    headers = {"User-Agent": "hovle (python-httpx)", "Accept": "image/*", "Accept-Encoding": "identity"}
    try:
        with httpx.Client(headers=headers) as client:
            place = httpx.URL(url)
            for _ in range(MAX_REDIRECTS + 1):  # by hand: the client would read all of each redirect's own body
                if place.scheme not in ("http", "https"):
                    raise PictureError(f"the server redirects to {place}; only http and https are followed.")
                request = _request_to(client, place, may_reach)
                seconds = max(deadline - time.monotonic(), 0.01)
                request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)
                with contextlib.closing(client.send(request, stream=True)) as response:
                    if not response.has_redirect_location:
                        return _read_limited(response, deadline)
                    place = place.join(response.headers["Location"])
    except httpx.TimeoutException as error:
        raise TimeoutError from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OSError(_reason(error)) from error
    raise PictureError(f"more than {MAX_REDIRECTS} redirects.")


def _request_to(client: Any, place: Any, may_reach: MayReach | None) -> Any:
    """Ask for a URL; where it matters which address that is, at the very address that was looked at."""
    if may_reach is None:
        return client.build_request("GET", place)
    host = place.raw_host.decode("ascii")
    port = place.port or (443 if place.scheme == "https" else 80)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if not all(may_reach(host, address) for address in addresses):
        raise PictureError(f"pictures are not fetched from {host}: its address is not a public one.")
    address = min(addresses, key=lambda address: address.version)  # IPv4 first: IPv6 often leads nowhere
    return client.build_request(
        "GET",
        place.copy_with(host=str(address)),
        headers={"Host": place.netloc.decode("ascii")},
        extensions={"sni_hostname": host},
    )


def _read_limited(response: Any, deadline: float) -> bytes:
    if response.status_code != 200:
        known = {status.value: f" {status.phrase}" for status in http.HTTPStatus}  # not in the server's own words
        raise PictureError(f"the server answered {response.status_code}{known.get(response.status_code, '')}.")
    too_large = f"the download is larger than the limit of {_mebibytes(MAX_BYTES)}."
    if int(response.headers.get("Content-Length") or 0) > MAX_BYTES:
        raise PictureError(too_large)
    data = bytearray()
    for chunk in response.iter_raw():
        data += chunk
        if len(data) > MAX_BYTES:
            raise PictureError(too_large)
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(data)


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:g} MiB"


# --- decoding --------------------------------------------------------------------------------------------------------


def _known_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _open_image(file: io.BytesIO | str | os.PathLike) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's size warning (our limit follows) and remarks on odd metadata
        try:
            return Image.open(file, formats=_known_formats())
        except UnidentifiedImageError:
            if isinstance(file, io.BytesIO):
                beginning = file.getvalue()[:BEGINNING]
            else:
                with open(file, "rb") as opened:
                    beginning = opened.read(BEGINNING)
            kind = document_kind(beginning)
            if kind == HEIC:
                if register_opener():
                    return _open_image(file)
                kind = f"{HEIC}, {heic_advice()}"
            if kind:
                raise PictureError(f"is {kind}.") from None
            raise


class PictureFile:
    """A picture file, opened; its pixels are decoded when they are asked for, so ask once.

    Args:
        data: All bytes of the file.
    """

    def __init__(self, data: bytes):
        if not data:
            raise PictureError("is empty (0 bytes).")
        self.data = data
        self.primaries, self.transfer = UNKNOWN, UNKNOWN
        png = examine_png(data) if data.startswith(PNG_SIGNATURE) else None
        with refusing_truncated_files():
            self.image = _open_image(io.BytesIO(png.data if png else data))
        if png:
            self.primaries, self.transfer = png.primaries, png.transfer
            if png.profile:
                self.image.info["icc_profile"] = png.profile
        if self.image.format == "HEIF":
            self.primaries, self.transfer = heic_colour_codes(self.image, UNKNOWN)
        if self.image.format == "AVIF":
            self.primaries, self.transfer = _avif_codes(data)

    def picture(self) -> Image.Image:
        """Upright RGB, as `load_picture` gives it."""
        with self._strictly():
            return self._upright(self._decode())

    def pixels(self) -> np.ndarray:
        """The same as an array, shape `(H, W, 3)`, uint8."""
        with self._strictly():
            decoded = self._decode()
            if self.is_plain and isinstance(decoded, np.ndarray):
                return decoded if decoded.shape[-1] == 3 else decoded.repeat(3, axis=-1)
            return np.array(self._upright(decoded))

    @property
    def is_plain(self) -> bool:
        """Whether the file is of the commonest kind: a JPEG that is nothing but upright colour or grey."""
        image = self.image
        has_profile = bool(image.info.get("icc_profile"))
        return image.format == "JPEG" and image.mode in ("RGB", "L") and not has_profile and orientation_of(image) == 1

    @contextlib.contextmanager
    def _strictly(self) -> Iterator[None]:
        with refusing_truncated_files(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    def _decode(self) -> Image.Image | np.ndarray:
        return checked(_check_size(self.image), self.data)

    def _upright(self, decoded: Image.Image | np.ndarray) -> Image.Image:
        if isinstance(decoded, np.ndarray):
            decoded = Image.fromarray(decoded.squeeze(-1) if decoded.shape[-1] == 1 else decoded)
            decoded.info = self.image.info
        return to_upright_rgb(_without_gaps(decoded, self.data), self.primaries, self.transfer)


def _without_gaps(image: Image.Image, data: bytes) -> Image.Image:
    """Replace what a file does not say about transparency, where Pillow guesses."""
    if image.format in ("TGA", "BMP", "DIB") and image.mode in ("RGBA", "LA"):
        has_no_alpha = image.format == "TGA" and not data[17] & 15  # bits of alpha, by the header
        if has_no_alpha or not image.getchannel("A").getextrema()[1]:  # or all is clear: the byte is not used
            return image.convert(image.mode.removesuffix("A"))
    if image.format == "GIF" and image.tile and image.tile[0][1] != (0, 0, *image.size):  # type: ignore[attr-defined]
        return _on_white_canvas(image, image.tile[0][1])  # type: ignore[attr-defined]
    return image


def _on_white_canvas(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """A picture of which only a part is drawn; Pillow fills the rest with some colour, browsers leave it clear."""
    canvas = Image.new("RGB", image.size, "white")
    canvas.info = {name: value for name, value in image.info.items() if name != "transparency"}
    part = image.crop(box)
    canvas.paste(part.convert("RGB"), box, part.convert("RGBA"))
    return canvas


def _avif_codes(data: bytes) -> tuple[int, int]:
    """The numbers of primaries and transfer function that an AVIF file names in its box `colr`; Pillow does not."""
    start = data.find(b"colrnclx")
    if start < 0:
        return UNKNOWN, UNKNOWN
    return int.from_bytes(data[start + 8 : start + 10]), int.from_bytes(data[start + 10 : start + 12])


def _check_size(image: Image.Image) -> Image.Image:
    width, height = image.size
    if width <= 0 or height <= 0:
        raise PictureError(f"has no pixels ({width} x {height}).")
    if width * height > MAX_PIXELS:
        raise PictureError(
            f"{width} x {height} is {width * height / 1e6:.0f} megapixels; the limit is {MAX_PIXELS / 1e6:.0f}."
        )
    return image


# --- arrays ----------------------------------------------------------------------------------------------------------


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    """Turn an array into a Pillow image with 8 bits per channel."""
    channels_first = isinstance(array, torch.Tensor)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    array = _channels_last(array, channels_first)
    return Image.fromarray(np.ascontiguousarray(_to_uint8(array)))


def _channels_last(array: np.ndarray, prefer_first: bool) -> np.ndarray:
    """Find the channel axis: `(H, W)` or `(H, W, C)` of 3 or 4 channels comes out."""
    shape = array.shape
    if array.ndim == 3:
        order = (0, -1) if prefer_first else (-1, 0)
        axis = next((axis for axis in order if shape[axis] in (1, 3, 4)), None)
        if axis is not None:
            array = np.moveaxis(array, axis, -1)
            return array[..., 0] if array.shape[-1] == 1 else array
    if array.ndim != 2:
        raise PictureError(f"a picture array must be (H, W), (H, W, C) or (C, H, W) with C 1, 3 or 4, got {shape}.")
    return array


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.size == 0:
        raise PictureError(f"has no pixels (array of shape {array.shape}).")
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # in either byte order
        return scaled_to_uint8(array, 65535)
    if array.dtype.kind not in "iuf":
        raise PictureError(f"arrays of {array.dtype} are not pictures.")
    low, high = array.min(), array.max()
    if array.dtype.kind in "iu":
        if low < 0 or high > 255:
            raise PictureError(f"whole-number arrays must lie in 0..255 (uint16: 0..65535), found {low}..{high}.")
        if high == 1:
            raise PictureError(f"an array of {array.dtype} with values 0 and 1 would be black. Make it bool or float.")
        return array.astype(np.uint8)
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # resizing overshoots a little; not-a-number fails here too
        raise PictureError(
            f"float arrays must lie in 0..1, found {low:.4g}..{high:.4g}. Divide by 255, or undo the normalisation."
        )
    return scaled_to_uint8(array, 1)
