#!/usr/bin/env bash
# Measure every figure the documents show, and write it into them.
set -euo pipefail
cd "$(dirname "$0")/.."
hovle demo --fresh
mkdir -p eval/results/demo
cp runs/demo/report.json eval/results/demo/report.json
hovle eval benchmarks runs/demo/instruction_tuning/model --suite offline --resume --output eval/results/benchmarks/demo
python eval/tables.py
