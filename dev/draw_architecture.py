"""Draw the README's architecture picture: `python dev/draw_architecture.py` writes dev/architecture.png."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch, Rectangle

PICTURE, TEXT, HOLISTIC, LANGUAGE, INK = "#f2b35e", "#8fb8de", "#9fd3a8", "#c9c3e6", "#222222"


def box(axis, x: float, y: float, width: float, height: float, colour: str, text: str, size: float = 11) -> None:
    """Draw a rounded box with centred text."""
    style = "round,pad=0.02,rounding_size=0.12"
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor=INK, lw=1.2))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(axis, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow between two points."""
    axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.3})


def tokens(axis, x: float, y: float, colours: list[str]) -> float:
    """Draw a row of tokens; return where it ends."""
    for colour in colours:
        axis.add_patch(Rectangle((x, y), 0.26, 0.34, facecolor=colour, edgecolor=INK, lw=0.8))
        x += 0.3
    return x


def draw(path: Path) -> None:
    """Draw tiles and words below, one decoder above, the two HoVLE variants' shuffle beside it."""
    figure, axis = pyplot.subplots(figsize=(10.5, 6.6))
    axis.set_xlim(0, 12.2)
    axis.set_ylim(0, 8.0)
    axis.set_axis_off()
    for row in range(2):
        for column in range(3):
            axis.add_patch(Rectangle((0.3 + column * 0.5, 0.35 + row * 0.5), 0.46, 0.46, fc=PICTURE, ec=INK, lw=1))
    axis.add_patch(Rectangle((2.0, 0.35), 0.62, 0.62, fc=PICTURE, ec=INK, lw=1))
    axis.text(1.02, 1.5, "tiles, row by row", ha="center", fontsize=9.5)
    axis.text(2.31, 0.12, "thumbnail", ha="center", fontsize=8.5)
    box(axis, 0.3, 2.0, 2.7, 0.95, PICTURE, "patch stem\nconv + position\n+ pixel shuffle, MLP", 9.5)
    arrow(axis, (1.3, 1.72), (1.3, 1.98))
    axis.text(6.0, 0.75, "“What is in this picture?”", ha="center", fontsize=11, style="italic")
    box(axis, 4.2, 2.0, 3.6, 0.95, TEXT, "text table", 11)
    arrow(axis, (6.0, 1.0), (6.0, 1.98))
    arrow(axis, (1.65, 2.97), (1.65, 3.42))
    arrow(axis, (6.0, 2.97), (6.0, 3.42))
    row = [TEXT] * 3 + [PICTURE] * 12 + [TEXT] * 10
    tokens(axis, 0.3, 3.48, row)
    axis.text(8.0, 3.64, "one causal sequence", fontsize=10, va="center")
    box(axis, 0.3, 4.15, 7.5, 1.05, HOLISTIC, "holistic embedding: N layers of the LLM's own kind", 12)
    box(axis, 0.3, 5.28, 7.5, 1.35, LANGUAGE, "language model: its M layers, norm and head", 12)
    arrow(axis, (4.05, 6.65), (4.05, 7.1))
    axis.text(4.05, 7.3, "next token", ha="center", fontsize=11)
    axis.plot([7.95, 8.1, 8.1, 7.95], [4.15, 4.15, 6.63, 6.63], color=INK, lw=1.2)
    axis.text(
        8.25,
        5.4,
        "one stock decoder of N + M layers:\nwhatever runs the LLM runs HoVLE\n\n"
        "no vision encoder, no norm between\nthe two parts, one KV cache",
        fontsize=10,
        va="center",
    )
    axis.text(
        8.25,
        2.5,
        "HoVLE-HD: the shuffle and MLP move\nabove the holistic layers, which then\n"
        "see four patches per picture token",
        fontsize=9.5,
        va="center",
        color="#555555",
    )
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    draw(Path(__file__).with_name("architecture.png"))
