"""Charts and tables: largest, smallest, value of, how many, trend, title; tested on another drawing tool."""

import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from PIL import Image

from .. import chart_drawing, chart_vega
from ..chart_data import ChartData, Form, TableData, draw_chart_data, draw_table_data
from ..chart_questions import ask_chart, ask_table, caption_chart, caption_table
from ..encoding import to_png
from ..layouts import Size
from ..samples import Region, Sample
from ..skill import Skill

FORMS: Mapping[Form | Literal["table"], float] = MappingProxyType(
    {"bar": 0.28, "horizontal bar": 0.2, "line": 0.2, "pie": 0.14, "table": 0.18}
)
"""How often a picture is of each form."""

_SIZES = ((224, 224), (336, 224), (336, 336))
_MOST_QUESTIONS = 6


class Charts(Skill):
    """Bar, line and pie charts, and tables."""

    name = "charts"
    description = "bar, line and pie charts and tables: largest, smallest, value of, how many, trend, title"
    revision = 2
    sizes = MappingProxyType(
        {
            "small": MappingProxyType({"train": 400, "validation": 40, "test": 100}),
            "full": MappingProxyType({"train": 12_000, "validation": 400, "test": 1_000}),
        }
    )
    held_out = ("tool", "label", "measure")
    sources = ()
    extras = MappingProxyType({"matplotlib": "hovle[smol]", "vl_convert": "hovle[smol]"})

    def draw(self, index: int, split: str, seed: int) -> Sample:
        """Draw a chart or a table: by matplotlib to learn from, by Vega to be tested on."""
        rng = self.rng(index, split, seed)
        form = rng.choices(tuple(FORMS), tuple(FORMS.values()))[0]
        data: ChartData | TableData
        while True:  # words that do not fit are drawn again
            size = rng.choice(_SIZES)
            data = draw_table_data(split, rng) if form == "table" else draw_chart_data(form, split, rng)
            drawn = _draw(data, size, split, rng)
            if drawn is not None:
                break
        image, regions = drawn
        count = rng.randint(3, _MOST_QUESTIONS)
        if isinstance(data, TableData):
            questions = [*ask_table(data, count, rng), caption_table(data, rng)]
            measures = data.columns
        else:
            questions = [*ask_chart(data, count, rng), caption_chart(data, rng)]
            measures = (data.measure,)
        source_ids = [f"label:{label}" for label in data.labels] + [f"measure:{measure}" for measure in measures]
        source_ids.append("tool:vega" if split == "test" else "tool:matplotlib")
        facets = {"form": form}
        return Sample(to_png(image), size, tuple(questions), regions, tuple(sorted(source_ids)), facets)


def _draw(
    data: ChartData | TableData, size: Size, split: str, rng: random.Random
) -> tuple[Image.Image, tuple[Region, ...]] | None:
    if isinstance(data, TableData):
        return (
            (chart_vega.draw_table(data, size, rng), ())
            if split == "test"
            else chart_drawing.draw_table(data, size, rng)
        )
    return (
        (chart_vega.draw_chart(data, size, rng), ()) if split == "test" else chart_drawing.draw_chart(data, size, rng)
    )
