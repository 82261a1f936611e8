"""Files of a local data set: which of them are read, and what is left aside, by name.

`datasets` is handed every file it shall read. Left to itself it goes by names: of pictures in the folders `train`,
`bus` and `tram` it would read the first folder alone, and say nothing.
"""

import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..config import HuggingFaceData
from .records import PICTURE_SUFFIXES, inside
from .skips import NUM_WORST

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Files beside pictures that say what they show."""

SAVED = ("state.json", "dataset_dict.json")
"""Files that `save_to_disk` writes into a data set's folder, or into that of several splits."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Parts of a data set and the words for them in names of files and folders."""

SYSTEM_FILES = ("Thumbs.db", "desktop.ini")


@dataclass
class Listing:
    """What lies in a folder and its subfolders."""

    files: list[Path] = field(default_factory=list)
    """Regular files and links to such, in order."""
    links: list[Path] = field(default_factory=list)
    """Links to folders, which are not followed: where they lead lies outside, which is refused, or is read anyway."""
    copies: list[Path] = field(default_factory=list)
    """Hidden files and what systems leave beside pictures."""
    others: list[Path] = field(default_factory=list)
    """Pipes, sockets and links that lead nowhere."""

    def left_aside(self) -> list[str]:
        """What of it nobody reads."""
        return [
            *describe_left(self.links, "links to folders, which are read where they lie"),
            *describe_left(self.copies, "hidden files and copies that systems make"),
            *describe_left(self.others, "that are no regular files"),
        ]


def list_folder(folder: Path) -> Listing:
    """Look through a folder; ValueError where a link leads out of it."""
    listing = Listing()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            inside(folder, str(path.relative_to(folder)))
        if is_system_copy(path.relative_to(folder).as_posix()):
            listing.copies += [] if path.is_dir() else [path]
        elif path.is_dir():
            listing.links += [path] if path.is_symlink() else []
        elif path.is_file():
            listing.files.append(path)
        else:
            listing.others.append(path)
    return listing


def is_system_copy(name: str) -> bool:
    """Whether a name, with its folders, is hidden, or of a file that a system makes of its own accord."""
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts) or parts[-1] in SYSTEM_FILES


def describe_left(paths: Sequence[Path], what: str) -> list[str]:
    """A line that counts and names files; none where there are none."""
    if not paths:
        return []
    suffixes = Counter(path.suffix.lower() or "no suffix" for path in paths)
    shown = [f"{count:,} {suffix}" for suffix, count in suffixes.most_common(NUM_WORST)]
    names = [path.name for path in paths[:NUM_WORST]]
    return [
        f"left aside {len(paths):,} {what if what.startswith(('links', 'hidden')) else f'files {what}'} "
        f"({', '.join(shown)}): {', '.join(names)}" + ", ..." * (len(paths) > NUM_WORST)
    ]


# --- which files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalFiles:
    """Files of a local data set."""

    layout: str
    """`parquet`, `webdataset`, `imagefolder`, or `saved` for what `save_to_disk` wrote."""
    root: Path
    """Folder they lie in."""
    splits: dict[str, list[Path]]
    """Split -> files to read."""
    split: str
    """What to read of the splits, as `datasets` reads it."""
    left_aside: list[str]
    """What is not read, and what else the user should know of the choice."""


def find_files(config: HuggingFaceData) -> LocalFiles | None:
    """Find the files of a local data set; None for a Hub id.

    Raises:
        ValueError: When there are none of a known layout, or none of the split.
    """
    path = Path(config.path)
    if path.is_dir():
        listing = list_folder(path)
        root, files, left_aside = path, listing.files, listing.left_aside()
    elif path.exists() or "*" in path.name:
        found = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
        listing = Listing([file for file in found if file.is_file()], [], [], [f for f in found if not f.is_file()])
        root, files, left_aside = path.parent, listing.files, listing.left_aside()
    else:
        return None
    layout = _layout(config, root, files, left_aside)
    if layout == "saved":
        return LocalFiles(layout, root, {}, config.split or "", left_aside)
    chosen = [file for file in files if _READS[layout](file)] or files  # other names, where the recipe says so
    known = {*chosen}
    others = [file for file in files if file not in known]
    left_aside = [*describe_left(others, f"that the layout {layout} does not read"), *left_aside]
    splits, split, remarks = _choose_split(config, root, chosen, layout, path.is_dir())
    return LocalFiles(layout, root, splits, split, left_aside + remarks)


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURE_SUFFIXES


_READS: dict[str, Callable[[Path], bool]] = {
    "parquet": lambda file: file.suffix.lower() == ".parquet",
    "webdataset": lambda file: file.name.lower().endswith(TAR_SUFFIXES),
    "imagefolder": lambda file: _is_picture(file) or file.name in METADATA or file.suffix.lower() == ".txt",
}
"""Layout -> whether it reads a file."""


def _layout(config: HuggingFaceData, root: Path, files: Sequence[Path], left_aside: Sequence[str]) -> str:
    """How files are laid out, by their names if the recipe does not say."""
    if config.format == "auto" and any((root / name).is_file() for name in SAVED) and Path(config.path).is_dir():
        return "saved"
    has_rows = any(_READS["parquet"](file) and file.name not in METADATA for file in files)
    found = {
        "parquet": has_rows or (any(map(_READS["parquet"], files)) and not any(map(_is_picture, files))),
        "webdataset": any(map(_READS["webdataset"], files)),
        "imagefolder": any(map(_is_picture, files)),
    }
    layout = config.format if config.format != "auto" else next((name for name in found if found[name]), None)
    if layout is not None and (found[layout] or (files and layout != "imagefolder")):
        return layout
    expected = {"parquet": "parquet files", "webdataset": "tars", "imagefolder": "pictures"}
    suffixes = ", ".join(sorted({file.suffix.lower() for file in files})) or "nothing"
    wanted = expected[layout] if layout else "parquet files, tars or pictures"
    raise ValueError(
        f"data.path: {config.path} holds no {wanted} ({suffixes})"
        + ("; set data.format if they have other names." if layout is None else " to read as `format` says.")
        + "".join(f" {line[0].upper()}{line[1:]}." for line in left_aside)
    )


def _choose_split(
    config: HuggingFaceData, root: Path, files: list[Path], layout: str, is_folder: bool
) -> tuple[dict[str, list[Path]], str, list[str]]:
    """Files by split, what to read of them, and remarks.

    What names tell of splits counts where the recipe asks for one, or where the name of every file of rows begins with
    one, as `datasets` writes them; else all files are one data set.
    """
    asked = [] if config.split in (None, "all") else re.findall(r"(?:^|\+)\s*([^\[\]+\s]+)", config.split or "")
    told = {file: _split_told(file.relative_to(root)) for file in files}
    begins = {_split_told(Path(file.name), at_start=True) for file in files}
    by_rows = layout != "imagefolder" and None not in begins and len(begins) > 1
    if is_folder and config.split is None and by_rows:
        asked = ["train"]
    if not asked or not is_folder or (asked == ["train"] and not any(told.values())):
        name = asked[0] if asked else "train"
        return {name: files}, (config.split if asked else None) or name, _remark_on_splits(config, told, is_folder)
    splits = {name: [file for file in files if _says(file.relative_to(root), name)] for name in asked}
    missing = [name for name, own in splits.items() if not own]
    if missing:
        found = ", ".join(dict.fromkeys(filter(None, told.values()))) or "none"
        raise ValueError(
            f"data.split: no file of {config.path} is of the split {missing[0]!r} by its name or folder; the splits "
            f"found are: {found}. Leave data.split out to read all files."
        )
    chosen = {file for own in splits.values() for file in own}
    others = [file for file in files if file not in chosen]
    return splits, config.split or asked[0], describe_left(others, f"that are not of the split {'+'.join(asked)}")


def _remark_on_splits(config: HuggingFaceData, told: dict[Path, str | None], is_folder: bool) -> list[str]:
    counts = Counter(filter(None, told.values()))
    if not is_folder or config.split is not None or not counts:
        return []
    shown = ", ".join(f"{count:,} of {name}" for name, count in counts.items())
    return [f"read whole, although names tell of splits ({shown}); `split: NAME` reads one of them"]


def _split_told(path: Path, at_start: bool = False) -> str | None:
    """The split that the names of a file and of its folders tell, if any."""
    return next((name for name in SPLITS if _says(path, name, at_start)), None)


def _says(path: Path, split: str, at_start: bool = False) -> bool:
    words = "|".join(map(re.escape, SPLITS.get(split, (split.lower(),))))
    pattern = re.compile(rf"{'^' if at_start else '(?:^|[-._ 0-9])'}(?:{words})(?:[-._ 0-9]|$)")
    return any(pattern.search(part.lower()) for part in path.parts)


# --- what their beginnings say ---------------------------------------------------------------------------------------


def check_beginnings(local: LocalFiles, label: str) -> None:
    """Raise where a parquet file is none or cut, or where no tar is one; rows tell of a single damaged tar."""
    files = [file for own in local.splits.values() for file in own]
    if local.layout == "parquet":
        faults = list(filter(None, map(_parquet_fault, files)))
        is_refused = bool(faults)
    else:
        faults = list(filter(None, map(_tar_fault, files))) if local.layout == "webdataset" else []
        is_refused = len(faults) == len(files)
    if is_refused:
        shown = "; ".join(faults[:NUM_WORST]) + "; ..." * (len(faults) > NUM_WORST)
        raise ValueError(f"{label}: {shown}. Download or write them again, or take them out of the folder.")


def _parquet_fault(file: Path) -> str | None:
    with file.open("rb") as opened:
        head = opened.read(40)
        opened.seek(max(0, file.stat().st_size - 4))
        tail = opened.read(4)
    if not head.startswith(b"PAR1"):
        return f"{file.name} is no parquet file, it begins with {head!r}"
    return None if tail == b"PAR1" and file.stat().st_size >= 12 else f"{file.name} is a parquet file that was cut"


def _tar_fault(file: Path) -> str | None:
    try:
        with tarfile.open(file) as tar:
            is_empty = tar.next() is None
    except (tarfile.TarError, EOFError, OSError, zlib.error):
        with file.open("rb") as opened:
            return f"{file.name} is no tar, it begins with {opened.read(40)!r}"
    return f"{file.name} is an empty tar" if is_empty else None


def origin_of(file: Path) -> tuple[str, ...]:
    """What tells `datasets` that a file changed since its rows were prepared."""
    facts = os.stat(file)
    return str(facts.st_mtime_ns), str(facts.st_size)
