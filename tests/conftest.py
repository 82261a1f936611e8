"""Fixtures shared by the tests: a small byte-level BPE tokenizer with ChatML tokens, and a tiny configuration."""

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from hovle import HoVLEConfig

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = [
    "The quick brown fox jumps over the lazy dog while a small cat sleeps on the red mat.",
    "What is in the picture? A bus, a tree and two people who wait at the corner of the street.",
    "user assistant system img IMG CONTEXT im start im end of text, 0 1 2 3 4 5 6 7 8 9",
    "Describe the image in one short sentence, please. How many apples are on the table?",
]

IMAGE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>"]


def build_tokenizer(chat_template: str = CHATML) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 400 pieces on a few sentences; `<|endoftext|>` pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A text tokenizer without picture tokens; do not change it, build another with `build_tokenizer`."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`make_tokenizer(chat_template=...)` gives a fresh tokenizer that a test may change."""
    return build_tokenizer


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., HoVLEConfig]:
    """`tiny_config(**fields)`: 2 + 2 layers, hidden size 64, tiles of 56 px with 4 tokens each."""

    def build(text_config: dict | None = None, **fields) -> HoVLEConfig:
        text = LlamaConfig(
            **{
                "vocab_size": 512,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 1024,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
                **(text_config or {}),
            }
        )
        defaults = {"num_embedding_layers": 2, "image_size": 56, "patch_size": 14, "image_token_id": 402}
        return HoVLEConfig(text_config=text.to_dict(), **{**defaults, **fields})

    return build


@pytest.fixture
def offline(monkeypatch) -> None:
    """The Hub answers as on a machine that is told to be offline: at once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def whole_graph() -> contextlib.AbstractContextManager:
    """Where `torch.compile(fullgraph=True)` belongs: refused by a torch that cannot trace transformers' own Llama."""
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    llama = torch.compile(LlamaModel(config), fullgraph=True, backend="eager")
    try:
        llama(torch.ones(1, 2, dtype=torch.long), use_cache=False)
    except torch._dynamo.exc.Unsupported:
        return pytest.raises(torch._dynamo.exc.Unsupported)
    finally:
        torch._dynamo.reset()
    return contextlib.nullcontext()
