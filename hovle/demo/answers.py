"""What a model said of pictures, for people: in words, and drawn."""

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import printable
from ..model.pictures import load_picture

RIGHT, WRONG = "#1a7f37", "#cf222e"
"""Colors of answers."""

LONGEST, LONGEST_DRAWN = 80, 56
"""Characters shown of an answer, in print and below a picture: a model that has learnt nothing talks on and on."""


@dataclass(frozen=True)
class Answer:
    """One answer to one question about one picture."""

    picture: Any
    """As `load_picture` reads it."""
    question: str
    text: str
    """What the model said."""
    expected: str
    is_right: bool

    @property
    def said(self) -> str:
        """The answer on one line, without what moves a terminal's cursor."""
        return textwrap.shorten(printable(self.text), LONGEST, placeholder=" ...") or "(nothing)"

    @property
    def mark(self) -> str:
        """Whether it is right, and what else is."""
        return "right" if self.is_right else f"wrong, it is {self.expected}"


def draw_answers(pyplot, path: Path, answers: Sequence[Answer], title: str, columns: int = 6) -> None:
    """Draw pictures, questions and answers, right ones green and wrong ones red.

    Args:
        pyplot: What `load_pyplot` gives.
        path: File to write.
        answers: In reading order.
        title: Above all pictures.
        columns: Pictures in a row.
    """
    rows = -(-len(answers) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(2.3 * columns, 3 * rows + 0.5), squeeze=False)
    for axis, answer in zip(axes.flat, answers, strict=False):
        color = RIGHT if answer.is_right else WRONG
        axis.imshow(load_picture(answer.picture))
        said = textwrap.shorten(answer.said, LONGEST_DRAWN, placeholder=" ...")
        verdict = said if answer.is_right else f"{said}\n(is: {answer.expected})"
        # Not left to matplotlib: it wraps by the figure's width, and reads what stands between dollars as formulas.
        axis.set_title(textwrap.fill(answer.question, 36), fontsize=8, parse_math=False)
        lines = "\n".join(textwrap.fill(line, 30) for line in verdict.splitlines())
        axis.set_xlabel(lines, fontsize=9, color=color, weight="bold", parse_math=False)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_color(color)
    for axis in axes.flat[len(answers) :]:
        axis.set_axis_off()
    figure.suptitle(title, fontsize=12)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # what the font lacks is drawn as a box
        figure.tight_layout()
        figure.savefig(path, dpi=110)
    pyplot.close(figure)
