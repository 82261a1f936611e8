"""The little English that questions, answers and captions need."""

from collections.abc import Sequence

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

_IRREGULAR = {
    "child": "children",
    "cactus": "cacti",
    "deer": "deer",
    "fish": "fish",
    "foot": "feet",
    "goldfish": "goldfish",
    "goose": "geese",
    "knife": "knives",
    "leaf": "leaves",
    "loaf": "loaves",
    "man": "men",
    "mouse": "mice",
    "ox": "oxen",
    "person": "people",
    "scarf": "scarves",
    "sheep": "sheep",
    "shelf": "shelves",
    "snowman": "snowmen",
    "tooth": "teeth",
    "wolf": "wolves",
    "woman": "women",
}
_TAKES_ES = ("s", "x", "z", "ch", "sh")
_TAKES_OES = ("potato", "tomato", "mango", "volcano", "domino", "hero")
_AN_DESPITE_ITS_LETTER = ("hour", "heir", "honest")
_A_DESPITE_ITS_LETTER = ("uni", "use", "euro", "one", "ufo", "u-")


def plural(name: str) -> str:
    """Several of a thing: its last word is inflected."""
    *before, last = name.split(" ")
    if last in _IRREGULAR:
        word = _IRREGULAR[last]
    elif last.endswith(_TAKES_ES) or last in _TAKES_OES:
        word = last + "es"
    elif last.endswith("y") and last[-2:-1] not in tuple("aeiou"):
        word = last[:-1] + "ies"
    else:
        word = last + "s"
    return " ".join([*before, word])


def with_article(name: str) -> str:
    """`a` or `an` before a name, as its first letters sound."""
    sounds_as_vowel = name.lower().startswith((*"aeiou", *_AN_DESPITE_ITS_LETTER))
    sounds_as_vowel &= not name.lower().startswith(_A_DESPITE_ITS_LETTER)
    return f"{'an' if sounds_as_vowel else 'a'} {name}"


def so_many(count: int, name: str) -> str:
    """One or several of a thing: `a star`, `three stars`."""
    if count == 1:
        return with_article(name)
    number = NUMBERS[count] if count < len(NUMBERS) else str(count)
    return f"{number} {plural(name)}"


def listed(parts: Sequence[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`; ValueError for none."""
    if not parts:
        raise ValueError("There is nothing to list; expected at least one part.")
    *before, end = parts
    return f"{', '.join(before)} {last} {end}" if before else end


def as_sentence(text: str) -> str:
    """With a capital letter first and a full stop last."""
    return f"{text[0].upper()}{text[1:]}."
