"""Contact sheets: pictures of a skill with what is asked and said of them, to be looked at."""

import io
import textwrap
import unicodedata
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .samples import Sample

CELL = 236
"""Width of a picture's place in pixels."""

COLUMNS = 5

LINE_HEIGHT, NUM_LINES, LINE_LENGTH = 13, 11, 40
"""Of the captions: pixels, lines under a picture, characters of a line."""

_INK, _PAPER, _FRAME = (30, 30, 30), (255, 255, 255), (230, 40, 200)


def draw_sheet(samples: Sequence[Sample], title: str, num_lines: int = NUM_LINES) -> Image.Image:
    """A sheet of pictures, each with its regions framed and its questions and answers below, in so many lines."""
    heights = [_shown(sample).height for sample in samples]
    rows = [heights[start : start + COLUMNS] for start in range(0, len(heights), COLUMNS)]
    captions = num_lines * LINE_HEIGHT + 10
    sheet = Image.new("RGB", (COLUMNS * CELL + 8, 30 + sum(max(row) + captions for row in rows)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 6), title, fill=_INK, font=ImageFont.load_default(15))
    top = 30
    for number, row in enumerate(rows):
        for column, sample in enumerate(samples[number * COLUMNS : (number + 1) * COLUMNS]):
            left = column * CELL + 8
            sheet.paste(_shown(sample), (left, top))
            caption = "\n".join(caption_lines(sample, num_lines))
            draw.multiline_text(
                (left, top + max(row) + 3), caption, fill=_INK, font=ImageFont.load_default(10), spacing=1
            )
        top += max(row) + captions
    return sheet


def _shown(sample: Sample) -> Image.Image:
    """The picture with frames around its regions, no wider than its place; small ones are not enlarged."""
    image = Image.open(io.BytesIO(sample.image)).convert("RGB")
    scale = min(1.0, (CELL - 8) / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    draw = ImageDraw.Draw(image)
    for region in sample.regions:
        left, top, right, bottom = (side * scale for side in region.box)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=_FRAME)
    return image


def caption_lines(sample: Sample, num_lines: int = NUM_LINES) -> list[str]:
    """Questions and answers in short lines, no more than there is room for."""
    lines = []
    for question in sample.questions:
        pair = _plain(f"{question.text} -> {question.answer}".replace("\n", " / "))
        lines += textwrap.wrap(pair, LINE_LENGTH, subsequent_indent="  ")
    return lines if len(lines) <= num_lines else [*lines[: num_lines - 1], "..."]


def _plain(text: str) -> str:
    """Text without accents: the font of the captions has none."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
