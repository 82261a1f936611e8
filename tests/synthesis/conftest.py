"""A few crafted assets: words that mean nothing, one font under the names of all families."""

from pathlib import Path

import pytest
from drawn_packages import write_words_and_fonts


@pytest.fixture(scope="session")
def crafted_assets(tmp_path_factory) -> Path:
    """A folder as `--assets` takes it."""
    return write_words_and_fonts(tmp_path_factory.mktemp("assets"))
