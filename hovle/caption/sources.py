"""What is to be captioned: pictures of folders, of lists of files and of data sets, each under a name of its own."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files.model_folder import is_hub_id
from ..train.config import HuggingFaceData
from ..train.data.local_files import describe_left, is_system_copy
from ..train.data.records import PICTURE_SUFFIXES

SUFFIXES = (*PICTURE_SUFFIXES, ".heic", ".heif")
"""Of files that are taken for pictures; a list of files may name others."""

DATASET_SUFFIXES = (".parquet", ".tar", ".tgz", ".gz")


@dataclass(frozen=True)
class Item:
    """What one prompt shows.

    Attributes:
        name: By which its result is known; equal names are the same pictures.
        load: Gives its pictures, as paths or the bytes of files; ValueError where they cannot be had.
    """

    name: str
    load: Callable[[], Sequence[Path | str | bytes]]


def find_items(
    sources: Sequence[str], split: str | None = None, column: str | None = None
) -> tuple[list[Item], list[str]]:
    """List what is to be captioned, in order; nothing is decoded.

    Args:
        sources: Folders, pictures, lists of files (.txt, a path per line, relative to the list), and data sets: files
            of parquet or WebDataset, folders of them or of `save_to_disk`, Hub ids.
        split: Part of a data set.
        column: Of a data set, where its pictures stand in another than `image` or `images`.

    Returns:
        The items, and lines that say what was left aside.

    Raises:
        ValueError: For a source that is none of these, or holds no picture.
    """
    items: list[Item] = []
    left_aside: list[str] = []
    for source in sources:
        found, left = _items_of(source, split, column)
        if not found:
            raise ValueError(f"{source} holds no pictures ({', '.join(SUFFIXES)}). {' '.join(left)}".rstrip())
        items += found
        left_aside += left
    return items, left_aside


def _items_of(source: str, split: str | None, column: str | None) -> tuple[list[Item], list[str]]:
    path = Path(source)
    if path.is_dir() and split is None and column is None:
        pictures, left = _pictures_in(path)
        if pictures:
            return [_of_file(picture) for picture in pictures], left
    elif path.suffix.lower() == ".txt" and path.is_file():
        return list(_of_list(path)), []
    elif path.suffix.lower() in SUFFIXES:  # where there is none, its own result says so
        return [_of_file(path)], []
    is_data = path.is_dir() or path.suffix.lower() in DATASET_SUFFIXES or "*" in path.name
    if not is_data and not is_hub_id(source):
        raise ValueError(
            f"{source}: expected a folder, a picture ({', '.join(SUFFIXES)}), a list of files (.txt), a data set "
            f"({', '.join(DATASET_SUFFIXES)}) or a Hub id, found "
            f"{'a file of another kind' if path.exists() else 'no such file'}."
        )
    return _of_dataset(source, split, column)


def _of_file(path: Path) -> Item:
    return Item(str(path), lambda: [path])


def _pictures_in(folder: Path) -> tuple[list[Path], list[str]]:
    """Pictures below a folder in the order of their names, and what else lies there; links are not followed down."""
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    hidden = [path for path in files if is_system_copy(path.relative_to(folder).as_posix())]
    known = {*hidden}
    others = [path for path in files if path not in known]
    pictures = [path for path in others if path.suffix.lower() in SUFFIXES]
    rest = [path for path in others if path.suffix.lower() not in SUFFIXES]
    return pictures, [
        *describe_left(rest, "that are no pictures by their names"),
        *describe_left(hidden, "hidden files and copies that systems make"),
    ]


def _of_list(file: Path) -> Iterator[Item]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no list of files: {error}.") from error
    for line in lines:
        if line.strip():
            yield _of_file(file.parent / line.strip())


def _of_dataset(source: str, split: str | None, column: str | None) -> tuple[list[Item], list[str]]:
    from ..train.data.huggingface import open_dataset, pictures_of_row

    columns = {} if column is None else {"image": column}
    config = HuggingFaceData(path=source, split=split, columns=columns)
    opened = open_dataset(config)

    def load(place: int, name: str) -> list[str | bytes]:
        return pictures_of_row(opened.rows[place], name, config)

    names = [f"{source}[{place}]" for place in range(len(opened.rows))]
    return [Item(name, functools.partial(load, place, name)) for place, name in enumerate(names)], opened.left_aside
