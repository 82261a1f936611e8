"""Run the test suite with other versions of transformers, torch or Python, and note the result in dev/versions.json.

  .venv/bin/python dev/versions.py                          # what is installed
  .venv/bin/python dev/versions.py transformers==5.16.1 'huggingface_hub<2' httpx httpcore h11 anyio
  python3.11 dev/versions.py --pair 2.6.0 5.16.1 [--pip='--find-links DIR'] [--keep DIR] [torchvision==0.21.0 ...]
  python3.13 dev/versions.py --pair 2.14.1 5.24.0 --tests tests/convert tests/serve

Packages named alone are installed into a temporary folder that comes before the environment's own; all others stay as
they are, so a set that cannot work together shows as failing tests, not as another resolution.

`--pair TORCH TRANSFORMERS` builds a virtual environment of its own: this checkout with all its extras, those two
versions, the named packages and else what pip resolves within constraints.txt; a package of constraints.txt that these
two rule out is left to pip. It needs about 7 GB of disk, and is of the Python that runs this file.
"""

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "dev" / "versions.json"
WATCHED = ("torch", "transformers", "tokenizers", "huggingface_hub", "safetensors", "pillow")

TIED = {
    "torch": ("torch", "torchvision", "triton", "sympy"),
    "transformers": ("transformers", "tokenizers", "huggingface-hub", "hf-xet", "httpx", "httpcore", "h11", "anyio"),
}
"""Packages whose versions go with another one's; `nvidia-...` ones go with torch as well."""


def main(arguments: Sequence[str]) -> int:
    """Install, test, note; the suite's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requirements", nargs="*", help="packages with versions, as pip takes them")
    parser.add_argument("--pair", nargs=2, metavar=("TORCH", "TRANSFORMERS"), help="versions of an environment")
    parser.add_argument("--tests", nargs="+", default=[], metavar="PATH", help="only these tests, which are noted")
    parser.add_argument("--pip", default="", help="options for pip, for instance '--find-links DIR'")
    parser.add_argument("--keep", type=Path, help="folder of the environment, which is built only where there is none")
    args = parser.parse_args(arguments)
    if args.pair is None and (args.pip or args.keep):
        parser.error("--pip and --keep go with --pair")
    with tempfile.TemporaryDirectory() as temporary:
        if args.pair is None:
            requirements, python = args.requirements, sys.executable
            environment = beside_installed(requirements, temporary)
        else:
            torch, transformers = args.pair
            requirements = [f"torch=={torch}", f"transformers=={transformers}", *args.requirements]
            python = own_environment(requirements, args.keep or Path(temporary) / "venv", shlex.split(args.pip))
            environment = {**os.environ, "PYTHONPATH": ""}
        result = test(python, environment, args.tests)
    result = {"requirements": requirements, "own_environment": args.pair is not None, **result}
    note(result, RESULTS)
    return result["exit_code"]


def beside_installed(requirements: Sequence[str], folder: str) -> dict[str, str]:
    """Install packages into a folder, not what they depend on, and give an environment in which they come first."""
    if not requirements:
        return {**os.environ, "PYTHONPATH": ""}
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    subprocess.run([*install, *requirements], check=True)
    return {**os.environ, "PYTHONPATH": folder}


def own_environment(requirements: Sequence[str], folder: Path, pip_options: Sequence[str]) -> str:
    """Build a virtual environment with this checkout and these packages, unless it stands; its interpreter."""
    python = folder.absolute() / "bin" / "python"  # not resolved: a link leads out of it
    ready = folder / ".ready"
    wanted = "\n".join(requirements)
    if ready.exists():
        found = ready.read_text(encoding="utf-8")
        if found != wanted:
            raise SystemExit(f"{folder} was built for {found.split()}: name another folder.")
        return str(python)
    venv.create(folder, with_pip=True)
    constraints = folder / "constraints.txt"
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints.write_text("\n".join(loosened(pinned, requirements)), encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pip_options]
    subprocess.run(
        [*install, "--constraint", str(constraints), "torchvision", *requirements, "--editable", f"{ROOT}[dev]"],
        check=True,
    )
    ready.write_text(wanted, encoding="utf-8")
    return str(python)


def loosened(constraints: Sequence[str], requirements: Sequence[str]) -> list[str]:
    """Constraints without the packages that are named otherwise and those whose versions go with them."""
    named = {_name(requirement) for requirement in requirements if requirement not in constraints}
    free = named | {_name(other) for name in named for other in TIED.get(name, ())}
    kept = []
    for line in constraints:
        name = _name(line)
        if name not in free and not ("torch" in named and name.startswith("nvidia-")):
            kept.append(line)
    return kept


def _name(requirement: str) -> str:
    """`huggingface-hub` of `huggingface_hub<2`."""
    return re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0].lower().replace("_", "-")


def test(python: str, environment: dict[str, str], tests: Sequence[str]) -> dict:
    """Run the suite or some tests; versions, counts, failures, commit, date. Nothing is noted where it did not run."""
    program = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {WATCHED}}}))"
    versions = json.loads(_output([python, "-c", program], environment))
    interpreter = _output([python, "-c", "import platform; print(platform.python_version())"], environment)
    print(f"Testing with {versions}")  # noqa: T201 - this is the command's output
    finished = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", *tests],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    print(finished.stdout[-4000:])  # noqa: T201
    counts, failures = read_summary(finished.stdout)
    return {
        "versions": versions,
        "python": interpreter,
        **({"tests": list(tests)} if tests else {}),
        **counts,
        "failures": failures,
        "exit_code": finished.returncode,
        "commit": _output(["git", "rev-parse", "--short", "HEAD"], dict(os.environ)),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def read_summary(output: str) -> tuple[dict[str, int], list[str]]:
    """Counts by outcome and the tests that failed, from what pytest prints."""
    summaries = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|errors?)\b", line)]
    if not summaries:
        raise SystemExit("The suite did not run; name what these versions need besides. Nothing was noted.")
    pairs = re.findall(r"(\d+) (passed|failed|error|skipped|deselected)", summaries[-1])
    counts = {kind: int(number) for number, kind in pairs}
    return counts, re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)


def note(result: dict, file: Path) -> None:
    """Put a result in the place of an earlier one for the same packages and Python, installed the same way."""

    def key(item: dict) -> tuple:
        return item["requirements"], item.get("own_environment", False), item["python"].rpartition(".")[0]

    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    kept = [item for item in known if key(item) != key(result)]
    file.write_text(json.dumps([*kept, result], indent=1) + "\n", encoding="utf-8")


def _output(command: Sequence[str], environment: dict[str, str]) -> str:
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return finished.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
