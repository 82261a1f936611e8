"""What may be fetched: the entries of manifest.json, each pinned and licensed."""

import json
from dataclasses import dataclass
from pathlib import Path

MANIFEST = Path(__file__).with_name("manifest.json")
"""The one list of what may be fetched: version, source, sha256, licence and size of every asset."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """Files to take out of a wheel; everything else in it is left packed."""

    pattern: str
    """Path inside the wheel; `*` and `?` match within one folder level."""

    to: str
    """Path inside the asset's folder; a folder when it ends in `/`."""

    count: int
    """Number of files the pattern matches."""

    size: int
    """Unpacked bytes of these files together."""

    sha256: str | None = None
    """Of the unpacked file, for single large ones."""


@dataclass(frozen=True, kw_only=True)
class WheelSource:
    """A wheel of the Python package index, pinned by version and hash."""

    package: str
    version: str
    filename: str
    url: str
    sha256: str
    size: int
    """Bytes of the wheel itself."""

    members: tuple[Member, ...]

    @property
    def unpacked_size(self) -> int:
        return sum(member.size for member in self.members)

    @property
    def pip_command(self) -> str:
        """What downloads the wheel on any machine with pip."""
        return f"python -m pip download --no-deps --only-binary=:all: {self.package}=={self.version}"


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
    """`language_model`, `teacher` or `dataset`."""

    description: str
    licence: str
    homepage: str
    pypi: WheelSource
    hub: HubSource | None


def load_manifest(path: Path | None = None) -> dict[str, Asset]:
    """Read what may be fetched, by name, in the order of the file; by default that of this version of hovle."""
    path = path or MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["format"] != 1:
        raise ValueError(f"{path} has manifest format {content['format']}; this version of hovle reads format 1.")
    assets = {}
    for entry in content["assets"]:
        sources = entry.pop("sources")
        wheel = {**sources["pypi"], "members": tuple(Member(**member) for member in sources["pypi"]["members"])}
        hub = sources.get("hub")
        if hub is not None:
            hub = HubSource(**{**hub, "files": tuple(hub["files"]), "required": tuple(hub["required"])})
        assets[entry["name"]] = Asset(**entry, pypi=WheelSource(**wheel), hub=hub)
    return assets


def find_asset(name: str) -> Asset:
    """The entry of this name; ValueError with the names there are."""
    assets = load_manifest()
    if name not in assets:
        raise ValueError(f"There is no asset named {name!r}; there are {', '.join(assets)}.")
    return assets[name]


def find_kind(kind: str) -> Asset:
    """The one entry of this kind."""
    (asset,) = (asset for asset in load_manifest().values() if asset.kind == kind)
    return asset
