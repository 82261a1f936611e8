"""Vector drawings as pixels."""

import io

from PIL import Image

DOTS_PER_INCH = 96
"""What CSS says; without it drawings measured in points have no size."""


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
        drawn = resvg_py.svg_to_bytes(svg_string=text, width=extent, dpi=DOTS_PER_INCH, skip_system_fonts=True)
    except Exception as error:  # a class of its own for each kind of fault
        raise ValueError(f"A drawing cannot be rasterized ({error}).") from error
    image = Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
    if image.height > extent:
        width = max(1, round(image.width * extent / image.height))
        image = image.convert("RGBa").resize((width, extent), Image.Resampling.BOX).convert("RGBA")
    return image
