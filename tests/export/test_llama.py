"""`hovle export --to llama`: a stock decoder and a stem give what the model gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor, cli
from hovle.export.command import export
from hovle.export.flat import stock_decoder
from hovle.export.stem import Stem, gelu
from hovle.export.write_stem import STEM
from hovle.files import atomic

QUESTION = "What is in the picture?"

ANSWER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Absent())
sys.path.insert(0, sys.argv[1] + "/stem")
"""

WITHOUT_HOVLE = (
    ANSWER.format(absent=["hovle"])
    + """
import json
import torch
from PIL import Image
from stem import Stem
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
stem = Stem(sys.argv[1] + "/stem/stem.safetensors")
features = stem(Image.open(sys.argv[2]))
chat = [{"role": "user", "content": stem.prompt(len(features)) + sys.argv[3]}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
embeds = model.get_input_embeddings()(ids).detach()
embeds[ids == stem.image_token_id] = torch.from_numpy(features)
tokens = model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False)
print(json.dumps({"class": type(model).__name__, "ids": ids[0].tolist(), "tokens": tokens[0].tolist()}))
"""
)

NUMPY_AND_PILLOW = (
    ANSWER.format(absent=["hovle", "torch", "transformers", "safetensors", "torchvision"])
    + """
from PIL import Image
from stem import Stem

print(float(Stem(sys.argv[1] + "/stem/stem.safetensors")(Image.open(sys.argv[2])).sum()))
"""
)


def run(program: str, *arguments: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()[-1]


def chat(picture, question: str = QUESTION) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]


def encode(processor: HoVLEProcessor, picture) -> dict:
    return processor.apply_chat_template(
        chat(picture), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model_folder) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "exported"
    export(model_folder, folder, "llama")
    return folder


@pytest.mark.parametrize("family", ["cohere2", "gemma3_text", "granite", "llama", "mistral", "phi", "qwen2", "qwen3"])
def test_a_stock_decoder_answers_as_the_model(family, tmp_path, save_model, pictures):
    model = save_model(tmp_path / "model", family)
    export(tmp_path / "model", tmp_path / "exported", "llama")
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    assert type(decoder).__module__.startswith("transformers.models")
    assert decoder.config.num_hidden_layers == 4
    older = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert older.get("partial_rotary_factor") == {"phi": 0.5}.get(family)
    processor = HoVLEProcessor.from_pretrained(tmp_path / "model")
    stem = Stem(tmp_path / "exported" / STEM)
    inputs = encode(processor, pictures[0])
    embeds = decoder.get_input_embeddings()(inputs["input_ids"]).detach()
    embeds[inputs["input_ids"] == stem.image_token_id] = torch.from_numpy(stem(pictures[0]))
    with torch.no_grad():
        expected = model(**inputs).logits
        found = decoder(inputs_embeds=embeds).logits
    # Measured worst case: see the log; features in numpy differ from torch's by rounding.
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = decoder.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False)
    assert answer[0].tolist() == tokens.tolist()


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_type": "default", "rope_theta": 5e4},
        {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 64},
    ],
)
def test_engines_that_know_rotary_parameters_by_older_names_find_them(rotary, tmp_path, save_model):
    """MLX-LM 0.32 took a base of 10,000 without a word."""
    save_model(tmp_path / "model", "llama", {"rope_parameters": dict(rotary)})
    export(tmp_path / "model", tmp_path / "exported", "llama")
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written["rope_theta"] == rotary["rope_theta"]
    rest = {name: value for name, value in rotary.items() if name != "rope_theta"}
    assert written.get("rope_scaling", {"rope_type": "default"}) == rest
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").config.rope_parameters
    assert {name: found[name] for name in rotary} == rotary


def test_engines_that_take_every_file_of_tensors_find_the_decoders_weights_only(exported):
    """As vLLM's loader does, which ended in "no module or parameter named 'patch_embedding' in LlamaForCausalLM"."""
    names = {name for path in exported.glob("*.safetensors") for name in load_file(path)}
    assert names <= set(AutoModelForCausalLM.from_pretrained(exported).state_dict())


def test_the_folder_answers_where_hovle_is_not_installed(exported, model_folder, pictures, tmp_path):
    pictures[3].save(tmp_path / "picture.png")
    found = json.loads(run(WITHOUT_HOVLE, str(exported), str(tmp_path / "picture.png"), QUESTION))
    model = HoVLEForConditionalGeneration.from_pretrained(model_folder).eval()
    inputs = encode(HoVLEProcessor.from_pretrained(model_folder), pictures[3])
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
    assert found["class"] == "LlamaForCausalLM"
    assert found["ids"] == inputs["input_ids"][0].tolist()
    assert found["ids"] + found["tokens"] == tokens


def test_the_stem_needs_numpy_and_pillow_only(exported, pictures, tmp_path):
    pictures[1].save(tmp_path / "picture.png")
    found = float(run(NUMPY_AND_PILLOW, str(exported), str(tmp_path / "picture.png")))
    assert found == pytest.approx(float(Stem(exported / STEM)(pictures[1]).sum()), rel=1e-5)


def test_the_stem_cuts_pictures_as_the_processor_does(exported, model_folder, pictures):
    stem, processor = Stem(exported / STEM), HoVLEProcessor.from_pretrained(model_folder)
    counts = set()
    for picture in pictures:
        expected = processor.image_processor(picture, return_tensors="np")["pixel_values"]
        found = stem.tiles(picture)
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
        counts.add(len(found))
    assert len(counts) > 2


@pytest.mark.parametrize("most", [1, 2, 5, 12])
def test_the_stem_chooses_grids_as_the_processor_does(exported, model_folder, most):
    stem, processor = Stem(exported / STEM), HoVLEProcessor.from_pretrained(model_folder)
    stem.max_tiles = most
    for height in range(10, 400, 37):
        for width in range(10, 400, 41):
            grid = processor.image_processor.choose_grid(height, width, {"max_tiles": most})
            assert stem.grid(height, width) == tuple(grid)


@pytest.mark.parametrize(
    "fields", [{"pixel_shuffle_loc": "none", "patch_size": 28}, {"downsample_ratio": 1.0}, {"downsample_ratio": 0.25}]
)
def test_every_flat_stem_is_exported(fields, tmp_path, save_model):
    model = save_model(tmp_path / "model", with_processor=False, **fields)
    export(tmp_path / "model", tmp_path / "exported", "llama")
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output.numpy()
    found = Stem(tmp_path / "exported" / STEM).embed(pixels.numpy())
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_positions_are_those_of_the_tiles_that_the_processor_cuts(tmp_path, save_model, pictures):
    model = save_model(tmp_path / "model")
    processor = HoVLEProcessor.from_pretrained(tmp_path / "model", tile_size=84)
    processor.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "exported", "llama")
    with torch.no_grad():
        pixels = processor.image_processor(pictures[0], return_tensors="pt")["pixel_values"]
        expected = model.get_image_features(pixels).pooler_output.flatten(0, 1).numpy()
    assert pixels.shape[-1] == 84
    np.testing.assert_allclose(Stem(tmp_path / "exported" / STEM)(pictures[0]), expected, atol=1e-5)


def test_gelu_is_the_exact_one():
    values = torch.linspace(-12, 12, 4001)
    expected = torch.nn.functional.gelu(values.double()).float().numpy()
    # Measured worst case: see the log.
    np.testing.assert_allclose(gelu(values.numpy()), expected, atol=1e-6, rtol=0)


NOT_FLAT = {
    "HoVLE-HD": {"pixel_shuffle_loc": "post"},
    "normalize_encoder_output": {"normalize_encoder_output": True},
    "rope of their own": {"embedding_rope_parameters": {"rope_theta": 7.0}},
    "'bidirectional'": {"image_attention": "bidirectional"},
    "'stablelm'": {"family": "stablelm"},
}


@pytest.mark.parametrize("reason", NOT_FLAT)
def test_what_is_not_flat_is_refused_with_the_reason_and_what_remains(reason, tmp_path, save_model, capsys):
    save_model(tmp_path / "model", **NOT_FLAT[reason])
    command = ["export", str(tmp_path / "model"), str(tmp_path / "exported"), "--to", "llama"]
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert reason in error
    assert "hovle serve" in error
    assert not (tmp_path / "exported").exists()


def test_all_reasons_are_told_at_once(tmp_path, save_model):
    save_model(tmp_path / "model", normalize_encoder_output=True, image_attention="bidirectional")
    with pytest.raises(ValueError, match=r"normalize_encoder_output.*bidirectional"):
        export(tmp_path / "model", tmp_path / "exported", "llama")


def test_a_model_without_a_tokenizer_exports_weights_and_says_so(tmp_path, save_model, capsys):
    save_model(tmp_path / "model", with_processor=False)
    assert cli.main(["export", str(tmp_path / "model"), str(tmp_path / "exported"), "--to", "llama"]) == 0
    assert "no tokenizer" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").config.num_hidden_layers == 4
    with pytest.raises(ValueError, match="without a tokenizer"):
        Stem(tmp_path / "exported" / STEM).prompt(4)


def test_tokenizer_and_template_are_the_processors(exported, model_folder):
    processor, tokenizer = HoVLEProcessor.from_pretrained(model_folder), AutoTokenizer.from_pretrained(exported)
    for text in ("A bus, 12 apples", "  two  spaces\n\n", "<img><IMG_CONTEXT></img>", "<|im_start|>user"):
        assert tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    messages = [{"role": "user", "content": "What?"}]
    expected = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected


def test_the_exported_decoder_never_writes_a_placeholder(exported):
    decoder = AutoModelForCausalLM.from_pretrained(exported)
    assert 402 in decoder.generation_config.suppress_tokens


def test_no_weight_is_copied(model_folder):
    model = HoVLEForConditionalGeneration.from_pretrained(model_folder)
    decoder = stock_decoder(model)
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in decoder.parameters()} <= pointers


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path, model_folder, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists already"):
        export(model_folder, tmp_path / "full", "llama")

    def full_disk(*_) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(atomic, "rename_durably", full_disk)
    with pytest.raises(OSError, match="No space"):
        export(model_folder, tmp_path / "new", "llama")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_weights_that_differ_from_the_whole_are_not_exported(tmp_path, model_folder, monkeypatch):
    real = HoVLEForConditionalGeneration.get_image_features

    def doubled(self, pixel_values):
        outputs = real(self, pixel_values)
        outputs.pooler_output = outputs.pooler_output * 2
        return outputs

    monkeypatch.setattr(HoVLEForConditionalGeneration, "get_image_features", doubled)
    with pytest.raises(ValueError, match="logits differ"):
        export(model_folder, tmp_path / "exported", "llama")
    assert not (tmp_path / "exported").exists()
