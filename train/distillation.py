"""Stage I, distillation: the new layers learn to describe pictures as the teacher does, in the LLM's own embeddings.

  starts from   a bare language model, around which stem and holistic layers are new
  trains        stem, holistic_layers; the language model's layers do not even run
  on            pictures, each paired with random tokens
  towards       distillation: the image teacher's features at picture positions, the LLM's text embeddings everywhere
                else, with a penalty that keeps picture outputs as long as text embeddings
  leaves        a model folder for alignment

  python train/distillation.py                            the miniature, demo/distillation
  python train/distillation.py my_stage.yaml num_steps=5000
  torchrun --nproc-per-node 8 train/distillation.py my_stage.yaml --resume

The same as `hovle train RECIPE`: a recipe says all of the above in YAML, and hovle/train/run/stage.py tells the rest.
"""

import sys

from hovle.train.__main__ import run_recipe

if __name__ == "__main__":
    sys.exit(run_recipe(sys.argv[1:], default="demo/distillation"))
