"""Write a trained model as it ships in the package, and say its size and what storing it cost.

`python dev/pack_smol.py runs/smol/instruction_tuning/model` writes hovle/packaged/smol: the language model comes by
`hovle fetch`, what was learnt beside it ships in 8 bits. `--cards data/smol/card.json --assets easy-vqa ...` name what
it was trained on, for the file ATTRIBUTION.md beside it. `--out DIR` writes elsewhere, to look at. What stage I
learnt ships by `python dev/pack_smol.py runs/smol/distillation/model --name smol-distilled --rank 0`.
"""

import argparse
import sys
from pathlib import Path

from hovle.assets import language_model
from hovle.files.documents import load_json
from hovle.packaged import NAMES, SHIPPED, STARTS
from hovle.packaged.packing import pack

MOST_BYTES = 40e6
"""Of a shipped model."""


def trained_on(card: Path) -> list[str]:
    """Assets that the training part of a build was drawn from; what the language model wrote itself is none."""
    sources = load_json(card)["sources"].values()
    return [source["asset"] for source in sources if source["package"] != "-" and "train" in source["splits"]]


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path, help="model folder")
    parser.add_argument("--name", choices=(*NAMES, *STARTS), default="smol")
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of hovle/packaged/NAME")
    parser.add_argument("--asset", default="smollm2-135m-instruct", help="language model it was built around")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters it was tuned with; 0: none (16)")
    parser.add_argument("--cards", type=Path, nargs="*", default=[], help="card.json of builds it was trained on")
    parser.add_argument("--assets", nargs="*", default=[], metavar="NAME", help="further assets: data, teachers")
    args = parser.parse_args()
    learnt_from = [*(name for card in args.cards for name in trained_on(card)), *args.assets]
    out = args.out or SHIPPED / args.name
    told = pack(args.trained, language_model(name=args.asset), args.asset, args.name, out, args.rank, learnt_from)
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
