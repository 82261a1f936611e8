"""Stage I, distillation: the new layers learn to describe pictures as the teacher does, in the LLM's own embeddings.

Trains the patch stem and the holistic layers; the language model's layers do not even run.
Minimises the negative cosine to the image teacher's features at picture positions plus the negative cosine to the
LLM's text embeddings everywhere else, on pictures paired with random tokens, with a penalty that keeps picture
outputs as long as text embeddings.

  python train/distillation.py                           the miniature recipe, on any machine
  python train/distillation.py my_stage.yaml num_steps=5000
  torchrun --nproc-per-node 8 train/distillation.py my_stage.yaml
  accelerate launch train/distillation.py my_stage.yaml --resume

The same as `hovle train RECIPE`. The recipe, by default hovle/recipes/demo/distillation.yaml, says what
trains, on which data, towards which objective and on which schedule; all stages share
hovle/train/run/loop.py.
"""

import sys

from hovle.train.__main__ import run_recipe

if __name__ == "__main__":
    sys.exit(run_recipe(sys.argv[1:], default="demo/distillation"))
