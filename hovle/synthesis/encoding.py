"""Pictures as bytes of files."""

import io

from PIL import Image


def to_png(image: Image.Image) -> bytes:
    """The file of a picture, exact: for drawings."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def to_jpeg(image: Image.Image, quality: int) -> bytes:
    """The file of a picture, smaller: for what has noise or looks like a photograph."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()
