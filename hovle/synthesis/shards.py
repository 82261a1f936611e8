"""Shards: parquet files of so many samples, which training reads as a `huggingface` source.

A shard says of itself what it holds and what it was made from, and is there whole or not at all.
"""

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.atomic import rename_durably
from .samples import SPLITS, Question, Region, Sample

if TYPE_CHECKING:
    import pyarrow

HEADER = b"hovle.synthesis"
"""Key of a shard's metadata under which its description stands."""

ROWS_AT_ONCE = 100
"""Samples of a row group, which is read as a whole."""


@dataclass(frozen=True)
class Shard:
    """Which samples a file holds."""

    skill: str
    split: str
    number: int
    num_shards: int
    first: int
    """Number of its first sample."""
    count: int
    """Samples in it."""

    @property
    def path(self) -> Path:
        """Its place below the folder of the build."""
        return Path(self.skill) / f"{self.split}-{self.number:05d}-of-{self.num_shards:05d}.parquet"


@functools.cache
def schema() -> "pyarrow.Schema":
    """Columns of a shard, with what `datasets` must know to show the pictures."""
    from datasets import Features, Image, List, Value  # an extra: whoever builds data has it

    text, number = Value("string"), Value("int32")
    region = {"box": List(number), "text": text, "layout": text, "edges": List(Value("float32"))}
    features = {
        "id": text,
        "image": Image(),
        "messages": List({"role": text, "content": text}),
        "regions": List(region),
        "task": text,
        "split": text,
        "source": List(text),
        "width": number,
        "height": number,
        "metadata": text,
    }
    return Features(features).arrow_schema


def to_row(sample: Sample, skill: str, split: str, index: int) -> dict[str, Any]:
    """A sample as training reads it: turns that do not depend on each other (`independent_turns`)."""
    messages = []
    for question in sample.questions:
        messages += [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}]
    about = [{"kind": question.kind, "accepted": list(question.accepted)} for question in sample.questions]
    regions = [
        {"box": list(region.box), "text": region.text, "layout": region.layout, "edges": list(region.edges)}
        for region in sample.regions
    ]
    return {
        "id": f"{skill}/{split}/{index:07d}",
        "image": {"bytes": sample.image, "path": None},
        "messages": messages,
        "regions": regions,
        "task": skill,
        "split": split,
        "source": list(sample.source_ids),
        "width": sample.size[0],
        "height": sample.size[1],
        "metadata": json.dumps({"questions": about, "facets": dict(sample.facets)}),
    }


def from_row(row: Mapping[str, Any]) -> Sample:
    """The sample of a row."""
    about = json.loads(row["metadata"])
    turns = [message["content"] for message in row["messages"]]
    questions = tuple(
        Question(text, answer, item["kind"], tuple(item["accepted"]))
        for text, answer, item in zip(turns[::2], turns[1::2], about["questions"], strict=True)
    )
    regions = tuple(
        Region(tuple(region["box"]), region["text"], region["layout"], tuple(region["edges"]))
        for region in row["regions"]
    )
    size = (row["width"], row["height"])
    return Sample(row["image"]["bytes"], size, questions, regions, tuple(row["source"]), about["facets"])


def write_shard(path: Path, rows: Sequence[Mapping[str, Any]], header: Mapping[str, Any]) -> None:
    """Write a shard, which takes its name when all of it is on the disk."""
    import pyarrow
    from pyarrow import parquet

    described = schema().with_metadata({**schema().metadata, HEADER: json.dumps(header, sort_keys=True).encode()})
    table = pyarrow.Table.from_pylist(list(rows), schema=described)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.writing")
    parquet.write_table(table, unfinished, compression="zstd", row_group_size=ROWS_AT_ONCE)
    rename_durably(unfinished, path)


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed build was writing."""
    for path in folder.glob("*/.*.writing"):
        path.unlink()


def read_header(path: Path) -> dict[str, Any]:
    """What a shard says of itself; ValueError for a file that is none."""
    import pyarrow
    from pyarrow import parquet

    try:
        metadata = parquet.read_schema(path).metadata or {}
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read as parquet ({error}); delete it to have it made again.") from error
    if HEADER not in metadata:
        raise ValueError(f"{path} was not made by `hovle data build`; choose another folder.")
    return json.loads(metadata[HEADER])


def shard_paths(folder: Path, skill: str, split: str) -> list[Path]:
    """Files of a part of a skill, in order; ValueError where there are none."""
    paths = sorted((folder / skill).glob(f"{split}-*.parquet"))
    if not paths:
        raise ValueError(f"{folder / skill} holds no {split} shards; build them with `hovle data build`.")
    return paths


def read_rows(folder: Path, skill: str, split: str, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a part of a skill in order, all columns or some."""
    from pyarrow import parquet

    if split not in SPLITS:
        raise ValueError(f"There is no part {split!r}; there are {', '.join(SPLITS)}.")
    for path in shard_paths(folder, skill, split):
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=list(columns) if columns else None):
                yield from batch.to_pylist()


def read_samples(folder: Path, skill: str, split: str) -> Iterator[Sample]:
    """Samples of a part of a skill in order."""
    return map(from_row, read_rows(folder, skill, split))
