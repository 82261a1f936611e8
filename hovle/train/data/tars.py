"""Tars of WebDataset as rows of `datasets`: members that share a name are a row, and nothing of a tar gets lost.

Rows hold the bytes of pictures, JSON and text, and the names of all other members; nothing is decoded or unpickled.
Each row has the same columns, whatever its members are, so that pictures of several formats can lie in one tar.
"""

import itertools
import lzma
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
from datasets.builder import Key
from datasets.utils.file_utils import xopen

from .local_files import is_system_copy
from .records import PICTURE_SUFFIXES
from .rows import FAULT, LEFT, MEMBERS

READ_SUFFIXES = (*PICTURE_SUFFIXES, ".json", ".txt")
"""Of members whose bytes a row holds."""

MOST_IN_A_RUN = 256
"""Members that wait until it is clear which of them belong together."""

FEATURES = datasets.Features(
    {
        "__key__": datasets.Value("string"),
        "__url__": datasets.Value("string"),
        MEMBERS: datasets.List({"name": datasets.Value("string"), "data": datasets.Value("large_binary")}),
        LEFT: datasets.List(datasets.Value("string")),
        FAULT: datasets.Value("string"),
    }
)

Member = tuple[str, bytes | None]
"""Name and, where it is read, bytes."""

DAMAGES = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)


class Tars(datasets.GeneratorBasedBuilder):
    """Rows of tars, prepared on disk or streamed."""

    VERSION = datasets.Version("1.0.0")  # of what rows hold: prepared rows of another one are not used
    DEFAULT_WRITER_BATCH_SIZE = 100

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        files = dl_manager.download(self.config.data_files)
        return [datasets.SplitGenerator(name=name, gen_kwargs={"paths": paths}) for name, paths in files.items()]

    def _generate_shards(self, paths: list[str]) -> Iterator[str]:
        yield from paths

    def _generate_examples(self, paths: list[str]) -> Iterator[tuple[Key, dict]]:
        for number, path in enumerate(paths):
            for place, row in enumerate(read_tar(path)):
                yield Key(number, place), row


def read_tar(path: str) -> Iterator[dict]:
    """Rows of a tar; of one that is damaged those before the damage, and a last one that says so."""
    left: list[str] = []
    members = _Members(path, left)
    waiting: dict | None = None  # what is left aside behind a row is told with it
    for key, own in grouped(members):
        if waiting is not None:
            yield waiting
        waiting = _row(path, key, own, left)
        left.clear()
    fault = members.fault
    if members.is_cut and waiting is not None:
        fault += f"; {waiting['__key__']} may lack members and is left out"
    elif waiting is not None:
        yield {**waiting, LEFT: [*waiting[LEFT], *left]}
        left.clear()
    else:
        fault = fault or "holds nothing that is read"
    if fault:
        yield {**_row(path, "its end", [], left), FAULT: f"{path.rpartition('/')[2]} {fault}"}


def _row(path: str, key: str, members: list[Member], left: list[str]) -> dict:
    held = [{"name": name, "data": data} for name, data in members]
    return {"__key__": key, "__url__": path, MEMBERS: held, LEFT: list(left), FAULT: ""}


class _Members:
    """Members of a tar with a name of their own, in order.

    Args:
        path: Of the tar.
        left: Takes the names of what is left aside.
    """

    def __init__(self, path: str, left: list[str]):
        self.path, self.left = path, left
        self.fault = ""
        """What is wrong with the tar, once it has been read."""
        self.is_cut = False
        """Whether it could not be read to its end."""

    def __iter__(self) -> Iterator[Member]:
        last = "its beginning"
        try:
            with xopen(self.path, "rb") as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_WholeInfo) as tar:
                for info in tar:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
                    if info.isdir():
                        continue
                    if not info.isreg() or is_system_copy(info.name) or not _suffix(info.name):
                        self.left.append(info.name)
                        continue
                    is_read = _suffix(info.name).lower() in READ_SUFFIXES
                    held = tar.extractfile(info) if is_read else None
                    yield info.name, held.read() if held else None
                    last = info.name
                if _has_more(tar.fileobj):
                    self.fault = f"goes on behind its end mark, after {last}: unpack tars before joining them"
        except DAMAGES as error:
            self.is_cut = True
            self.fault = f"is damaged or cut behind {last} ({error}): download it again, or take it out"


class _WholeInfo(tarfile.TarInfo):
    """Header of a member; `tarfile` would take one that is cut or damaged for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_WholeInfo":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the honest end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _has_more(stream: Any) -> bool:
    """Whether anything but zeros follows the end mark."""
    return any(any(data) for data in iter(lambda: stream.read(1 << 16), b""))


def _suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return dot + suffix if stem and suffix else ""


def grouped(members: Iterable[Member]) -> Iterator[tuple[str, list[Member]]]:
    """Name and members of each row.

    As in WebDataset, members belong together whose names are equal up to the first dot (`1.png`, `1.mask.png`,
    `1.json`). Where that is nobody's name without its suffix, they do if they are equal up to the last one
    (`v1.2.png`, `v1.2.json` and `v1.3.png`).
    """
    for key, run in itertools.groupby(members, lambda member: _until_first_dot(member[0])):
        waiting: list[Member] = []
        for member in run:
            if len(waiting) >= MOST_IN_A_RUN and _stem(waiting[-1][0]) != _stem(member[0]):
                yield from _told_apart(key, waiting)
                waiting = []
            waiting.append(member)
        yield from _told_apart(key, waiting)


def _told_apart(key: str, members: list[Member]) -> Iterator[tuple[str, list[Member]]]:
    stems: dict[str, list[Member]] = {}
    for member in members:
        stems.setdefault(_stem(member[0]), []).append(member)
    yield from [(key, members)] if key in stems else stems.items()


def _until_first_dot(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _stem(name: str) -> str:
    return name.rpartition(".")[0]
