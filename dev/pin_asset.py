"""Download one version of a package and print what the manifest of `hovle fetch` says of it.

`python dev/pin_asset.py npm flag-icons 7.5.0 'package/flags/4x3/*.svg' package/LICENSE` prints the entry's `archive`;
`PATTERN=TO` chooses another place than the package's own. Without patterns: what the package holds.
The archive is kept in `--keep DIR`, whence `hovle fetch --from DIR` takes it.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from hovle.assets import manifest, registry
from hovle.assets.archive import Entry

LARGE = 100_000
"""Bytes from which on a single file's own sha256 is pinned."""


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("registry", choices=manifest.REGISTRIES)
    parser.add_argument("package")
    parser.add_argument("version")
    parser.add_argument("patterns", nargs="*", metavar="PATTERN[=TO]")
    parser.add_argument("--keep", type=Path, default=Path(), metavar="DIR")
    args = parser.parse_intermixed_args()
    pins = {"registry": args.registry, "package": args.package, "version": args.version}
    path = brought(pins, args.keep)
    with path.open("rb") as file:
        pins |= {"filename": path.name} if args.registry == "pypi" else {}
        pins |= {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}
        file.seek(0)
        client = registry.CLIENTS[args.registry]
        entries = list(
            facts_of(client.read_entries(file, path.name), [text.partition("=")[0] for text in args.patterns])
        )
    if not args.patterns:
        show(entry for entry, _ in entries)
        return 0
    members = [member(text, entries, args.registry) for text in args.patterns]
    sys.stdout.write(json.dumps({**pins, "members": members}, indent=2, ensure_ascii=False) + "\n")
    return 0


def brought(pins: dict, folder: Path) -> Path:
    """Path of the archive in a folder, downloaded where it is missing."""
    archive = manifest.Archive(**pins, filename=manifest.filename_of(**pins), sha256="", size=0, members=())
    stem = archive.filename or f"{archive.package.replace('-', '_')}-{archive.version}-*.whl"
    if not list(folder.glob(stem)):
        registry.CLIENTS[archive.registry].download(archive, folder.absolute())
    (path,) = folder.glob(stem)
    return path


def facts_of(entries: Iterator[Entry], patterns: list[str]) -> Iterator[tuple[Entry, str]]:
    """Files with the sha256 of each one's content, where a pattern wants it and it is large."""
    for entry in entries:
        if entry.is_folder or entry.is_special:
            continue
        digest = hashlib.sha256()
        if entry.size > LARGE and any(registry.matches(entry.name, pattern) for pattern in patterns):
            with entry.open() as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        yield entry, digest.hexdigest()


def member(text: str, entries: list[tuple[Entry, str]], kind: str) -> dict:
    """What the manifest says of one pattern."""
    pattern, _, to = text.partition("=")
    found = [(entry, digest) for entry, digest in entries if registry.matches(entry.name, pattern)]
    if not found:
        raise SystemExit(f"Nothing matches {pattern}.")
    if not to:
        first = found[0][0].name
        to = pattern if pattern == first else pattern.removesuffix(registry.kept_path(pattern, pattern))
        to = to.removeprefix("package/") if kind == "npm" else to
    size = sum(entry.size for entry, _ in found)
    facts = {"pattern": pattern, "to": to or "./", "count": len(found), "size": size}
    return facts | ({"sha256": found[0][1]} if len(found) == 1 and size > LARGE else {})


def show(entries: Iterable[Entry]) -> None:
    """Count and bytes of what stands in each folder."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for entry in entries:
        path = PurePosixPath(entry.name)
        key = f"{path.parent}/*{path.suffix}" if path.suffix else str(path)
        counts[key] += 1
        sizes[key] += entry.size
    for key, count in sorted(counts.items()):
        sys.stdout.write(f"{count:6} {sizes[key]:12,} {key}\n")


if __name__ == "__main__":
    sys.exit(main())
