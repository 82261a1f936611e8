"""The work of a build: which shards there are to be, which are missing, and who draws them."""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..machine.processes import end_with_parent
from .registry import open_skill
from .samples import SPLITS
from .shards import Shard, read_header, read_rows, remove_unfinished, to_row, write_shard
from .skill import AssetFolders, Skill

FORMAT = 1
"""Of the shards; goes up when their columns change."""


@dataclass(frozen=True)
class Build:
    """What a build is asked for."""

    folder: Path
    skills: tuple[str, ...]
    size: str | int
    """Name of a size, or so many pictures of each skill to train on."""
    seed: int = 0
    shard_size: int = 500
    """Samples of a shard; a shard that was being drawn when the build was killed is drawn again."""
    assets: Path | None = None
    """Folder of unpacked assets instead of the cache."""
    replay: Path | None = None
    """File of messages for the skill `replay`."""

    @property
    def folders(self) -> AssetFolders:
        return AssetFolders(self.assets, self.replay)


@dataclass(frozen=True)
class Pace:
    """How fast a skill was drawn, in seconds of one process."""

    skill: str
    count: int
    seconds: float


def plan_shards(skill: Skill, build: Build) -> list[Shard]:
    """All shards of a skill."""
    shards = []
    for split in SPLITS:
        total = skill.count(split, build.size)
        starts = range(0, total, build.shard_size)
        for number, first in enumerate(starts):
            count = min(build.shard_size, total - first)
            shards.append(Shard(skill.name, split, number, len(starts), first, count))
    return shards


def describe_shard(shard: Shard, skill: Skill, build: Build) -> dict[str, Any]:
    """What a shard says of itself: all that decides what it holds."""
    return {
        "format": FORMAT,
        "skill": skill.name,
        "revision": skill.revision,
        "split": shard.split,
        "first": shard.first,
        "count": shard.count,
        "total": skill.count(shard.split, build.size),
        "seed": build.seed,
        "sources": {source.asset: source.sha256 for source in skill.sources},
    }


def missing_shards(skill: Skill, build: Build) -> list[Shard]:
    """Shards that are still to be drawn.

    Raises:
        ValueError: When the folder holds shards of another build.
    """
    planned = {build.folder / shard.path: shard for shard in plan_shards(skill, build)}
    for path in sorted((build.folder / skill.name).glob("*.parquet")):
        wanted = describe_shard(planned[path], skill, build) if path in planned else None
        found = read_header(path)
        if found != wanted:
            raise ValueError(f"{path} is of another build ({_difference(found, wanted)}); choose another folder.")
    return [shard for path, shard in planned.items() if not path.exists()]


def _difference(found: dict[str, Any], wanted: dict[str, Any] | None) -> str:
    if wanted is None:
        return "it has other shards"
    keys = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    return ", ".join(f"its {key} is {found.get(key)}, not {wanted.get(key)}" for key in keys)


def draw_shard(shard: Shard, build: Build) -> Pace:
    """Draw the samples of a shard and write them."""
    started_at = time.perf_counter()
    skill = open_once(shard.skill, build)
    rows = [
        _draw_row(skill, shard.split, index, build.seed) for index in range(shard.first, shard.first + shard.count)
    ]
    write_shard(build.folder / shard.path, rows, describe_shard(shard, skill, build))
    return Pace(shard.skill, shard.count, time.perf_counter() - started_at)


def _draw_row(skill: Skill, split: str, index: int, seed: int) -> dict[str, Any]:
    try:
        sample = skill.draw(index, split, seed)
        sample.check()
    except Exception as error:
        error.add_note(f"while drawing {skill.name}/{split}/{index:07d} with the seed {seed}")
        raise
    return to_row(sample, skill.name, split, index)


_OPEN: dict[tuple[str, Path | None, Path | None], Skill] = {}
"""Skills of this process: to open one may take seconds."""


def open_once(name: str, build: Build) -> Skill:
    """A skill of a build, the same one whenever this process asks for it."""
    key = (name, build.assets, build.replay)
    if key not in _OPEN:
        _OPEN[key] = open_skill(name, build.folders)
    return _OPEN[key]


def run_build(build: Build, num_workers: int) -> list[Pace]:
    """Draw what is missing, and look through what is there.

    Args:
        build: What is asked for.
        num_workers: Processes that draw; 1: this one.

    Returns:
        How fast each shard was drawn now.

    Raises:
        ValueError: When the folder holds another build, or tests share with training what they must not.
    """
    build.folder.mkdir(parents=True, exist_ok=True)
    skills = [open_once(name, build) for name in build.skills]
    missing = [shard for skill in skills for shard in missing_shards(skill, build)]
    remove_unfinished(build.folder)
    paces = []
    progress = tqdm(total=sum(shard.count for shard in missing), unit=" pictures", desc="drawing", disable=None)
    with progress:
        for pace in _draw_all(missing, build, num_workers):
            progress.update(pace.count)
            paces.append(pace)
    for skill in skills:
        check_held_out(skill, build.folder)
    return paces


def _draw_all(shards: Sequence[Shard], build: Build, num_workers: int) -> Iterator[Pace]:
    if num_workers == 1 or len(shards) < 2:
        yield from (draw_shard(shard, build) for shard in shards)
        return
    # Not forked from this process: its libraries may have threads, whose locks a fork would copy.
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    if sys.platform != "win32":
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(num_workers, context, initializer=end_with_parent) as pool:
        waiting: set[Future[Pace]] = {pool.submit(draw_shard, shard, build) for shard in shards}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def check_held_out(skill: Skill, folder: Path) -> dict[str, int]:
    """Compare what the parts of a skill were drawn from, by their written records.

    Returns:
        Kind of source -> how many of it the test part has, none of which the training part has.

    Raises:
        ValueError: When they share one.
    """
    seen: dict[str, set[str]] = {}
    for split in ("train", "test"):
        seen[split] = {name for row in read_rows(folder, skill.name, split, ["source"]) for name in row["source"]}
    counts = {}
    for kind in skill.held_out:
        tested = {name for name in seen["test"] if name.startswith(f"{kind}:")}
        if shared := sorted(tested & seen["train"]):
            raise ValueError(
                f"{skill.name}: {len(shared)} of {len(tested)} {kind}s of the test part are in the training part, "
                f"such as {', '.join(shared[:3])}; its results would mean nothing. This is a fault of hovle's."
            )
        counts[kind] = len(tested)
    return counts
