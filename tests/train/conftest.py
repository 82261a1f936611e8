"""Fixtures of the training tests: tiny language models, pictures, chats, a teacher, and recipes that use them."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.train import StageConfig, load_stage
from hovle.train.config.data import DataSource
from hovle.train.data.batch import PackedBatch
from hovle.train.data.packing import PackedBatches, StreamPosition
from hovle.train.data.readers import load_records
from hovle.train.data.samples import RandomTextSamples, ReplySamples
from hovle.train.parallel import OneProcess
from hovle.train.plan import cost
from hovle.train.plan.memory import measure_activations

COLORS = ("red", "green", "blue", "black", "white", "gray")

CHATS = [
    [("What is in the picture?", "A bus and a tree.")],
    [("How many apples are on the table?", "3"), ("How many people?", "Two people wait.")],
    [("Describe the image, please.", "The quick brown fox jumps over the lazy dog.")],
    [("Is the cat on the mat?", "A small cat sleeps."), ("And the dog?", "It is lazy."), ("Why?", "0 1 2 3")],
    [("What is in the corner?", "The street.")],
    [("A tree?", "In the corner of the street is a tree and a bus and a dog and a cat.")],
]


def tiny_language_model(vocab_size: int = 512, **fields) -> LlamaForCausalLM:
    """Two random Llama layers of width 64; their weights are exact in bfloat16, as released ones are."""
    config = LlamaConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **fields,
        }
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).bfloat16().float()


@pytest.fixture(scope="session")
def language_models(tmp_path_factory, make_tokenizer) -> dict[str, str]:
    """Folders of a `tied` and an `untied` tiny language model with their tokenizer; read only."""
    folders = {}
    for name in ("tied", "untied"):
        folder = tmp_path_factory.mktemp(name)
        tiny_language_model(tie_word_embeddings=name == "tied").save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        folders[name] = str(folder)
    return folders


def new_hovle(language_model: str, **fields) -> tuple[HoVLEForConditionalGeneration, HoVLEProcessor]:
    """A HoVLE of 2 + 2 layers around a tiny language model; its new layers are not the identity."""
    torch.manual_seed(1)
    fields = {"image_size": 56, "max_tiles": 2, **fields}
    max_tiles = fields.pop("max_tiles")
    model = HoVLEForConditionalGeneration.from_language_model(language_model, 2, dtype=torch.float32, **fields)
    with torch.no_grad():
        for layer in model.model.embedding_layers:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight.normal_(std=0.1)
    return model, HoVLEProcessor.from_language_model(language_model, model.config, max_tiles=max_tiles)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, language_models) -> dict[str, str]:
    """Folders of a `tied` and an `untied` tiny HoVLE, as a first stage would leave them; read only."""
    folders = {}
    for name, language_model in language_models.items():
        folder = tmp_path_factory.mktemp(f"hovle-{name}")
        model, processor = new_hovle(language_model)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with `chat.jsonl` (pictures and text-only conversations) and the folder `pictures`; read only."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    for index in range(12):
        size = (90, 40) if index % 3 == 0 else (50, 60)  # wide ones become two tiles and a thumbnail
        picture = Image.new("RGB", size, COLORS[index % len(COLORS)])
        picture.paste(COLORS[(index + 2) % len(COLORS)], (5, 5, 20 + index, 30))
        picture.save(folder / "pictures" / f"{index:02d}.png")
    lines = []
    for index in range(18):
        messages = []
        for turn, (question, answer) in enumerate(CHATS[index % len(CHATS)]):
            content: list[dict] = [{"type": "text", "text": question}]
            if turn == 0 and index % 4 != 3:
                content.insert(0, {"type": "image", "path": f"pictures/{index % 12:02d}.png"})
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": answer})
        lines.append(json.dumps({"messages": messages}))
    (folder / "chat.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session", autouse=True)
def measured_activations():
    """What autograd keeps of the same model and rows is measured once: it costs more than the steps of a tiny run."""
    known: dict[tuple, cost.Activations] = {}

    def measure(config, model_config, *sizes) -> cost.Activations:
        stage = repr((config.trainable, config.lora, config.objective))
        key = (stage, repr(model_config.to_dict()), model_config._attn_implementation, *sizes)
        if key not in known:
            known[key] = measure_activations(config, model_config, *sizes)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "measure_activations", measure)
        yield


@pytest.fixture
def parts(checkpoints) -> tuple[HoVLEForConditionalGeneration, HoVLEProcessor]:
    """The tied tiny HoVLE in training mode, and its processor."""
    model = HoVLEForConditionalGeneration.from_pretrained(checkpoints["tied"], dtype=torch.float32)
    return model.train(), HoVLEProcessor.from_pretrained(checkpoints["tied"])


@pytest.fixture
def batches(parts, data, next_token_config) -> Callable[..., list[PackedBatch]]:
    """`batches("chat" or "pictures", count, "key=value", ...)`: packed batches, rows of 192 tokens."""

    def build(source: str, count: int = 1, *overrides: str) -> list[PackedBatch]:
        path = data / ("chat.jsonl" if source == "chat" else "pictures")
        maker = ReplySamples(parts[1]) if source == "chat" else RandomTextSamples(parts[1], 10, seed=0)
        records = load_records(DataSource.kinds()[source](path=str(path)))
        stream = PackedBatches(records, maker, next_token_config(*overrides), StreamPosition(), 0, 1, pad_token_id=0)
        return list(itertools.islice(stream, count))

    return build


@pytest.fixture(scope="session")
def teacher_weights(tmp_path_factory) -> str:
    """Random weights of timm's tiny `test_efficientnet`."""
    import timm

    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("teacher") / "test_efficientnet.pt"
    torch.save(timm.create_model("test_efficientnet", pretrained=False).state_dict(), path)
    return str(path)


@pytest.fixture
def one_process() -> OneProcess:
    """What training asks of an accelerator, for a single process on the CPU."""
    return OneProcess(torch.device("cpu"))


Recipe = Callable[..., StageConfig]


@pytest.fixture
def next_token_config(tmp_path, next_token_values) -> Recipe:
    """`next_token_config("key=value", ...)`: alignment of the tied tiny HoVLE on the chats, 4 steps."""
    return _loader(tmp_path / "next_token.yaml", {"output": str(tmp_path / "run"), **next_token_values})


@pytest.fixture(scope="session")
def next_token_values(checkpoints, data) -> dict:
    """The recipe of `next_token_config` without an output."""
    return {
        "model": {"checkpoint": checkpoints["tied"]},
        "objective": {"name": "next_token"},
        "trainable": ["stem", "holistic_layers"],
        "data": {"source": "chat", "path": str(data / "chat.jsonl")},
        "num_steps": 4,
        "rows_per_batch": 2,
        "row_length": 192,
        "packing_window": 4,
        "learning_rate": 1e-3,
        "log_every": 1,
        "dtype": "float32",
        "compile": "off",
    }


@pytest.fixture
def distillation_config(tmp_path, distillation_values) -> Recipe:
    """`distillation_config("key=value", ...)`: a new HoVLE around the tied tiny language model, 4 steps."""
    return _loader(tmp_path / "distillation.yaml", {"output": str(tmp_path / "run"), **distillation_values})


@pytest.fixture(scope="session")
def distillation_values(language_models, data, teacher_weights) -> dict:
    """The recipe of `distillation_config` without an output."""
    return {
        "model": {
            "language_model": language_models["tied"],
            "num_embedding_layers": 2,
            "image_size": 56,
            "max_tiles": 2,
        },
        "teacher": {"name": "test_efficientnet", "checkpoint": teacher_weights, "image_size": 64},
        "objective": {"name": "distillation", "num_random_tokens": 20},
        "trainable": ["stem", "holistic_layers"],
        "data": {"source": "pictures", "path": str(data / "pictures")},
        "num_steps": 4,
        "rows_per_batch": 2,
        "row_length": 192,
        "packing_window": 4,
        "learning_rate": 1e-3,
        "log_every": 1,
        "dtype": "float32",
        "compile": "off",
    }


def _loader(path: Path, values: dict) -> Recipe:
    path.write_text(yaml.safe_dump(values))
    return lambda *overrides: load_stage(str(path), overrides)
