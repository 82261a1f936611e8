"""The same charts and tables drawn by Vega-Lite, which no training picture is made with."""

import io
import json
import random
from collections.abc import Sequence
from typing import Any, Literal

from PIL import Image

from .chart_data import ChartData, TableData
from .colors import Rgb, vary
from .layouts import Size

Theme = Literal["latimes", "fivethirtyeight", "vox", "quartz", "ggplot2", "googlecharts", "excel"]

THEMES: tuple[Theme | None, ...] = (
    None,
    "latimes",
    "fivethirtyeight",
    "vox",
    "quartz",
    "ggplot2",
    "googlecharts",
    "excel",
)
"""Looks that Vega brings."""

FONT = "Liberation Sans"
"""The one typeface that the renderer brings; text in another vanishes where the machine has it not."""


def draw_chart(data: ChartData, size: Size, rng: random.Random) -> Image.Image:
    """Draw a chart of these numbers, width and height in pixels."""
    rows = [{"label": label, "value": value} for label, value in zip(data.labels, data.values, strict=True)]
    spec = {
        "title": data.title,
        "data": {"values": rows},
        **(_pie(data, size, rng) if data.form == "pie" else _on_axes(data, rng)),
    }
    return _render(spec, size, rng)


def draw_table(data: TableData, size: Size, rng: random.Random) -> Image.Image:
    """Draw a table of these numbers, width and height in pixels."""
    columns = [data.group.capitalize(), *data.columns]
    lines = [[label, *map(str, cells)] for label, cells in zip(data.labels, data.cells, strict=True)]
    rows = [
        {"row": row, "column": column, "text": text, "is_header": row == 0}
        for row, line in enumerate([columns, *lines])
        for column, text in enumerate(line)
    ]
    place = {
        "x": {"field": "column", "type": "ordinal", "axis": None},
        "y": {"field": "row", "type": "ordinal", "axis": None},
    }
    band = _css(vary(rng.choice(("white", "gray")), rng))
    spec: dict[str, Any] = {
        "data": {"values": rows},
        "encoding": place,
        "layer": [
            {
                "mark": {"type": "rect", "stroke": rng.choice(("#888", "#bbb", "white"))},
                "encoding": {
                    "color": {"condition": {"test": "datum.is_header", "value": "#d8d8d8"}, "value": band}
                    if rng.random() < 0.5
                    else {"value": "white"}
                },
            },
            {
                "mark": {"type": "text", "fontSize": rng.uniform(11, 13), "color": "black"},
                "encoding": {"text": {"field": "text", "type": "nominal"}},
            },
        ],
    }
    if data.title:
        spec["title"] = data.title
    return _render(spec, size, rng, themes=(None,))


def _on_axes(data: ChartData, rng: random.Random) -> dict[str, Any]:
    label_axis: dict[str, Any] = {"labelFontSize": rng.uniform(10, 12), "labelLimit": 200, "labelOverlap": False}
    value_axis = {
        "values": list(range(0, data.top + 1, data.tick)),
        "labelFontSize": rng.uniform(10, 12),
        "format": "d",
    }
    is_lying = data.form == "horizontal bar"
    if not is_lying:
        label_axis["labelAngle"] = rng.choice((-45, -90)) if sum(map(len, data.labels)) > 18 else 0
    labels = {"field": "label", "type": "ordinal", "sort": None, "title": None, "axis": label_axis}
    values = {
        "field": "value",
        "type": "quantitative",
        "title": data.measure if rng.random() < 0.5 else None,
        "scale": {"domain": [0, data.top * (1.08 if data.writes_values else 1)], "nice": False},
        "axis": value_axis,
    }
    x, y = (values, labels) if is_lying else (labels, values)
    color = _color(data, rng)
    mark: dict[str, Any] = {"type": "line", "point": True} if data.form == "line" else {"type": "bar"}
    layers: list[dict[str, Any]] = [{"mark": mark, "encoding": {"color": color}}]
    if data.writes_values:
        offset = {"align": "left", "dx": 3} if is_lying else {"baseline": "bottom", "dy": -3}
        text = {"type": "text", "fontSize": 11, "color": "black", **offset}
        layers.append({"mark": text, "encoding": {"text": {"field": "value"}}})
    return {"encoding": {"x": x, "y": y}, "layer": layers}


def _color(data: ChartData, rng: random.Random) -> dict[str, Any]:
    if not data.colors:
        return {"value": _css(vary(rng.choice(("blue", "teal", "green", "red", "purple", "brown")), rng))}
    shades = [_css(vary(color, rng)) for color in data.colors]
    return {
        "field": "label",
        "type": "nominal",
        "scale": {"domain": list(data.labels), "range": shades},
        "legend": None,
    }


def _pie(data: ChartData, size: Size, rng: random.Random) -> dict[str, Any]:
    color = _color(data, rng)
    outer = 0.5 * min(size) - 46
    inner = rng.choice((0, 0, 22))
    arc: dict[str, Any] = {
        "mark": {"type": "arc", "innerRadius": inner, "outerRadius": outer, "stroke": "white"},
        "encoding": {},
    }
    layers = [arc]
    if data.writes_values:
        layers.append(_around(0.68 * outer, {"value": {"expr": "datum.value + '%'"}}))
    if rng.random() < 0.4:
        color["legend"] = {"title": None, "labelFontSize": 11, "orient": rng.choice(("right", "bottom")), "columns": 2}
        color["legend"] |= {"columns": 1} if color["legend"]["orient"] == "right" else {}
    else:
        layers.append(_around(outer + 16, {"field": "label", "type": "nominal"}))
    theta = {"field": "value", "type": "quantitative", "stack": True, "sort": None}
    order = {"field": "place", "type": "quantitative"}
    arc["encoding"] = {"color": color}
    return {
        "transform": [{"window": [{"op": "row_number", "as": "place"}]}],
        "encoding": {"theta": theta, "order": order},
        "layer": layers,
        "view": {"stroke": None},
    }


def _around(radius: float, text: dict[str, Any]) -> dict[str, Any]:
    return {"mark": {"type": "text", "radius": radius, "fontSize": 11, "color": "black"}, "encoding": {"text": text}}


def _css(color: Rgb) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _render(
    spec: dict[str, Any], size: Size, rng: random.Random, themes: Sequence[Theme | None] = THEMES
) -> Image.Image:
    import vl_convert  # an extra

    width, height = size
    ink = rng.choice(("black", "#222", "#444"))
    text = {"labelFont": FONT, "titleFont": FONT, "labelColor": ink, "titleColor": ink, "titleFontSize": 12}
    whole = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": width,
        "height": height,
        "autosize": {"type": "fit", "contains": "padding"},
        "background": "white",
        "padding": 6,
        "config": {
            "font": FONT,
            "title": {"font": FONT, "fontSize": rng.uniform(12, 14), "color": ink, "offset": 6},
            "axis": text,
            "legend": text,
            "text": {"font": FONT},
        },
        **spec,
    }
    png = vl_convert.vegalite_to_png(json.dumps(whole), theme=rng.choice(themes), ppi=72)
    image = Image.open(io.BytesIO(png)).convert("RGB")
    canvas = Image.new("RGB", size, "white")
    image.thumbnail(size)  # where Vega could not make it fit
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas
