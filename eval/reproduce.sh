#!/usr/bin/env bash
# Measure every figure the documents show, and write it into them.
set -euo pipefail
cd "$(dirname "$0")/.."
hovle demo train --fresh
mkdir -p eval/results/demo
cp runs/demo/report.json eval/results/demo/report.json
python eval/easy_vqa.py --wording > eval/results/demo/questions.json
hovle eval benchmarks runs/demo/instruction_tuning/model --suite offline --batch-size 1 --dtype bfloat16 --output runs/demo/one
hovle eval benchmarks runs/demo/instruction_tuning/model --suite offline --resume --batch-size 64 --dtype bfloat16 \
    --output eval/results/benchmarks/demo --compare runs/demo/one
demo=runs/demo analyses=eval/results/analyses picture=eval/results/analyses/picture.png llm=asset:smollm2-135m-instruct
hovle eval attention $demo/instruction_tuning/model $picture "what shape is in the image?" \
    --compare $demo/distillation/model --output $analyses/attention
hovle eval embeddings $demo/instruction_tuning/model $picture --language-model $llm --output $analyses/embeddings
hovle eval retention $demo/{distillation,alignment,instruction_tuning}/model --language-model $llm \
    --replay smollm2_replay_held_out --output $analyses/retention
python dev/language_price.py demo --out eval/results/demo/language_price.json
hovle bench data --out eval/results/speed/data.json
hovle bench train
python eval/tables.py
