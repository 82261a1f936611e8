"""Stage III, instruction tuning: next-token prediction, everything learns.

Starts from the model folder alignment wrote. With `lora` in the recipe the language model learns through low-rank
adapters instead; the saved model has them merged.

  python train/instruction_tuning.py                           the miniature recipe, on any machine
  python train/instruction_tuning.py my_stage.yaml num_steps=5000
  torchrun --nproc-per-node 8 train/instruction_tuning.py my_stage.yaml
  accelerate launch train/instruction_tuning.py my_stage.yaml --resume

The same as `hovle train RECIPE`. The recipe, by default hovle/recipes/demo/instruction_tuning.yaml, says what
trains, on which data, towards which objective and on which schedule; all stages share
hovle/train/run/loop.py.
"""

import sys

from hovle.train.__main__ import run_recipe

if __name__ == "__main__":
    sys.exit(run_recipe(sys.argv[1:], default="demo/instruction_tuning"))
