"""Charts and tables drawn by matplotlib, with the places of their texts."""

import random
from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .chart_data import ChartData, TableData
from .colors import NAMED_COLORS, Rgb, distance, vary
from .layouts import Size
from .samples import Region

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.table import Table
    from matplotlib.text import Text

Drawn = tuple[Image.Image, tuple[Region, ...]]

DPI = 100

FAMILIES = ("DejaVu Sans", "DejaVu Sans", "DejaVu Serif", "DejaVu Sans Mono", "STIXGeneral")
"""Typefaces that matplotlib brings."""

_SMALLEST_POINTS, _LARGEST_POINTS = 7.5, 10.0
"""Of letters: at 100 dots an inch 10 to 14 pixels."""

_SLANTS = (0, 35, 90)
"""Degrees by which labels of a lower axis are turned, until they fit."""

_MARKERS = MappingProxyType({"circle": "o", "square": "s", "diamond": "D", "none": None})


def draw_chart(data: ChartData, size: Size, rng: random.Random) -> Drawn | None:
    """Draw a chart in one of many looks.

    Args:
        data: What it shows.
        size: Width and height in pixels.
        rng: Draws the looks.

    Returns:
        The picture, and the places of title, labels and written values. None when its texts do not fit the size."""
    state = rng.getstate()
    for slant in _SLANTS:
        rng.setstate(state)  # the same looks
        figure, _axes, texts = _figure(data, size, slant, rng)
        image = _rendered(figure)
        if _fits(figure, texts):
            return image, _regions(figure, texts)
    return None


def _figure(data: ChartData, size: Size, slant: int, rng: random.Random) -> "tuple[Figure, Axes, list[Text]]":
    from matplotlib.figure import Figure

    paper, ink = _paper_and_ink(rng)
    points = rng.uniform(_SMALLEST_POINTS, _LARGEST_POINTS)
    font: dict[str, Any] = {"family": rng.choice(FAMILIES), "size": points, "color": _unit(ink)}
    figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI, facecolor=_unit(paper), layout="constrained")
    axes = figure.add_subplot(facecolor=_unit(paper))
    colors = _fills(data, paper, rng)
    texts = [axes.set_title(data.title, **{**font, "size": points * 1.15}, weight=rng.choice(("normal", "bold")))]
    if data.form == "pie":
        texts += _draw_pie(axes, data, colors, font, rng)
    else:
        texts += _draw_on_axes(axes, data, colors, font, slant, rng)
        _dress(axes, ink, rng)
    return figure, axes, texts


def _paper_and_ink(rng: random.Random) -> tuple[Rgb, Rgb]:
    if rng.random() < 0.55:
        return (255, 255, 255), (0, 0, 0)
    dark = rng.random() < 0.25
    low, high = (10, 60) if dark else (215, 255)
    paper = (rng.randint(low, high), rng.randint(low, high), rng.randint(low, high))
    return paper, (235, 235, 235) if dark else (25, 25, 35)


def _fills(data: ChartData, paper: Rgb, rng: random.Random) -> list[Rgb]:
    """A color for each label: its named one, or the same one for all."""
    if data.colors:
        return [vary(color, rng) for color in data.colors]
    while True:
        color = (rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255))
        if distance(color, paper) >= 35:
            return [color] * len(data.labels)


def _draw_pie(axes: "Axes", data: ChartData, colors: Sequence[Rgb], font: dict, rng: random.Random) -> "list[Text]":
    edge = {"edgecolor": "white", "linewidth": 1}
    has_legend = rng.random() < 0.25
    wedges, *texts = axes.pie(
        data.values,
        labels=None if has_legend else data.labels,
        colors=[_unit(color) for color in colors],
        startangle=rng.choice((0, 90, rng.uniform(0, 360))),
        counterclock=rng.random() < 0.5,
        autopct="%d%%" if data.writes_values else None,
        pctdistance=0.65,
        textprops=font,
        wedgeprops={**edge, "width": rng.choice((1, 1, 0.6))},
    )
    if data.writes_values:
        for text, color in zip(texts[1], colors, strict=True):
            text.set_color("black" if distance(color, (0, 0, 0)) > 55 else "white")
    if not has_legend:
        return [text for part in texts for text in part]
    legend = axes.legend(
        wedges, data.labels, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2, frameon=False,
        prop={"family": font["family"], "size": font["size"]}, labelcolor=font["color"],
    )  # fmt: skip
    return [*legend.get_texts(), *(texts[1] if data.writes_values else [])]


def _draw_on_axes(
    axes: "Axes", data: ChartData, colors: Sequence[Rgb], font: dict, slant: int, rng: random.Random
) -> "list[Text]":
    places = np.arange(len(data.labels))
    fill = [_unit(color) for color in colors]
    ticks = np.arange(0, data.top + 1, data.tick)
    is_lying = data.form == "horizontal bar"
    width = rng.uniform(0.5, 0.85)
    if data.form == "line":
        marker = _MARKERS[rng.choice(("circle", "square", "diamond", "circle", "none"))]
        axes.plot(places, data.values, color=fill[0], marker=marker, linewidth=rng.uniform(1.2, 3), markersize=5)
        axes.set_xlim(-0.4, len(places) - 0.6)
    elif is_lying:
        axes.barh(places, data.values, height=width, color=fill)
        axes.invert_yaxis()
    else:
        axes.bar(places, data.values, width=width, color=fill)
    label_axis, value_axis = (axes.yaxis, axes.xaxis) if is_lying else (axes.xaxis, axes.yaxis)
    turn = {} if is_lying else _turn(slant)
    label_axis.set_ticks(places, data.labels, **font, **turn)
    value_axis.set_ticks(ticks, [str(tick) for tick in ticks], **font)
    set_limit = axes.set_xlim if is_lying else axes.set_ylim
    set_limit(0, data.top * (1.08 if data.writes_values else 1.0))
    if rng.random() < 0.5:
        value_axis.set_label_text(data.measure, **font)
    if rng.random() < 0.6:
        value_axis.grid(True, color=font["color"], alpha=0.25, linewidth=0.7)
        axes.set_axisbelow(True)
    written = _write_values(axes, data, font, is_lying) if data.writes_values else []
    return [*label_axis.get_ticklabels(), *value_axis.get_ticklabels(), *written]


def _turn(slant: int) -> dict[str, Any]:
    """How labels below an axis are turned: a slanted one ends at its tick."""
    is_slanted = 0 < slant < 90
    anchor = {"ha": "right", "rotation_mode": "anchor"} if is_slanted else {"ha": "center", "rotation_mode": "default"}
    return {"rotation": slant, **anchor}


def _write_values(axes: "Axes", data: ChartData, font: dict, is_lying: bool) -> "list[Text]":
    texts: list[Text] = []
    for place, value in enumerate(data.values):
        at, off = ((value, place), (2, 0)) if is_lying else ((place, value), (0, 3 if data.form == "line" else 1))
        align: dict[str, Any] = {"ha": "left", "va": "center"} if is_lying else {"ha": "center", "va": "bottom"}
        texts.append(axes.annotate(str(value), at, off, textcoords="offset points", **align, **font))
    return texts


def _dress(axes: "Axes", ink: Rgb, rng: random.Random) -> None:
    axes.tick_params(colors=_unit(ink), length=rng.choice((0, 3)))
    for name, spine in axes.spines.items():
        spine.set_color(_unit(ink))
        if name in ("top", "right"):
            spine.set_visible(rng.random() < 0.4)


def draw_table(data: TableData, size: Size, rng: random.Random) -> Drawn | None:
    """Draw a table in one of many looks.

    Args:
        data: What it says.
        size: Width and height in pixels.
        rng: Draws the looks.

    Returns:
        The picture, and the places of all its texts. None when its texts do not fit the size."""
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    paper, ink = _paper_and_ink(rng)
    font: dict[str, Any] = {
        "family": rng.choice(FAMILIES),
        "size": rng.uniform(_SMALLEST_POINTS + 0.5, _LARGEST_POINTS),
        "color": _unit(ink),
    }
    figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI, facecolor=_unit(paper))
    axes = figure.add_axes((0.03, 0.03, 0.94, 0.82 if data.title else 0.94))
    axes.set_axis_off()
    texts = [axes.set_title(data.title, **{**font, "size": font["size"] * 1.15})] if data.title else []
    lines = [[label, *map(str, cells)] for label, cells in zip(data.labels, data.cells, strict=True)]
    height = min(1, 0.16 * (len(lines) + 1))
    table = axes.table(
        [[data.group.capitalize(), *data.columns], *lines],
        loc="upper center",
        cellLoc=rng.choice(("center", "left", "right")),
        edges=rng.choice(("closed", "horizontal", "open", "closed")),
        bbox=Bbox.from_bounds(0, 1 - height, 1, height),
    )
    table.auto_set_font_size(False)
    texts += _dress_cells(table, font, paper, ink, rng)
    image = _rendered(figure)
    return (image, _regions(figure, texts)) if _fits(figure, texts) else None


def _dress_cells(table: "Table", font: dict[str, Any], paper: Rgb, ink: Rgb, rng: random.Random) -> "list[Text]":
    """Give cells their colors, perhaps in bands below a colored header; their texts."""
    header = vary(rng.choice(sorted(NAMED_COLORS)), rng) if rng.random() < 0.4 else paper
    red, green, blue = paper
    band = (round(0.9 * red + 12), round(0.9 * green + 12), round(0.9 * blue + 12)) if rng.random() < 0.3 else paper
    texts = []
    for (row, _), cell in table.get_celld().items():
        shade = header if row == 0 else band if row % 2 else paper
        cell.set(facecolor=_unit(shade), edgecolor=_unit(ink), linewidth=0.7)
        text = cell.get_text()
        color = "black" if distance(shade, (0, 0, 0)) > 50 else "white"
        text.set(family=font["family"], size=font["size"], color=color, fontweight="bold" if row == 0 else "normal")
        texts.append(text)
    return texts


def _unit(color: Rgb) -> tuple[float, float, float]:
    red, green, blue = color
    return red / 255, green / 255, blue / 255


def _rendered(figure: "Figure") -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _box(figure: "Figure", text: "Text") -> tuple[float, float, float, float]:
    """Left, top, right, bottom in pixels from the upper left corner."""
    extent = text.get_window_extent()
    height = figure.bbox.height
    return extent.x0, height - extent.y1, extent.x1, height - extent.y0


def _fits(figure: "Figure", texts: "Iterable[Text]") -> bool:
    """Whether all texts lie within the picture and none over another."""
    width, height = figure.bbox.width, figure.bbox.height
    upright = [text for text in texts if text.get_text()]
    boxes = [_box(figure, text) for text in upright]
    if any(left < 0 or top < 0 or right > width or bottom > height for left, top, right, bottom in boxes):
        return False
    slanted = [text.get_rotation() % 90 != 0 for text in upright]
    return not any(
        _overlap(boxes[a], boxes[b]) for b in range(len(boxes)) for a in range(b) if not (slanted[a] and slanted[b])
    )


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _regions(figure: "Figure", texts: "Iterable[Text]") -> tuple[Region, ...]:
    """Places of the texts that are not turned, so that a box holds them closely."""
    found: list[Any] = []
    for text in texts:
        if text.get_text() and text.get_rotation() == 0:
            left, top, right, bottom = _box(figure, text)
            box = (int(left), int(top), int(np.ceil(right)), int(np.ceil(bottom)))
            found.append(Region(box, text.get_text()))
    return tuple(found)
