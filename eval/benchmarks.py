"""Score a model on benchmarks: `python eval/benchmarks.py MODEL --suite offline`, as `hovle eval benchmarks` does."""

import sys

from hovle.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", "benchmarks", *sys.argv[1:]]))
