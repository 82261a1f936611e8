"""Vector drawings as pixels."""

import io

from PIL import Image


def rasterize(svg: bytes, extent: int) -> Image.Image:
    """Draw an SVG so that its longer side has so many pixels; what it does not cover stays transparent.

    Args:
        svg: The file. Text in it is not drawn: that would depend on the fonts of the machine.
        extent: Pixels of the longer side.

    Returns:
        Mode RGBA.

    Raises:
        ValueError: When it cannot be drawn.
    """
    import resvg_py  # an extra

    text = svg.decode("utf-8-sig", errors="replace")
    try:
        drawn = resvg_py.svg_to_bytes(svg_string=text, width=extent, skip_system_fonts=True)
    except Exception as error:  # a class of its own for each kind of fault
        raise ValueError(f"A drawing cannot be rasterized ({error}).") from error
    return Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
