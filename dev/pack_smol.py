"""Write a trained model as it ships in the package, and say its size and what storing it cost.

`python dev/pack_smol.py runs/smol/instruction_tuning/model` writes hovle/packaged/smol: the language model comes by
`hovle fetch`, what was learnt beside it ships in 8 bits. `--out DIR` writes elsewhere, to look at. The layers that
learnt letters ship by `python dev/pack_smol.py runs/smol/letters/model --name smol-letters --rank 0`.
"""

import argparse
import sys
from pathlib import Path

from hovle.assets import language_model
from hovle.packaged import LOWER_LAYERS, NAMES, SHIPPED
from hovle.packaged.packing import pack

MOST_BYTES = 40e6
"""Of a shipped model."""


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path, help="model folder")
    parser.add_argument("--name", choices=(*NAMES, *LOWER_LAYERS), default="smol")
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of hovle/packaged/NAME")
    parser.add_argument("--asset", default="smollm2-135m-instruct", help="language model it was built around")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters it was tuned with; 0: none (16)")
    args = parser.parse_args()
    out = args.out or SHIPPED / args.name
    told = pack(args.trained, language_model(name=args.asset), args.asset, args.name, out, args.rank)
    total = sum(file["bytes"] for file in told["files"].values())
    kinds = ", ".join(f"{kind} {size / 1e6:.2f}" for kind, size in told["weights_by_kind"].items())
    loss = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in told["loss"].items())
    print(f"{out}: {total / 1e6:.1f} MB (weights: {kinds} MB)\nlost by storing: {loss}")  # noqa: T201
    if total > MOST_BYTES:
        print(f"More than {MOST_BYTES / 1e6:.0f} MB: was it tuned by adapters of this rank?", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"pack_smol: {error}")
