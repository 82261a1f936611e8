"""What pictures of analyses share: colours, text that a font can draw, captions."""

import functools
import textwrap

COLORS = ("#0969da", "#bc4c00")
"""Of the first and the second model."""

GRAY = "#59636e"

FONT_SIZE = 9


def drawable(text: str, length: int) -> str:
    """Make a token's text fit for a chart: cut to a length, without mathematics, without missing characters.

    Args:
        text: Any string.
        length: Most characters; a longer text ends in an ellipsis.

    Returns:
        The text; a character the chart's font lacks is written as its code point, a space as an open box.
    """
    text = text.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "\u2423")
    if len(text) > length:
        text = text[: length - 1] + "\u2026"
    return _plain(text)


def _plain(text: str) -> str:
    """Text without mathematics and without characters the font lacks."""
    characters = [character if _has_glyph(character) else f"U+{ord(character):04X}" for character in text]
    return "".join(characters).replace("$", r"\$")


@functools.cache
def _has_glyph(character: str) -> bool:
    from matplotlib import font_manager  # an extra: only charts need it

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return character.isprintable() and font.get_char_index(ord(character)) != 0


def layer_ticks(num_holistic: int, num_language: int) -> dict[str, int]:
    """Names of layers -> where they stand: the language model's from 1, the holistic ones before."""
    holistic = {f"H{number}": number - num_holistic for number in {1, num_holistic} if num_holistic}
    step = next(step for step in (1, 2, 5, 10, 20, 50) if num_language / step <= 8 or step == 50)
    numbers = list(range(step, num_language + 1, step))
    if num_holistic == 0 and step > 1:
        numbers = [1, *numbers]
    return {**holistic, **{str(number): number for number in numbers}}


def add_caption(figure, text: str, width: int) -> None:
    """Write a caption below a figure, broken into lines of at most so many characters."""
    lines = textwrap.wrap(text, width)
    figure.text(
        0.01,
        -0.01,
        "\n".join(map(_plain, lines)),
        ha="left",
        va="top",
        fontsize=FONT_SIZE - 1,
        color=GRAY,
        wrap=False,
    )


def save(pyplot, figure, path) -> None:
    """Write a figure with all that stands around it, and forget it."""
    try:
        figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.15)
    finally:
        pyplot.close(figure)
