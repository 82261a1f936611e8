"""Score a model on easy-VQA by free generation: `python eval/easy_vqa.py MODEL [--questions 1000]`.

Prints one JSON object with exact match on balanced questions for the true, blank and shuffled pictures and on evenly
drawn questions, the same way `hovle demo` measures.
"""

import argparse
import json
import sys
from pathlib import Path

from hovle.assets import easy_vqa
from hovle.eval.vqa import score_model

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--questions", type=int, default=1000, help="test questions, drawn with a fixed seed")
    options = parser.parse_args()
    scores, _ = score_model(options.model, easy_vqa() / "test", options.questions)
    sys.stdout.write(json.dumps(scores) + "\n")
