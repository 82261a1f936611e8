"""Cut a folder's files into pieces that any channel carries, and put them together again.

`python dev/pieces.py cut MODEL PIECES` writes PIECES/0000, 0001, ... of 16 MiB each and PIECES/pieces.json with sizes
and hashes; `python dev/pieces.py join PIECES MODEL` makes the folder of them and refuses what is missing or damaged.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from hovle.files.atomic import appear_when_complete

PIECE = 16 * 2**20
"""Bytes of a piece."""

LIST = "pieces.json"


def cut(folder: Path, pieces: Path, size: int = PIECE) -> int:
    """Write the pieces of all files of a folder, subfolders included; returns how many there are."""
    if pieces.exists():
        raise ValueError(f"{pieces} is there already; name a folder that is not.")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise ValueError(f"{folder} holds no files.")
    told = []
    with appear_when_complete(pieces) as making:
        for path in files:
            names = []
            for content in _parts(path, size):
                name = f"{sum(len(entry['pieces']) for entry in told) + len(names):04d}"
                (making / name).write_bytes(content)
                names.append(name)
            facts = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            told.append({"path": path.relative_to(folder).as_posix(), **facts, "pieces": names})
        (making / LIST).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return sum(len(entry["pieces"]) for entry in told)


def _parts(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while content := file.read(size):
            yield content


def join(pieces: Path, folder: Path) -> int:
    """Make the folder that was cut; returns how many files it has.

    Raises:
        ValueError: For pieces that are missing or do not make the file that was cut.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already; name a folder that is not.")
    told = json.loads((pieces / LIST).read_text(encoding="utf-8"))
    if missing := [name for entry in told for name in entry["pieces"] if not (pieces / name).is_file()]:
        raise ValueError(f"{pieces} lacks {len(missing)} pieces, such as {missing[0]}: bring them, too.")
    with appear_when_complete(folder) as making:
        for entry in told:
            path = making / entry["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for name in entry["pieces"]:
                    file.write((pieces / name).read_bytes())
            if _sha256(path) != entry["sha256"]:
                raise ValueError(f"The pieces of {entry['path']} are damaged (its sha256 is {_sha256(path)}).")
    return len(told)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("cut", "join"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    count = (cut if args.action == "cut" else join)(args.source, args.target)
    print(f"{args.target}: {count} {'pieces' if args.action == 'cut' else 'files'}")  # noqa: T201
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"pieces: {error}")
