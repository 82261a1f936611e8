"""Run the test suite with other versions of transformers or torch, and note the result in dev/versions.json.

  .venv/bin/python dev/versions.py                          # what is installed
  .venv/bin/python dev/versions.py transformers==5.16.1 'huggingface_hub<2' httpx httpcore h11 anyio
  .venv/bin/python dev/versions.py torch==2.6.0 torchvision==0.21.0

The named packages are installed into a temporary folder that comes before the environment's own; all others stay as
they are, so a set that cannot work together shows as failing tests, not as another resolution.
"""

import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "dev" / "versions.json"
WATCHED = ("torch", "transformers", "tokenizers", "huggingface_hub", "safetensors", "pillow")


def main(requirements: list[str]) -> int:
    """Install, test, note; the suite's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": folder if requirements else ""}
        if requirements:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
            subprocess.run([*install, *requirements], check=True)
        versions = _output(
            f"import importlib.metadata as m; print({{n: m.version(n) for n in {WATCHED}}})", environment
        )
        print(f"Testing with {versions}")  # noqa: T201 - this is the command's output
        finished = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    print(finished.stdout[-4000:])  # noqa: T201
    summaries = [line for line in finished.stdout.splitlines() if re.search(r"\d+ (passed|failed)", line)]
    if not summaries:
        raise SystemExit("The suite did not run; name what these versions need besides. Nothing was noted.")
    counts = {
        kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|error|deselected)", summaries[-1])
    }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    result = {
        "requirements": requirements,
        "versions": json.loads(versions.replace("'", '"')),
        "python": sys.version.split()[0],
        **counts,
        "failures": re.findall(r"^(?:FAILED|ERROR) (\S+)", finished.stdout, re.MULTILINE),
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    known = [item for item in known if item["requirements"] != requirements]
    RESULTS.write_text(json.dumps([*known, result], indent=1) + "\n")
    return finished.returncode


def _output(program: str, environment: dict[str, str]) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return finished.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
