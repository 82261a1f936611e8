"""Every piece of Python in the README runs as it stands, on a tiny model in the place of the real one."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor

BLOCKS = re.findall(r"^```python\n(.*?)^```$", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL | re.M)
MODEL, LANGUAGE_MODEL = "runs/demo/instruction_tuning/model", "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, make_tokenizer):
    """A folder with everything the README's code names."""
    folder = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    text = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    language_model = LlamaForCausalLM(LlamaConfig(**text, num_hidden_layers=2, num_key_value_heads=2))
    language_model.save_pretrained(folder / LANGUAGE_MODEL)
    make_tokenizer().save_pretrained(folder / LANGUAGE_MODEL)
    model = HoVLEForConditionalGeneration.from_language_model(folder / LANGUAGE_MODEL, 1, image_size=56)
    processor = HoVLEProcessor.from_language_model(folder / LANGUAGE_MODEL, model.config, max_tiles=4)
    model.save_pretrained(folder / MODEL)
    processor.save_pretrained(folder / MODEL)
    for name in ("picture", "a", "b"):
        Image.effect_noise((64, 64), 50).convert("RGB").save(folder / f"{name}.png")
    return folder


def test_the_readme_shows_every_use():
    assert len(BLOCKS) >= 7


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_code_of_the_readme_runs(block, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})  # our own text
    if "print(" in block:
        assert capsys.readouterr().out
