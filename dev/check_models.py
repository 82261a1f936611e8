"""Check the model files with transformers' own linter, without the rules that only fit files inside transformers."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import mlinter

NOT_OURS = {
    "TRF027": "asserts, which here tell the type checker what only our own code could break",
    "TRF051": "a look at the attention implementation: eager alone takes masks to add, and one line turns them",
    "TRF028": "licence header of the transformers repository",
    "TRF035": "noqa comments, which our linter settings need",
    "TRF041": "notes that name the checkpoints behind a branch",
    "TRF057": "generated docstrings, which hide shapes and errors",
}
"""Rules switched off, with the reason."""


def main() -> int:
    """Run the linter on the package; return its exit code."""
    rules = (Path(mlinter.__file__).parent / "rules.toml").read_text(encoding="utf-8")
    for name in NOT_OURS:
        rules, count = re.subn(rf"(\[rules\.{name}\][^\[]*?default_enabled = )true", r"\1false", rules)
        if count != 1:
            raise SystemExit(f"Rule {name} is not in this version of the linter: remove it here.")
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
        file.write(rules)
        file.flush()
        command = [sys.executable, "-m", "mlinter", "--no-progress", "--rules-toml", file.name, "hovle"]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
