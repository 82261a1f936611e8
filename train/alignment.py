"""Stage II, alignment: next-token prediction through the frozen language model.

Starts from the model folder distillation wrote. Trains the patch stem and the holistic layers, so pictures come to
mean something to a language model that does not change by a bit.

  python train/alignment.py                           the miniature recipe, on any machine
  python train/alignment.py my_stage.yaml num_steps=5000
  torchrun --nproc-per-node 8 train/alignment.py my_stage.yaml
  accelerate launch train/alignment.py my_stage.yaml --resume

The same as `hovle train RECIPE`. The recipe, by default hovle/recipes/demo/alignment.yaml, says what
trains, on which data, towards which objective and on which schedule; all stages share
hovle/train/run/loop.py.
"""

import sys

from hovle.train.__main__ import run_recipe

if __name__ == "__main__":
    sys.exit(run_recipe(sys.argv[1:], default="demo/alignment"))
