"""Letters: pages full of text, from which the lowest layers learn what characters look like.

A token of a picture with a word on it is seldom one with a letter; here two thirds are. Cut-off words and strings of
arbitrary characters leave little to guess, so that each must be looked at.
"""

import string
from types import MappingProxyType

from PIL import ImageFont

from ..fonts import FontFile
from ..lettering import Block, Lettering
from ..looks import draw_looks
from ..samples import TILE, Question, Sample
from ..words import words_of
from .reading import READ_NOTICE, Reading, Writer, paint, wear

_SMALLEST, _LARGEST = 20, 56
"""Sizes of letters in pixels. Of smaller ones a token of 28 pixels holds parts of two lines, and more characters than
are told of it."""

_MARGIN = 3
_OTHERS = "!?$%&()+-.,:;'\"#*/=@"
_CHARACTERS = string.ascii_letters + string.digits + _OTHERS


class Letters(Reading):
    """Pages full of text."""

    name = "letters"
    description = f"Pages full of words and arbitrary characters, {_SMALLEST} to {_LARGEST} px, for the lowest layers."
    revision = 2
    sizes = MappingProxyType(
        {
            "small": MappingProxyType({"train": 300, "validation": 30, "test": 60}),
            "full": MappingProxyType({"train": 20_000, "validation": 100, "test": 200}),
        }
    )
    held_out = ("font", "word")

    def draw(self, index: int, split: str, seed: int) -> Sample:
        """Draw a page of twelve tiles: what a picture costs beside them, thumbnail and turns, is then a fifth."""
        rng = self.rng(index, split, seed)
        columns, rows = rng.choice(((4, 3), (3, 4)))
        size = (columns * TILE, rows * TILE)
        lettering = None
        while lettering is None:
            font = rng.choice(rng.choice(self.fonts[split]))
            letter_size = rng.randint(_SMALLEST, _LARGEST)
            writer = Writer(self.wordnet, split, rng)
            lettering = self._fill(size, font, font.at(letter_size), writer)
        image = paint(lettering, draw_looks(rng), rng, may_frame=False)
        text = "\n".join(line.text for line in lettering.lines)
        return Sample(
            wear(image, letter_size, rng),
            image.size,
            (Question(rng.choice(READ_NOTICE), text, "read"),),
            tuple(line.region() for line in lettering.lines),
            (f"font:{font.family}", *(f"word:{word}" for word in sorted(writer.drawn))),
            {"font_size": letter_size, "num_words": len(text.split())},
        )

    def _fill(
        self, size: tuple[int, int], font: FontFile, face: ImageFont.FreeTypeFont, writer: Writer
    ) -> Lettering | None:
        """Lines over a whole page; None where the font cannot write them, or they do not fit."""
        rng = writer.rng
        width, height = (extent - 2 * _MARGIN for extent in size)
        spacing = rng.uniform(1.0, 1.35)
        num_lines = max(1, int(height / (spacing * face.size)))
        lines = tuple(filter(None, (self._line(face, width, writer) for _ in range(num_lines))))
        if font.has_capitals_only or rng.random() < 0.2:
            lines = tuple(line.upper() for line in lines)
        block = Block(lines, face, spacing, rng.choice(("left", "left", "center", "right")))
        if not lines or not font.can_write("".join(lines)) or block.width > width or block.height > height:
            return None
        left, top = _MARGIN + rng.randint(0, width - block.width), _MARGIN + rng.randint(0, height - block.height)
        return block.draw(size, left, top).turn_some(rng)

    def _line(self, face: ImageFont.FreeTypeFont, width: int, writer: Writer) -> str:
        """Words and numbers, or arbitrary characters, cut off where the page ends; no word of another part."""
        rng = writer.rng
        is_arbitrary = rng.random() < 0.3
        line = ""
        while face.getlength(line) <= width:
            if is_arbitrary:
                line += rng.choice(_CHARACTERS)
            else:
                line += (" " if line else "") + (writer.number() if rng.random() < 0.2 else writer.word())
        while line and face.getlength(line) > width:
            line = line[:-1]
        line = (line.title() if rng.random() < 0.2 else line).strip()
        known = self.wordnet.held_out if writer.split == "train" else frozenset()
        return line if known.isdisjoint(words_of(line)) else ""
