"""Figures in the documents come from result files."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_table_in_the_documents_is_stale():
    result = subprocess.run(
        [sys.executable, "eval/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
