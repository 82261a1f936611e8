"""The worked example of train/README.md, with a tiny language model and teacher in the place of the real ones."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from hovle import HoVLEForConditionalGeneration
from hovle.cli import main

EXAMPLE = ROOT / "train" / "example"
STAGES = ("distillation", "alignment", "instruction_tuning")

SHORT = ["num_steps=2", "rows_per_batch=1", "row_length=1024", "packing_window=4", "dtype=float32", "compile=off"]
LITTLE_TEXT = ["retention.num_tokens=256", "retention.window=64"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_the_example_goes_from_pictures_to_a_model(tmp_path, monkeypatch, language_models, teacher_weights):
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, str(EXAMPLE / "prepare.py"), "example_data"], check=True, timeout=200)
    entries = json.loads((tmp_path / "example_data/conversations.json").read_text())
    assert len(entries) == len(list((tmp_path / "example_data/pictures").iterdir())) == 600
    stand_ins = [f"model.language_model={language_models['tied']}", "teacher.name=test_efficientnet"]
    stand_ins += [f"teacher.checkpoint={teacher_weights}"]
    for stage in STAGES:
        own = stand_ins if stage == "distillation" else []
        assert main(["train", str(EXAMPLE / f"{stage}.yaml"), *SHORT, *LITTLE_TEXT, *own]) == 0
        assert main(["train", "report", f"runs/example/{stage}"]) == 0
    model = HoVLEForConditionalGeneration.from_pretrained("runs/example/instruction_tuning/model")
    assert model.config.num_embedding_layers == 4
    entries = [json.loads(line) for line in Path("runs/example/alignment/log.jsonl").read_text().splitlines()]
    assert {"start", "validation", "image_ablation", "finish"} <= {entry.get("event") for entry in entries}


def test_the_guide_names_what_is_there():
    guide = (ROOT / "train/README.md").read_text()
    named = set(re.findall(r"train/example/[a-z_]+\.\w+", guide))
    assert named == {f"train/example/{stage}.yaml" for stage in STAGES} | {"train/example/prepare.py"}
    assert all((ROOT / name).is_file() for name in named)
