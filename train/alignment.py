"""Stage II, alignment: pictures come to mean something to a language model that does not change by a bit.

  starts from   the model folder distillation wrote, checked by its hand-off probe
  trains        stem, holistic_layers; gradients reach them through the frozen language model
  on            conversations about pictures
  towards       next_token: every token of the replies
  leaves        a model folder for instruction tuning

  python train/alignment.py                            the miniature, demo/alignment
  python train/alignment.py my_stage.yaml num_steps=5000
  torchrun --nproc-per-node 8 train/alignment.py my_stage.yaml --resume

The same as `hovle train RECIPE`: a recipe says all of the above in YAML, and hovle/train/run/stage.py tells the rest.
"""

import sys

from hovle.train.__main__ import run_recipe

if __name__ == "__main__":
    sys.exit(run_recipe(sys.argv[1:], default="demo/alignment"))
