"""Five small text tasks on local data, scored by how likely a language model finds each choice.

Every item is a beginning and a few endings, one of which is right; the model chooses the ending whose tokens it gives
the highest total log-likelihood. Chance is one over the number of endings. Items are drawn with a fixed seed.

  capitals     "The capital of Peru is" Lima, and three other capitals
  categories   "A trout is a kind of" fish, and three other kinds
  opposites    "The opposite of hot is" cold, and three other words of the list
  agreement    "The dogs near the house" are, or is: the verb agrees with the noun before last
  cloze        a sentence of Python's language reference without its last word, and three words that end others

The facts of the first four are our own lists in `text_tasks.json` (Apache-2.0, as this package). The sentences of
the last are read from `pydoc_data`, which comes with Python (PSF licence), and are not part of this package.
"""

import functools
import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ...files.documents import load_json
from ...language.likelihood import Row, log_likelihoods
from ...language.text_perplexity import read_text
from ..intervals import wilson

DATA = Path(__file__).with_suffix(".json")
"""Our lists of facts."""

NUM_CHOICES = 4
"""Endings of an item, where the task does not say otherwise."""


@dataclass(frozen=True)
class Item:
    """One beginning with its endings."""

    context: str
    choices: tuple[str, ...]
    """With the space that stands before them."""
    answer: int
    """Place of the right one."""


@dataclass(frozen=True)
class TaskScore:
    """What a model scores in one task."""

    num_items: int
    num_right: int
    chance: float

    @property
    def accuracy(self) -> float:
        """Share of items whose right ending is likeliest."""
        return self.num_right / self.num_items

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy (Wilson)."""
        return wilson(self.num_right, self.num_items)

    @property
    def is_above_chance(self) -> bool:
        """Whether the whole interval lies above chance."""
        return self.interval[0] > self.chance


@functools.cache
def _facts() -> dict:
    return load_json(DATA)


def _item(generator: random.Random, context: str, right: str, others: Sequence[str], count: int) -> Item:
    """An item with so many endings, in random order."""
    choices = [right, *generator.sample(sorted(set(others) - {right}), count - 1)]
    generator.shuffle(choices)
    return Item(context, tuple(f" {choice}" for choice in choices), choices.index(right))


def _capitals(generator: random.Random) -> list[Item]:
    pairs = _facts()["capitals"]
    return [
        _item(generator, f"The capital of {country} is", capital, list(pairs.values()), NUM_CHOICES)
        for country, capital in pairs.items()
    ]


def _categories(generator: random.Random) -> list[Item]:
    kinds = _facts()["categories"]
    return [
        _item(generator, f"{'An' if word[0] in 'aeiou' else 'A'} {word} is a kind of", kind, list(kinds), NUM_CHOICES)
        for kind, words in kinds.items()
        for word in words
    ]


def _opposites(generator: random.Random) -> list[Item]:
    pairs = [tuple(pair) for pair in _facts()["opposites"]]
    words = [word for pair in pairs for word in pair]
    return [
        _item(generator, f"The opposite of {word} is", other, [one for one in words if one != word], NUM_CHOICES)
        for pair in pairs
        for word, other in (pair, pair[::-1])
    ]


def _agreement(generator: random.Random) -> list[Item]:
    facts = _facts()["agreement"]
    items = []
    for noun, (place_one, place_many), (one, many) in itertools.product(
        facts["nouns"], facts["places"], facts["verbs"]
    ):
        is_many = generator.random() < 0.5
        subject = f"{noun}s" if is_many else noun
        place = place_one if is_many else place_many  # the noun next to the verb would mislead
        items.append(_item(generator, f"The {subject} {place}", many if is_many else one, [one, many], 2))
    return items


def _cloze(generator: random.Random) -> list[Item]:
    text = re.sub(r"\s+", " ", read_text("python_docs"))
    sentences = [
        match[0]
        for match in re.finditer(r"(?<=[.] )[A-Z][A-Za-z ,]{60,180} [a-z]{4,12}(?=[.] )", text)
        if "  " not in match[0]
    ]
    sentences = sorted(set(sentences))
    endings = [sentence.rpartition(" ")[2] for sentence in sentences]
    return [
        _item(generator, sentence.rpartition(" ")[0], ending, endings, NUM_CHOICES)
        for sentence, ending in zip(sentences, endings, strict=True)
    ]


TASKS: dict[str, Callable[[random.Random], list[Item]]] = {
    "capitals": _capitals,
    "categories": _categories,
    "opposites": _opposites,
    "agreement": _agreement,
    "cloze": _cloze,
}
"""Name -> all items there are."""


def draw_items(task: str, count: int, seed: int = 0) -> list[Item]:
    """Draw so many items of a task, or all if there are fewer; the same ones every time."""
    generator = random.Random(f"{task}-{seed}")
    items = TASKS[task](generator)
    return generator.sample(items, min(count, len(items)))


def score_items(
    model: nn.Module,
    encode: Callable[[str, bool], list[int]],
    items: Sequence[Item],
    tokens_at_once: int = 1024,
) -> TaskScore:
    """Count the items whose right ending a model finds likeliest.

    Args:
        model: A causal language model in evaluation mode.
        encode: Text and whether it stands at the beginning -> ids without special tokens.
        items: What to score.
        tokens_at_once: Size of a batch.
    """
    rows = []
    for item in items:
        context = encode(item.context, True)
        rows += [Row(context + encode(choice, False), len(context)) for choice in item.choices]
    scores = iter(log_likelihoods(model, rows, tokens_at_once))
    num_right = 0
    for item in items:
        own = [next(scores) for _ in item.choices]
        num_right += own.index(max(own)) == item.answer
    return TaskScore(len(items), num_right, sum(1 / len(item.choices) for item in items) / len(items))
