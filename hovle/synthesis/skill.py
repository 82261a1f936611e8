"""Skills: what draws samples of one kind, and from what."""

import functools
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .. import assets
from ..assets.manifest import Asset, load_manifest
from .samples import SPLITS, Sample

SIZES = ("small", "full")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Something fetched that a skill draws from."""

    asset: str
    """Its name, as `hovle fetch` and the folders of `--assets` have it."""
    title: str
    """What it holds, for the data card."""
    package: str
    """Client, name and version, such as `npm lucide-static@1.62.0`."""
    sha256: str
    """Of the package's file."""
    license: str
    splits: tuple[str, ...] = SPLITS
    """Which parts are drawn from it; what may not be learned from is for `test` only."""


def fetched(asset: str, splits: tuple[str, ...] = SPLITS) -> Source:
    """What the manifest of `hovle fetch` says of an asset.

    Args:
        asset: Its name there.
        splits: Which parts are drawn from it.
    """
    entry = _manifest()[asset]
    package = f"{entry.archive.registry} {entry.archive.package} {entry.archive.version}"
    return Source(
        asset=asset,
        title=entry.description,
        package=package,
        sha256=entry.archive.sha256,
        license=entry.licence,
        splits=splits,
    )


@functools.cache
def _manifest() -> dict[str, Asset]:
    return load_manifest()


class AssetFolders:
    """Folders of unpacked assets by name.

    Args:
        root: Folder that holds them, one subfolder for each; None: they are fetched as `hovle fetch` does.
        replay: File of messages that the skill `replay` draws, if any.
    """

    def __init__(self, root: Path | None, replay: Path | None = None):
        self.root, self.replay = root, replay
        self._fetched: dict[str, Path] = {}

    def __getitem__(self, name: str) -> Path:
        if name == "replay":
            if self.replay is None:
                raise ValueError(
                    "The skill replay draws the messages of a file: name it with --replay FILE; `hovle data replay` "
                    "writes one."
                )
            return self.replay
        if self.root is None:
            if name not in self._fetched:  # once: what is in the cache is looked through, thousands of files
                self._fetched[name] = assets.fetch(name)
            return self._fetched[name]
        folder = self.root / name
        if not folder.is_dir():
            raise ValueError(f"{self.root} has no folder {name}; unpack the package there, or leave out --assets.")
        return folder


class Skill(ABC):
    """Draws samples of one kind."""

    name: ClassVar[str]
    description: ClassVar[str]
    """One sentence, for lists and the card."""
    revision: ClassVar[int]
    """Goes up with every change of what is drawn: shards of another revision are not taken for one's own."""
    sizes: ClassVar[Mapping[str, Mapping[str, int]]]
    """Name of a size -> split -> pictures."""
    held_out: ClassVar[tuple[str, ...]]
    """Kinds of source ids of which the test part shares none with the training part."""
    sources: tuple[Source, ...]
    extras: ClassVar[Mapping[str, str]] = {}
    """Modules it cannot do without -> what pip installs them with."""

    def __init__(self, folders: AssetFolders):
        self.folders = folders

    def limit(self, split: str) -> int | None:
        """Most pictures of a part that are worth drawing, None where each is another."""
        return None

    def count(self, split: str, size: str | int) -> int:
        """Pictures of a part: of a named size, or so many to train on and a tenth of it for each other part."""
        wanted = self.sizes[size][split] if isinstance(size, str) else size if split == "train" else -(-size // 10)
        limit = self.limit(split)
        return wanted if limit is None else min(wanted, limit)

    @abstractmethod
    def draw(self, index: int, split: str, seed: int) -> Sample:
        """Draw the sample of this number, the same whenever it is drawn."""

    def rng(self, index: int, split: str, seed: int) -> random.Random:
        """Where all chance of a sample comes from."""
        return random.Random(f"{seed}/{self.name}/{split}/{index}")

    def place(self, index: int, count: int, split: str, seed: int) -> int:
        """Which of `count` things a sample shows: all of them come once before one comes again, in another order."""
        epoch, step = divmod(index, count)
        return _order(f"{seed}/{self.name}/{split}/{epoch}", count)[step]


@functools.lru_cache(maxsize=8)
def _order(key: str, count: int) -> list[int]:
    places = list(range(count))
    random.Random(key).shuffle(places)
    return places
