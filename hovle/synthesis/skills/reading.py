"""Reading: words, numbers and notices in many fonts, sizes, colors and conditions."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ..encoding import to_jpeg, to_png
from ..english import NUMBERS, with_article
from ..fonts import FAMILIES, FontFile, font_files
from ..grounds import draw_ground
from ..lettering import Block, Lettering, letter_crop, letter_page, wrap
from ..looks import Looks, draw_looks
from ..samples import Question, Sample
from ..skill import Skill, fetched
from ..words import WORDNET, WordNet, draw_of_split, words_of

SMALLEST, LARGEST = 12, 64
"""Sizes of letters in pixels."""

_LARGEST_NOTICE = 30

LAYOUTS = MappingProxyType({"crop": 50, "page": 25, "notice": 25})
"""Shares of texts cut out tightly, on a line somewhere on a page, and of notices."""

LEARNT_LAYOUTS = MappingProxyType({"crop": 70, "page": 8, "notice": 22})
"""The same in what is learnt from: a page is up to 13 tiles for a line that a crop shows in four, larger."""

READ = (
    "What does it say?",
    "What is written here?",
    "Read the text.",
    "Read it.",
    "What does the picture say?",
    "What text is in the picture?",
    "Please read this.",
    "Which words are written here?",
)
READ_NOTICE = (
    "What does the notice say?",
    "Read the whole notice.",
    "Read all lines.",
    "What is written here, line by line?",
    "Read the text.",
    "What does it say?",
)
HAS_WORD = (
    'Does it say "{}"?',
    'Is the word "{}" in the picture?',
    'Can you read "{}" here?',
    'Is "{}" written here?',
)
COLOR = (
    "What color are the letters?",
    "What color is the text?",
    "In which color is it written?",
)
GROUND = (
    "What color is the background?",
    "What color is behind the text?",
)
COUNT_WORDS = ("How many words are there?", "How many words does it say?", "Count the words.")
COUNT_LINES = ("How many lines of text are there?", "How many lines does the notice have?")
CAPTION = (
    "Describe the picture in one sentence.",
    "What is in the picture?",
    "Write a short caption.",
    "Give a caption for this picture.",
    "What do you see?",
)
ABSENT = ("dog", "car", "person", "tree", "house", "cat", "flower", "bird", "clock", "chart", "face", "table")
"""What a picture of text never shows."""

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
"""Lines and words are asked for by these; a notice may have more."""

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_FIXED = """
    open closed daily mon fri sat sun street road no only please do not touch the beware of sale now today keep out for
    rent push pull exit room floor call dr and monday tuesday wednesday thursday friday saturday sunday
"""
FIXED_WORDS = frozenset(_FIXED.split())
"""Words of all notices, which therefore test nothing."""


@dataclass(frozen=True)
class Text:
    """What is to be written."""

    lines: tuple[str, ...]
    words: frozenset[str]
    """Those of the vocabulary in it, in small letters; to learn from, all words."""


def draw_number(rng: random.Random, split: str) -> str:
    """A number, price, time, date or share that stands in one part only."""
    makers = (
        lambda: str(rng.randrange(10 ** rng.randint(1, 5))),
        lambda: f"${rng.randrange(200)}.{rng.randrange(100):02d}",
        lambda: f"{rng.randrange(1, 24)}:{rng.randrange(60):02d}",
        lambda: f"{rng.randrange(100)}%",
        lambda: f"{rng.randrange(1, 29)}/{rng.randrange(1, 13)}/{rng.randrange(1950, 2031)}",
        lambda: f"{rng.randrange(100, 1000)}-{rng.randrange(10000):04d}",
        lambda: f"{rng.choice('ABCDEFGHKLMNPRSTUVWXYZ')}{rng.randrange(1, 1000)}",
        lambda: f"{rng.randrange(1, 100)}.{rng.randrange(10)}",
    )
    return draw_of_split(rng.choice(makers), split)


class Writer:
    """Makes texts of one part."""

    def __init__(self, wordnet: WordNet, split: str, rng: random.Random):
        self.wordnet, self.split, self.rng = wordnet, split, rng
        self.drawn: set[str] = set()

    def word(self) -> str:
        word = self.wordnet.draw_word(self.rng, self.split)
        self.drawn.add(word)
        return word

    def number(self) -> str:
        return draw_number(self.rng, self.split)

    def short(self) -> Text:
        """One to three words or numbers on a line."""
        count = self.rng.choice((1, 1, 2, 2, 3))
        parts = [self.number() if self.rng.random() < 0.15 else self.word() for _ in range(count)]
        style = self.rng.random()
        line = " ".join(parts)
        line = line.title() if style < 0.25 else line.upper() if style < 0.4 else line
        return Text((line,), frozenset(self.drawn))

    def sentence(self) -> Text:
        """A sentence, not yet broken into lines."""
        text = self.rng.choice(self.wordnet.sentences[self.split])
        text = text[0].upper() + text[1:] if self.rng.random() < 0.5 else text
        words = words_of(text) if self.split == "train" else frozenset()  # others have words of all parts
        return Text((text,), frozenset(words))

    def notice(self) -> Text:
        """Several lines as on signs, lists and cards."""
        kind = self.rng.choice((self._prices, self._hours, self._warning, self._card))
        lines = kind()
        if self.rng.random() < 0.2:
            lines = [line.upper() for line in lines]
        return Text(tuple(lines), frozenset(self.drawn))

    def _prices(self) -> list[str]:
        return [f"{self.word()} {self._price()}" for _ in range(self.rng.randint(2, 5))]

    def _price(self) -> str:
        return draw_of_split(lambda: f"{self.rng.randrange(30)}.{self.rng.randrange(100):02d}", self.split)

    def _hours(self) -> list[str]:
        first = self.rng.randrange(5)
        days = f"{_DAYS[first]} - {_DAYS[self.rng.randrange(first + 1, 7)]}"
        hours = f"{self._time(6, 12)} - {self._time(13, 23)}"
        return [self.word().title(), *self.rng.choice((["Open daily", hours], [days, hours], ["Open", days, hours]))]

    def _time(self, earliest: int, latest: int) -> str:
        return draw_of_split(lambda: f"{self.rng.randint(earliest, latest)}:{self.rng.randrange(60):02d}", self.split)

    def _warning(self) -> list[str]:
        word = self.word()
        choices: Sequence[list[str]] = (
            ["Please do not", f"touch the {word}"],
            ["Beware of", f"the {word}"],
            ["Keep out", f"{word.title()} only"],
            [f"{word.title()} sale", f"Now {self.number()}"],
            ["For rent", word.title(), f"Call {self.number()}"],
            [f"No {word}", "Exit", f"Floor {self.number()}"],
        )
        return list(self.rng.choice(choices))

    def _card(self) -> list[str]:
        name = f"{self.word().title()} {self.word().title()}"
        street = f"{self.number()} {self.word().title()} {self.rng.choice(('Street', 'Road'))}"
        return [self.rng.choice((f"Dr. {name}", name)), street, *([self.number()] if self.rng.random() < 0.5 else [])]


def paint(lettering: Lettering, looks: Looks, rng: random.Random, may_frame: bool) -> Image.Image:
    """The picture of a text, on a ground that hides nothing of it."""
    image = draw_ground(lettering.size, looks.ground, rng)
    if may_frame and rng.random() < 0.3:
        left, top, right, bottom = lettering.ink.getbbox() or (0, 0, *lettering.size)
        pad = rng.randint(3, 8)
        frame = (max(0, left - pad), max(0, top - pad), min(lettering.size[0], right + pad) - 1)
        box = (*frame, min(lettering.size[1], bottom + pad) - 1)
        ImageDraw.Draw(image).rounded_rectangle(box, rng.choice((0, 0, 4)), outline=looks.ink, width=rng.randint(1, 2))
    image.paste(looks.ink, mask=lettering.ink)
    return image


def wear(image: Image.Image, letter_size: float, rng: random.Random) -> bytes:
    """The file of a picture, some of them blurred, with noise or compressed: none beyond reading.

    Args:
        image: As drawn.
        letter_size: Of its smallest text in pixels.
        rng: Draws what happens to it.
    """
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, min(1.6, 0.035 * letter_size))))
    if rng.random() < 0.25:
        noise = np.random.default_rng(rng.getrandbits(64)).normal(
            0, rng.uniform(3, 14), (image.height, image.width, 3)
        )
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
        return to_jpeg(image, rng.randint(80, 95))
    return to_jpeg(image, rng.randint(55, 95)) if rng.random() < 0.3 else to_png(image)


FONTS = tuple(
    fetched(f"font-{family}", ("test",) if split == "test" else ("train", "validation"))
    for split, families in FAMILIES.items()
    for family in families
)


class Reading(Skill):
    """Words, numbers and notices."""

    name = "reading"
    description = (
        f"Words, numbers and notices of several lines, {SMALLEST} to {LARGEST} px, in {len(FAMILIES['train'])} font "
        f"families; held out: {len(FAMILIES['test'])} other families, words and texts."
    )
    revision = 3
    sizes = MappingProxyType(
        {
            "small": MappingProxyType({"train": 1000, "validation": 100, "test": 200}),
            "full": MappingProxyType({"train": 60_000, "validation": 1000, "test": 2000}),
        }
    )
    held_out: ClassVar[tuple[str, ...]] = ("font", "word", "text")
    sources = (WORDNET, *FONTS)
    extras = MappingProxyType({"fontTools": "hovle[smol]"})

    @cached_property
    def wordnet(self) -> WordNet:
        return WordNet(self.folders[WORDNET.asset], FIXED_WORDS)

    @cached_property
    def fonts(self) -> dict[str, list[list[FontFile]]]:
        """Part -> files of each family."""
        found = {
            split: [font_files(self.folders[f"font-{family}"], family) for family in families]
            for split, families in FAMILIES.items()
        }
        return {**found, "validation": found["train"]}

    def draw(self, index: int, split: str, seed: int) -> Sample:
        """Draw a text, cut out tightly, somewhere on a page, or a notice of several lines."""
        rng = self.rng(index, split, seed)
        shares = LEARNT_LAYOUTS if split == "train" else LAYOUTS
        layout = rng.choices(tuple(shares), tuple(shares.values()))[0]
        written = self._write(layout, split, rng)
        looks = draw_looks(rng)
        image = paint(written.lettering, looks, rng, may_frame=layout != "crop")
        lines = written.block.texts
        ids = [f"font:{written.font.family}", *(f"word:{word}" for word in sorted(written.text.words))]
        return Sample(
            wear(image, written.letter_size, rng),
            image.size,
            tuple(self._questions(lines, looks, split, rng)),
            tuple(line.region() for line in written.lettering.lines),
            (*ids, f"text:{' '.join(lines)}"),
            {
                "layout": layout,
                "font_size": int(written.block.font.size),
                "letter_size": round(written.letter_size),
                "num_words": len(" ".join(lines).split()),
            },
        )

    def _write(self, layout: str, split: str, rng: random.Random) -> "Written":
        """Draw texts and fonts until one fits its picture."""
        while True:
            font = rng.choice(rng.choice(self.fonts[split]))
            writer = Writer(self.wordnet, split, rng)
            if layout == "notice":
                text = writer.sentence() if rng.random() < 0.45 else writer.notice()
                size = rng.randint(SMALLEST, _LARGEST_NOTICE)
            else:
                text = writer.short()
                size = rng.randint(SMALLEST, LARGEST)
            lines = tuple(line.upper() for line in text.lines) if font.has_capitals_only else text.lines
            if not font.can_write("".join(lines)):
                continue
            face = font.at(size)
            if layout == "notice" and len(lines) == 1:
                lines = wrap(lines[0], face, rng.choice((200, 310, 420)))
            align = rng.choice(("left", "left", "center", "right"))
            block = Block(lines, face, rng.uniform(1.15, 1.6), align)
            lettering = letter_crop(block, rng) if layout == "crop" else letter_page(block, rng, most_rows=3)
            if lettering is not None:
                return Written(text, font, block, lettering)

    def _questions(self, lines: Sequence[str], looks: Looks, split: str, rng: random.Random) -> list[Question]:
        """The text itself, and some of what else can be asked of it."""
        is_notice = len(lines) > 1
        makers = [
            self._whether_word,
            self._part,
            self._count,
            lambda lines, split, rng: caption(lines, looks, rng),
            lambda lines, split, rng: ask_color(looks, rng),
            lambda lines, split, rng: ask_absent(lines, rng),
        ]
        others = [make(lines, split, rng) for make in rng.sample(makers, rng.choice((1, 2, 2, 3)))]
        read = Question(rng.choice(READ_NOTICE if is_notice else READ), "\n".join(lines), "read")
        return [read, *(question for question in others if question is not None)]

    def _whether_word(self, lines: Sequence[str], split: str, rng: random.Random) -> Question:
        """Whether a word is there: one that is, or one much like it that is not."""
        words = [word for line in lines for word in line.split()]
        word = rng.choice(words)
        answer = rng.choice(("yes", "no"))
        if answer == "no":
            word = self._look_alike(word, [other.lower() for other in words], split, rng)
        return Question(rng.choice(HAS_WORD).format(word), answer, "yes/no")

    def _look_alike(self, word: str, words: Sequence[str], split: str, rng: random.Random) -> str:
        if not word.isalpha():
            while True:
                changed = "".join(
                    str(rng.randrange(10)) if char.isdigit() and rng.random() < 0.5 else char for char in word
                )
                changed = changed if any(map(str.isdigit, word)) else f"{rng.randrange(100)}"
                if changed.lower() not in words:
                    return changed
        others = [self.wordnet.draw_word(rng, split) for _ in range(30)]
        found = max(
            (other for other in others if other not in words), key=lambda other: _likeness(other, word.lower())
        )
        return found.upper() if word.isupper() else found.title() if word[0].isupper() else found

    def _part(self, lines: Sequence[str], split: str, rng: random.Random) -> Question | None:
        """One line of several, or one word of a line."""
        parts, what = (list(lines), "line") if len(lines) > 1 else (lines[0].split(), "word")
        if len(parts) < 2:
            return None
        place = rng.randrange(min(len(parts), len(ORDINALS)))
        ordinal = "last" if place == len(parts) - 1 and rng.random() < 0.5 else ORDINALS[place]
        if what == "line":
            wording = rng.choice(
                ("What does the {} line say?", "Read the {} line.", "What is written in the {} line?")
            )
        else:
            wording = rng.choice(("What is the {} word?", "Read the {} word only.", "Which word is the {} one?"))
        return Question(wording.format(ordinal), parts[place], what)

    def _count(self, lines: Sequence[str], split: str, rng: random.Random) -> Question:
        if len(lines) > 1:
            return Question(rng.choice(COUNT_LINES), str(len(lines)), "count")
        return Question(rng.choice(COUNT_WORDS), str(len(lines[0].split())), "count")


@dataclass(frozen=True)
class Written:
    """A text in a font, and where its ink is."""

    text: Text
    font: FontFile
    block: Block
    lettering: Lettering

    @property
    def letter_size(self) -> float:
        """Size of the letters in the stored picture, in pixels."""
        line = self.lettering.lines[0]
        drawn = line.edges[-1][0] - line.edges[0][0]
        return self.block.font.size * drawn / self.block.font.getlength(line.text)


def _likeness(first: str, second: str) -> float:
    same = sum(a == b for a, b in zip(first, second, strict=False))
    return same + sum(a == b for a, b in zip(first[::-1], second[::-1], strict=False)) - abs(len(first) - len(second))


def ask_color(looks: Looks, rng: random.Random) -> Question | None:
    """The color of the letters or of what is behind them, where it has a name."""
    choices = [(COLOR, looks.ink_name), (GROUND, looks.ground_name)]
    wordings, color = rng.choice(choices)
    return Question(rng.choice(wordings), color, "color") if color else None


def ask_absent(lines: Sequence[str], rng: random.Random) -> Question:
    """Something that is not there, which the answer says."""
    if not any(character.isdigit() for line in lines for character in line) and rng.random() < 0.3:
        wording = rng.choice(("What number is written here?", "Which number can you read?"))
        return Question(wording, "There is no number in the picture.", "absent")
    thing = rng.choice(ABSENT)
    if rng.random() < 0.5:
        wording = rng.choice(("Is there {} in the picture?", "Can you see {}?", "Does the picture show {}?"))
        return Question(wording.format(with_article(thing)), "no", "absent")
    wording = rng.choice(("What color is the {}?", "How big is the {}?", "Where is the {}?"))
    return Question(wording.format(thing), f"There is no {thing} in the picture.", "absent")


def caption(lines: Sequence[str], looks: Looks, rng: random.Random) -> Question:
    """One sentence about the picture."""
    asked = rng.choice(CAPTION)
    number = NUMBERS[len(lines)]
    if len(lines) > 1:
        start = rng.choice(("A notice of {} lines that begins", "Text in {} lines; the first one says")).format(number)
        return Question(asked, f'{start} "{lines[0]}".', "caption")
    count = len(lines[0].split())
    what = rng.choice(("The text", "The words" if count > 1 else "The word", "A line that says"))
    how = [f"in {looks.ink_name} letters"] if looks.ink_name else []
    how += [f"on {with_article(looks.ground_name)} background"] if looks.ground_name else []
    return Question(asked, " ".join([f'{what} "{lines[0]}"', *how]) + ".", "caption")
