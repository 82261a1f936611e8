"""Where the tests find the repository and its golden checkpoints, whichever room a test lives in."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
