#!/usr/bin/env bash
# Measure every figure the documents show, and write it into them.
set -euo pipefail
cd "$(dirname "$0")/.."
hovle demo --fresh
mkdir -p eval/results/demo
cp runs/demo/report.json eval/results/demo/report.json
python eval/tables.py
