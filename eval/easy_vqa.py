"""Score a model on easy-VQA by free generation: `python eval/easy_vqa.py MODEL [--questions 1000]`.

Prints one JSON object with exact match on balanced questions for the true, blank and shuffled pictures and on evenly
drawn questions, the same way `hovle demo train` measures. `--wording`, without a model, says how much questions tell.
"""

import argparse
import json
import sys
from pathlib import Path

from hovle.assets import easy_vqa
from hovle.assets.vqa_questions import describe_wording, load_questions
from hovle.eval.vqa import score_model

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("model", type=Path, nargs="?", help="model folder")
    what.add_argument("--wording", action="store_true", help="count questions, and those their wording answers")
    parser.add_argument("--questions", type=int, default=1000, help="test questions, drawn with a fixed seed")
    options = parser.parse_args()
    if options.wording:
        found = describe_wording(*(load_questions(easy_vqa() / split) for split in ("train", "test")))
    else:
        found, _ = score_model(options.model, easy_vqa() / "test", options.questions)
    sys.stdout.write(json.dumps(found) + "\n")
