"""Stage III, instruction tuning: everything learns to answer.

  starts from   the model folder alignment wrote, checked by its hand-off probe
  trains        stem, holistic_layers, language_model; with `lora` in the recipe the last through low-rank adapters,
                which the saved model has merged
  on            conversations about pictures
  towards       next_token: every token of the replies
  leaves        the model to chat with

  python train/instruction_tuning.py                            the miniature, demo/instruction_tuning
  python train/instruction_tuning.py my_stage.yaml num_steps=5000
  torchrun --nproc-per-node 8 train/instruction_tuning.py my_stage.yaml --resume

The same as `hovle train RECIPE`: a recipe says all of the above in YAML, and hovle/train/run/stage.py tells the rest.
"""

import sys

from hovle.train.__main__ import run_recipe

if __name__ == "__main__":
    sys.exit(run_recipe(sys.argv[1:], default="demo/instruction_tuning"))
