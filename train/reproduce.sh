#!/usr/bin/env bash
# The three stages of the miniature in order, each starting from the model the one before it wrote.
# Usage: train/reproduce.sh [key=value ...]     overrides apply to every stage, e.g. num_steps=4 for a quick try
set -euo pipefail
cd "$(dirname "$0")/.."
for stage in distillation alignment instruction_tuning; do
  python "train/$stage.py" "demo/$stage" "$@"
done
