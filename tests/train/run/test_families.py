"""Every family of decoders goes through the three stages and through LoRA: two steps each, handed on exactly."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny_models import TEXT, shake
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hovle.train import load_stage, run_stage

# peft 0.21.2 asks for `is_gradient_checkpointing`, which transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16},
    "phi3": {},
    "mistral": {"sliding_window": 32},
    "olmo2": {},
    "smollm3": {},
    "granite": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
"""Model type -> fields beside the smallest sizes. InternLM2's own files become a Llama when they are read."""

CORE = ("gemma3_text", "phi3", "qwen3_moe")
"""Those that differ most: two kinds of attention, fused projections, experts."""

FUSED = {"mixtral": "experts", "qwen3_moe": "experts"}
"""Family -> what of its layers LoRA cannot adapt."""

STAGES = {
    "distillation": {
        "objective": {"name": "distillation", "num_random_tokens": 4},
        "trainable": ["stem", "holistic_layers"],
    },
    "alignment": {"objective": {"name": "next_token"}, "trainable": ["stem", "holistic_layers"]},
    "tuning": {"objective": {"name": "next_token"}, "trainable": ["stem", "holistic_layers", "language_model"]},
    "lora": {"objective": {"name": "next_token"}, "trainable": [], "lora": {"rank": 2}},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two pictures of one tile, and a question about each."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for name in ("red", "blue"):
        Image.new("RGB", (28, 28), name).save(folder / f"{name}.png")
        content = [{"type": "image", "path": f"{name}.png"}, {"type": "text", "text": "What?"}]
        rows.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A bus."}]})
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in CORE else pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_goes_through_all_stages(family, pictures, teacher_weights, make_tokenizer, tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {**TEXT, "vocab_size": 512, "num_hidden_layers": 2}
    config = CONFIG_MAPPING[family](**{**sizes, **FAMILIES[family]})
    shake(AutoModelForCausalLM.from_config(config)).bfloat16().save_pretrained(tmp_path / "llm")
    make_tokenizer().save_pretrained(tmp_path / "llm")
    start = {"language_model": str(tmp_path / "llm"), "num_embedding_layers": 1, "image_size": 28, "max_tiles": 1}
    for stage, what in STAGES.items():
        sources = {"source": "chat", "path": str(pictures / "chat.jsonl")}
        recipe = {
            **what,
            "output": str(tmp_path / stage),
            "model": start,
            "data": {"source": "pictures", "path": str(pictures)} if stage == "distillation" else sources,
            "num_steps": 2,
            "rows_per_batch": 1,
            "row_length": 96,
            "learning_rate": 0.01,
            "warmup_ratio": 0,
            "log_every": 1,
            "dtype": "float32",
            "compile": "off",
            "packing_window": 1,
            "image_ablation": False,
        }
        if stage == "distillation":
            recipe["teacher"] = {"name": "test_efficientnet", "checkpoint": teacher_weights, "image_size": 32}
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))
        before = (
            load_file(tmp_path / "alignment" / "model" / "model.safetensors") if stage in ("tuning", "lora") else {}
        )
        folder = run_stage(load_stage(str(tmp_path / f"{stage}.yaml")))
        check_log(folder.parent, family, stage)
        if before:
            check_what_learned(before, load_file(folder / "model.safetensors"), family, stage)
        # LoRA starts where tuning does; every stage checks that it starts with what the one before ended with.
        start = {"checkpoint": str(tmp_path / ("alignment" if stage == "tuning" else stage) / "model")}
    assert ("cannot be predicted" in capsys.readouterr().out) == any(
        "cannot be predicted" in entry.get("message", "") for entry in read_log(tmp_path / "alignment")
    )


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def check_log(folder: Path, family: str, stage: str) -> None:
    """Two steps with losses, a forecast or a word that there is none, and what LoRA leaves out."""
    log = read_log(folder)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    [first] = [entry for entry in log if entry.get("event") == "start"]
    warnings = [entry["message"] for entry in log if entry.get("event") == "warning"]
    assert (first["predicted"] is None) == any("cannot be predicted" in message for message in warnings)
    assert first["predicted"] is not None or family in FUSED
    left = [message for message in warnings if "lora leaves out" in message]
    assert bool(left) == (stage == "lora" and family in FUSED)
    assert all(FUSED[family] in message for message in left)


def check_what_learned(before: dict, after: dict, family: str, stage: str) -> None:
    """Everything in tuning; of LoRA the linear maps of the language model and nothing else."""
    assert set(after) == set(before)
    same = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    if stage == "tuning":
        idle = {name for name in same if "experts" in name}  # one may get no token in two steps
        if "lm_head.weight" in after:  # then the text table is a group of its own
            idle |= {name for name in same if "embed_tokens" in name}
        assert same == idle, family
        return
    changed = set(after) - same
    assert changed
    assert all(".layers." in name and ".layers.0." not in name and after[name].dim() == 2 for name in changed)
    assert all("norm" not in name and "embed" not in name for name in changed)
