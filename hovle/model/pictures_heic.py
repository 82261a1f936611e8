"""Pictures as phones take them: Pillow reads HEIC through pillow-heif, an extra, or whatever opener is registered."""

import importlib
import importlib.util

from PIL import Image

FORMAT = "HEIF"
"""Pillow's name of the format, whoever registers its opener."""


def register_opener() -> bool:
    """Register pillow-heif where it is installed and no opener is there yet; whether there is a new one."""
    if FORMAT in Image.OPEN or importlib.util.find_spec("pillow_heif") is None:
        return False
    importlib.import_module("pillow_heif").register_heif_opener()
    return True


def advice() -> str:
    """What to do with an HEIC file that could not be opened."""
    if FORMAT in Image.OPEN:
        return "it is damaged, or of a kind that the installed opener does not read"
    return "or let it be read: pip install 'hovle[heic]'"


def colour_codes(image: Image.Image, unknown: int) -> tuple[int, int]:
    """The numbers of primaries and transfer function that the file names, by ITU-T H.273."""
    named = image.info.get("nclx_profile") or {}
    return named.get("color_primaries", unknown), named.get("transfer_characteristics", unknown)
