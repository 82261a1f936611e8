"""Clocks: the time to five minutes, on faces of many looks and on displays."""

import random
from types import MappingProxyType

from ..clock_faces import Time, draw_display, draw_face, looks
from ..encoding import to_png
from ..samples import Question, Region, Sample
from ..skill import Skill

_DIGITAL_SHARE = 0.15
_SIZES = ((112, 112), (224, 224), (224, 224))

WORDINGS = MappingProxyType(
    {
        "time": ("What time is it?", "What time does the clock show?", "Read the clock.", "Tell the time."),
        "hour": ("What is the hour?", "Which hour does the clock show, without minutes?", "What hour is it?"),
        "minutes": (
            "How many minutes past the full hour is it?",
            "What are the minutes?",
            "Which minute does it show?",
        ),
        "check": ("Is it {time}?", "Does the clock show {time}?", "Is the time {time}?"),
        "words": ("Say the time in words.", "What time is it, in words?", "Write the time in words."),
        "half": ("Is it before or after half past?", "Is the minute before or after thirty?"),
        "kind": ("Is this clock analog or digital?", "What kind of clock is it, analog or digital?"),
        "caption": ("Describe the picture.", "What does the picture show?", "Describe this picture in one sentence."),
    }
)

_MINUTES = ("five", "ten", "quarter", "twenty", "twenty-five", "half")
_HOURS = ("twelve", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")


def in_words(time: Time) -> str:
    """A time to five minutes on a clock of twelve hours as it is said: `quarter past ten`."""
    if time.minute % 5:
        raise ValueError(f"{time.text} is said to the minute; expected a multiple of five minutes.")
    this, following = _HOURS[time.hour % 12], _HOURS[(time.hour + 1) % 12]
    if time.minute == 0:
        return f"{this} o'clock"
    if time.minute <= 30:
        return f"{_MINUTES[time.minute // 5 - 1]} past {this}"
    return f"{_MINUTES[(60 - time.minute) // 5 - 1]} to {following}"


class Clocks(Skill):
    """Analog and digital clocks."""

    name = "clocks"
    description = "analog faces of many looks and digital displays: the time to five minutes"
    revision = 1
    sizes = MappingProxyType(
        {
            "small": MappingProxyType({"train": 400, "validation": 40, "test": 100}),
            "full": MappingProxyType({"train": 12_000, "validation": 300, "test": 1_000}),
        }
    )
    held_out = ("look",)
    sources = ()

    def draw(self, index: int, split: str, seed: int) -> Sample:
        """Draw a clock; each time to five minutes comes equally often on analog ones."""
        rng = self.rng(index, split, seed)
        size = rng.choice(_SIZES)
        is_digital = rng.random() < _DIGITAL_SHARE
        if is_digital:
            time = Time(rng.randint(0, 23) if rng.random() < 0.5 else rng.randint(1, 12), rng.randint(0, 59))
            image, box = draw_display(time, rng.random() < 0.4, size, rng)
            source_ids: tuple[str, ...] = ()
        else:
            time = Time(rng.randint(1, 12), 5 * rng.randint(0, 11))
            look = rng.choice(looks(split))
            image, box = draw_face(time, look, size, rng)
            source_ids = (f"look:{look.name}",)
        kind = "digital" if is_digital else "analog"
        questions = (_ask("time", time.text, rng), *_ask_more(time, kind, rng), _caption(time, kind, rng))
        facets = {"clock": kind, "marks": "digits" if is_digital else look.marks}
        return Sample(to_png(image), size, questions, (Region(box, time.text),), source_ids, facets)


def _ask(kind: str, answer: str, rng: random.Random, **parts: str) -> Question:
    return Question(rng.choice(WORDINGS[kind]).format(**parts), answer, kind)


def _ask_more(time: Time, kind: str, rng: random.Random) -> list[Question]:
    """Two to four questions besides the time itself."""
    questions = [
        _ask("hour", str(time.hour), rng),
        _ask("minutes", str(time.minute), rng),
        _ask_check(time, kind, rng),
    ]
    if kind == "analog":
        questions.append(_ask("words", in_words(time), rng))
    if time.minute not in (0, 30):
        questions.append(_ask("half", "before" if time.minute < 30 else "after", rng))
    if kind == "digital" or rng.random() < 0.15:  # as often the one as the other
        questions.append(_ask("kind", kind, rng))
    return rng.sample(questions, rng.randint(2, 4))


def _ask_check(time: Time, kind: str, rng: random.Random) -> Question:
    answer = rng.choice(("yes", "no"))
    asked = time if answer == "yes" else _another(time, kind, rng)
    return _ask("check", answer, rng, time=asked.text)


def _another(time: Time, kind: str, rng: random.Random) -> Time:
    """A time the clock does not show: another hour, other minutes, or the hands taken one for the other."""
    lowest, highest = (0, 23) if kind == "digital" else (1, 12)
    swapped = Time(time.minute // 5 or 12, time.hour % 12 * 5)
    others = [
        Time(rng.randint(lowest, highest), time.minute),
        Time(time.hour, 5 * rng.randint(0, 11)),
        *([swapped] if kind == "analog" else []),
    ]
    rng.shuffle(others)
    return next((other for other in others if other != time), Time(time.hour % 12 + 1, time.minute))


def _caption(time: Time, kind: str, rng: random.Random) -> Question:
    said = in_words(time) if kind == "analog" and rng.random() < 0.3 else time.text
    article = "An" if kind == "analog" else "A"
    text = rng.choice((f"{article} {kind} clock that shows {said}.", f"{article} {kind} clock at {said}."))
    return Question(rng.choice(WORDINGS["caption"]), text, "caption")
