"""`hovle/model` is what travels with a checkpoint: the folder alone, under any name, loads a model and answers."""

import ast
import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from places import ROOT

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor

FOLDER = ROOT / "hovle" / "model"

GENERATE = """
import json
import sys

sys.modules["hovle"] = None  # importing it fails
sys.path.insert(0, sys.argv[1])
from PIL import Image
from transformers import AutoConfig
from travelled.configuration_hovle import HoVLEConfig
from travelled.modeling_hovle import HoVLEForConditionalGeneration
from travelled.processing_hovle import HoVLEProcessor

AutoConfig.register("hovle", HoVLEConfig)  # else the processor asks whether the saved folder's own code may run
model = HoVLEForConditionalGeneration.from_pretrained(sys.argv[2]).eval()
processor = HoVLEProcessor.from_pretrained(sys.argv[2])
inputs = processor(text=sys.argv[4], images=[Image.open(sys.argv[3])], return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()
try:
    import hovle
except ImportError:
    print(json.dumps(tokens))
"""


def test_the_folder_alone_generates_where_hovle_cannot_be_imported(tmp_path, make_tokenizer, tiny_config):
    processor = HoVLEProcessor.from_language_model(make_tokenizer(), image_size=56, max_tiles=4)
    torch.manual_seed(0)
    model = HoVLEForConditionalGeneration(tiny_config(image_token_id=processor.image_token_id)).eval()
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    picture = tmp_path / "picture.png"
    Image.effect_noise((80, 60), 50).convert("RGB").save(picture)
    shutil.copytree(FOLDER, tmp_path / "room" / "travelled", ignore=shutil.ignore_patterns("__pycache__"))
    text = f"{processor.image_token} What is it?"
    finished = subprocess.run(
        [sys.executable, "-c", GENERATE, str(tmp_path / "room"), str(tmp_path / "saved"), str(picture), text],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    inputs = processor(text=text, images=[Image.open(picture)], return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()
    assert json.loads(finished.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_files_import_each_other_as_transformers_finds_them(path):
    """`from .name import ...`: `from . import name` and other packages of hovle are not found beside a checkpoint."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, ast.unparse(node)
            assert node.module, ast.unparse(node)
            assert "." not in node.module, ast.unparse(node)
            assert (FOLDER / f"{node.module}.py").exists(), ast.unparse(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [item.name for item in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not [name for name in names if name.split(".")[0] == "hovle"], ast.unparse(node)


def test_the_folder_is_flat():
    assert not [path for path in FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"]
