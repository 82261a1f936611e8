"""Loading takes the memory of the weights and no more, and generation the logits it looks at."""

import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig

from hovle import HoVLEConfig, HoVLEForConditionalGeneration

SIZES = {"small": (64, 96, 2), "middle": (768, 2304, 6)}
"""Hidden size, that within the MLP, layers."""

LOAD = """
import re, sys
from pathlib import Path
from hovle.loading import load_model

def resident(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

load_model(sys.argv[1])  # imports what loading needs
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
model = load_model(sys.argv[2])
total = sum(float(weight.sum()) for weight in model.parameters())  # every page is read
print((resident("VmHWM") - before) / sum(weight.nbytes for weight in model.parameters()))
"""


def saved(target, size: str):
    hidden, inner, layers = SIZES[size]
    text = LlamaConfig(
        vocab_size=8000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = HoVLEConfig(text_config=text, num_embedding_layers=1, image_token_id=60)
    model = HoVLEForConditionalGeneration(config).eval()
    model.save_pretrained(target)
    return model


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from Linux's /proc")
def test_loading_takes_a_tenth_more_than_the_weights_at_most(tmp_path):
    for size in SIZES:
        saved(tmp_path / size, size)
    command = [sys.executable, "-c", LOAD, *(str(tmp_path / size) for size in SIZES)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.5 < float(finished.stdout.split()[-1]) < 1.1  # measured: 1.007, of about 240 MB


def test_generation_computes_the_logits_of_one_token_and_holds_one_table(tmp_path):
    model = saved(tmp_path, "small")
    lengths: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _module, inputs: lengths.append(inputs[0].shape[1]))
    model.generate(torch.arange(5, 25)[None], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert lengths == [1, 1, 1]
    tables = [name for name, weight in model.named_parameters() if weight.shape[0] == 8000]
    assert tables == ["model.language_model.embed_tokens.weight", "lm_head.weight"]
