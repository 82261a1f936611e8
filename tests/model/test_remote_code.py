"""A saved folder loads with `trust_remote_code=True` where hovle cannot be imported, and answers the same."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from hovle import HoVLEForConditionalGeneration, HoVLEModel, HoVLEProcessor
from hovle.model.remote_code import AUTO_MAP

MESSAGES = [
    {"role": "user", "content": [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "What is it?"}]}
]

WITHOUT_HOVLE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hovle":
            raise ImportError("hovle is not installed here")

sys.meta_path.insert(0, Absent())
import json
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

folder, messages = sys.argv[1], json.loads(sys.argv[2])
if messages == "copy":
    {"config": AutoConfig, "model": AutoModelForImageTextToText, "bare": AutoModel}[sys.argv[4]].from_pretrained(
        folder, trust_remote_code=True
    ).save_pretrained(sys.argv[3])
    print(json.dumps("hovle" in sys.modules))
    sys.exit()
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
names = [
    type(part.from_pretrained(folder, trust_remote_code=True)).__name__
    for part in (AutoConfig, AutoModel, AutoImageProcessor)
]
model.save_pretrained(sys.argv[3])  # a copy of the copy
processor.save_pretrained(sys.argv[3])
tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()
print(json.dumps({"tokens": tokens, "names": names, "hovle": "hovle" in sys.modules}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_tokenizer, tiny_config):
    """A folder with a tiny model, its processor and a picture beside it; also the model and the processor."""
    folder = tmp_path_factory.mktemp("saved")
    processor = HoVLEProcessor.from_language_model(make_tokenizer(), image_size=56, max_tiles=4)
    config = tiny_config(image_token_id=processor.image_token_id)
    torch.manual_seed(0)
    model = HoVLEForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    Image.effect_noise((80, 60), 50).convert("RGB").save(folder / "picture.png")
    return folder, model, processor


def in_another_process(folder: Path, destination: Path, cache: Path, copy: str | None = None):
    """What a process without hovle makes of a folder; with `copy`, it only loads that part and saves it again."""
    messages = json.dumps("copy" if copy else messages_about(folder))
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_HOVLE, str(folder), messages, str(destination), str(copy)],
        env={**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


def messages_about(folder: Path) -> list[dict]:
    picture, text = MESSAGES[0]["content"]
    return [{"role": "user", "content": [{**picture, "path": str(folder / "picture.png")}, text]}]


def greedy_tokens(model, processor, folder: Path) -> list[list[int]]:
    inputs = processor.apply_chat_template(
        messages_about(folder), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()


def test_a_saved_folder_runs_without_hovle(saved, tmp_path):
    folder, model, processor = saved
    found = in_another_process(folder, tmp_path / "copy", tmp_path / "cache")
    assert found == {
        "tokens": greedy_tokens(model, processor, folder),
        "names": ["HoVLEConfig", "HoVLEModel", "HoVLEImageProcessor"],
        "hovle": False,
    }
    # What that process saved loads again, here and there.
    (tmp_path / "copy" / "picture.png").write_bytes((folder / "picture.png").read_bytes())
    assert in_another_process(tmp_path / "copy", tmp_path / "again", tmp_path / "cache2") == found
    copy = AutoModelForImageTextToText.from_pretrained(tmp_path / "copy")
    assert isinstance(copy, HoVLEForConditionalGeneration)
    assert greedy_tokens(copy, AutoProcessor.from_pretrained(tmp_path / "copy"), folder) == found["tokens"]


def test_bytes_are_normalised_without_hovle_too(saved, tmp_path):
    folder, model, processor = saved
    copy = shutil.copytree(folder, tmp_path / "bytes")
    processor = HoVLEProcessor.from_pretrained(folder, do_rescale=False, do_normalize=False)
    processor.save_pretrained(copy)
    assert processor.image_processor(copy / "picture.png")["pixel_values"][0].dtype == "uint8"
    found = in_another_process(copy, tmp_path / "copy", tmp_path / "cache")
    assert found["tokens"] == greedy_tokens(model, processor, folder)


def test_every_class_of_the_auto_map_is_in_the_folder(saved):
    folder = saved[0]
    content = json.loads((folder / "config.json").read_text())
    assert content["auto_map"] == AUTO_MAP
    for target in AUTO_MAP.values():
        module, name = target.split(".")
        assert f"class {name}(" in (folder / f"{module}.py").read_text()


@pytest.mark.parametrize("part", ["config", "model", "bare"])
def test_a_part_saved_without_hovle_takes_all_code_along(part, saved, tmp_path):
    folder, model, processor = saved
    assert in_another_process(folder, tmp_path / "copy", tmp_path / "cache", copy=part) is False
    content = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert content["auto_map"] == AUTO_MAP
    assert {file.name for file in (tmp_path / "copy").glob("*.py")} == {file.name for file in folder.glob("*.py")}
    if part == "model":  # with the processor's own files beside it, the copy is whole
        for file in {*folder.glob("*.json"), *folder.glob("*.jinja"), folder / "picture.png"}:
            if not (tmp_path / "copy" / file.name).exists():
                shutil.copyfile(file, tmp_path / "copy" / file.name)
        found = in_another_process(tmp_path / "copy", tmp_path / "again", tmp_path / "cache2")
        assert found["tokens"] == greedy_tokens(model, processor, folder)


def test_the_bare_model_takes_the_same_code_along(saved, tmp_path):
    saved[1].model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert isinstance(HoVLEModel.from_pretrained(tmp_path), HoVLEModel)


def test_the_pipeline_answers_like_the_model(saved):
    folder, model, processor = saved
    answer = pipeline("image-text-to-text", model=str(folder))(
        text=messages_about(folder), max_new_tokens=6, do_sample=False, return_full_text=False
    )
    tokens = torch.tensor(greedy_tokens(model, processor, folder))
    prompt_length = tokens.shape[1] - 6
    expected = processor.decode(tokens[0, prompt_length:], skip_special_tokens=True)
    assert answer[0]["generated_text"] == expected
