"""Pictures that are no files: what `load_picture` asks of Pillow's images and of the items of `datasets`."""

import os
from typing import Any, Literal

from PIL import Image

from .pictures_colour import PictureError


def is_closed(image: Image.Image) -> bool:
    """Whether nothing can be read from a Pillow image any more, as it or its file was closed."""
    is_lazy = bool(getattr(image, "tile", None))
    file = getattr(image, "fp", None)
    if is_lazy:
        return file is None or getattr(file, "closed", False)
    try:
        image.getpixel((0, 0))
    except (ValueError, AttributeError):  # "Operation on closed image"
        return True
    return False


def undecoded(item: dict) -> tuple[Any, Literal["path"] | None]:
    """The bytes, else the path, of a picture that `datasets` has not decoded, and how to read it."""
    if isinstance(item.get("bytes"), bytes | bytearray | memoryview):
        return item["bytes"], None
    if item.get("bytes") is None and isinstance(item.get("path"), str | os.PathLike):
        return item["path"], "path"
    raise PictureError(
        'a dictionary must be {"bytes": bytes, "path": path or None}, as datasets gives it, with bytes or a path; '
        f"got the keys {', '.join(map(repr, item)) or 'none'}."
    )
