"""`python -m hovle` is the same as `hovle`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
