"""What the tests of assets share."""

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of this test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HOVLE_CACHE", str(folder))
    monkeypatch.delenv("HOVLE_DOWNLOADS", raising=False)
    return folder
