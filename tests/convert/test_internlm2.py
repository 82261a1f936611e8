"""InternLM2's own files as a language model, held against a Llama with the same weights; no code of theirs runs."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.cli import main
from hovle.convert import internlm2
from hovle.convert.sentencepiece_tokenizer import SYSTEM_MESSAGE
from hovle.model.language_model import load_language_config, load_language_model, load_tokenizer

VOCAB = 400
RELEASED = {
    "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
    },
    "attn_implementation": "eager",
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 24,
    "model_type": "internlm2",
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCAB,
}
"""A config.json as internlm2-chat-1_8b has it, in small."""

ROPE = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e6},
    "none": {"rope_type": "default", "rope_theta": 1e6},
}


def plain_llama(rope: str = "dynamic", tied: bool = False, bias: bool = False) -> LlamaForCausalLM:
    """The reference: random weights, exact in bfloat16."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=24,
        rms_norm_eps=1e-5,
        rope_parameters=dict(ROPE[rope]),
        tie_word_embeddings=tied,
        attention_bias=bias,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
            parameter.copy_(parameter.bfloat16())  # not the rotary table, which stays as it is in float32
    return model


def released_tensors(llama: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Its weights in InternLM2's layout; per key-value head: its four queries, its key, its value."""
    state = llama.state_dict()
    tensors = {
        "model.tok_embeddings.weight": state["model.embed_tokens.weight"],
        "model.norm.weight": state["model.norm.weight"],
    }
    if not llama.config.tie_word_embeddings:
        tensors["output.weight"] = state["lm_head.weight"]
    kinds = ("weight", "bias") if llama.config.attention_bias else ("weight",)
    for index in range(3):
        ours, theirs = f"model.layers.{index}.", f"model.layers.{index}."
        for kind in kinds:
            query, key, value = (state[f"{ours}self_attn.{name}_proj.{kind}"] for name in "qkv")
            rows = []
            for head in range(2):
                rows += [
                    query[32 * head : 32 * head + 32],
                    key[8 * head : 8 * head + 8],
                    value[8 * head : 8 * head + 8],
                ]
            tensors[f"{theirs}attention.wqkv.{kind}"] = torch.cat(rows)
            tensors[f"{theirs}attention.wo.{kind}"] = state[f"{ours}self_attn.o_proj.{kind}"]
        for name, released in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            tensors[f"{theirs}feed_forward.{released}.weight"] = state[f"{ours}mlp.{name}_proj.weight"]
        tensors[f"{theirs}attention_norm.weight"] = state[f"{ours}input_layernorm.weight"]
        tensors[f"{theirs}ffn_norm.weight"] = state[f"{ours}post_attention_layernorm.weight"]
    return {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], form: str) -> None:
    """As one file or two with an index, safetensors or pickled."""
    save = save_file if form.endswith("safetensors") else torch.save
    stem, suffix = ("model", "safetensors") if form.endswith("safetensors") else ("pytorch_model", "bin")
    if not form.startswith("sharded"):
        save(tensors, folder / f"{stem}.{suffix}")
        return
    weight_map = {}
    for number in range(2):
        file = f"{stem}-{number + 1:05}-of-00002.{suffix}"
        shard = {name: tensors[name] for name in sorted(tensors)[number::2]}
        save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_tokenizer(folder: Path, **settings) -> None:
    """A SentencePiece byte-pair model whose last unused pieces are named as the chat tokens."""
    import sentencepiece

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 6))) for _ in range(200)]
    words += ["12", "345", "3.14", "=", "+", "(", ")", ".", "?", "人", "工", "智能", "猫", "привет"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choices(words, k=8)) for _ in range(500)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_1]"],
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    content = {
        "added_tokens_decoder": {
            "3": {"content": "<|im_end|>", "special": True},
            "4": {"content": "<|im_start|>", "special": True},
        },
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "tokenizer_class": "InternLM2Tokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def write_released(folder: Path, llama: LlamaForCausalLM | None = None, form: str = "safetensors", **fields) -> Path:
    """A whole folder in InternLM2's own layout, code that must not run included."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(RELEASED | fields))
    for name in ("configuration", "modeling", "tokenization"):
        (folder / f"{name}_internlm2.py").write_text("raise SystemExit('remote code ran')")
    write_weights(folder, released_tensors(llama or plain_llama()), form)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    return write_released(tmp_path_factory.mktemp("internlm2") / "internlm2-chat-tiny")


def token_ids(length: int = 40) -> torch.Tensor:
    return torch.randint(5, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
def test_every_form_of_weights_gives_the_llama_s_logits(tmp_path, form):
    llama = plain_llama()
    folder = write_released(tmp_path / "model", llama, form)
    found = load_language_model(folder, dtype=torch.float32).eval()
    assert found.config.rope_parameters["rope_type"] == "dynamic"
    for name, tensor in llama.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    with torch.no_grad():  # 40 tokens are beyond the 24 positions: dynamic scaling counts
        assert torch.equal(found(token_ids()).logits, llama(token_ids()).logits)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"rope_scaling": None}, {"rope": "none"}),
        ({"rope_scaling": {"type": "linear", "factor": 3.0}}, {"rope": "linear"}),
        ({"bias": True}, {"bias": True}),
        ({"tie_word_embeddings": True}, {"tied": True}),
    ],
)
def test_other_configs_give_their_llama_s_logits(tmp_path, fields, options):
    llama = plain_llama(**options)
    found = load_language_model(write_released(tmp_path / "model", llama, **fields), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = llama(token_ids()).logits
        assert torch.equal(found(token_ids()).logits, expected)
        other = plain_llama("dynamic")(token_ids()).logits
    assert not torch.allclose(expected, other)  # the setting matters


def test_weights_keep_their_type_and_generation_its_settings(released, tmp_path):
    assert load_language_model(released).dtype == torch.bfloat16
    folder = write_released(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "max_length": 30}))
    assert load_language_model(folder).generation_config.eos_token_id == [2, 3]


def test_a_tied_head_that_is_stored_must_be_the_table(tmp_path):
    llama = plain_llama(tied=True)
    tensors = released_tensors(llama)
    table = tensors["model.tok_embeddings.weight"]
    folder = write_released(tmp_path / "model", llama, tie_word_embeddings=True)
    write_weights(folder, tensors | {"output.weight": table.clone()}, "safetensors")
    assert load_language_model(folder, dtype=torch.float32).config.tie_word_embeddings
    write_weights(folder, tensors | {"output.weight": table + 1}, "safetensors")
    with pytest.raises(ValueError, match=r"output.weight differs from model.tok_embeddings.weight"):
        load_language_model(folder)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope_scaling.type must be 'dynamic' or 'linear', got 'ya",
        ),
        ({"rope_scaling": {"factor": 2.0}}, "lacks rope_scaling.type"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(8\) must be a multiple of num_key_value_heads \(3\)"),
        ({"hidden_size": "64"}, "hidden_size in config.json must be int, got '64'"),
        (
            {"intermediate_size": 80},
            r"feed_forward.w1.weight has shape \(96, 64\), but config.json asks for \(80, 64\)",
        ),
        ({"num_hidden_layers": 4}, "missing model.layers.3"),
        ({"num_hidden_layers": 2}, "unexpected tensors: model.layers.2"),
        ({"bias": True}, "missing model.layers.0.attention.wo.bias"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(released, tmp_path, fields, message):
    folder = tmp_path / "model"
    folder.mkdir()
    os.link(released / "model.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(RELEASED | fields))
    with pytest.raises(ValueError, match=message):
        load_language_model(folder)


class Payload:
    def __reduce__(self):
        return os.system, ("touch opened",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"output.weight": Payload()}, "cannot be read as plain tensors"),
        ({"output.weight": 3}, "must hold tensors by name"),
        ([torch.ones(1)], "must hold tensors by name"),
        ({"output.weight": torch.tensor([float("nan")])}, "missing model."),
    ],
)
def test_pickled_weights_are_opened_as_tensors_only(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    folder = write_released(tmp_path / "model", form="bin")
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        load_language_model(folder)
    assert not (tmp_path / "opened").exists()


def test_pickled_weights_must_be_finite_and_whole(tmp_path):
    tensors = released_tensors(plain_llama())
    folder = write_released(tmp_path / "model", form="sharded bin")
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    del index["weight_map"]["output.weight"]
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="disagree"):
        load_language_model(folder)
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        load_language_model(folder)
    tensors["model.norm.weight"][0] = float("inf")
    write_weights(folder, tensors, "bin")
    with pytest.raises(ValueError, match=r"model.norm.weight holds non-finite"):
        load_language_model(folder)


def test_a_broken_tokenizer_is_told_and_a_missing_one_is_none(released, tmp_path):
    folder = write_released(tmp_path / "model")
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="is no SentencePiece model"):
        HoVLEForConditionalGeneration.from_language_model(folder, 1, image_size=56)
    (folder / "tokenizer.model").unlink()
    model = HoVLEForConditionalGeneration.from_language_model(folder, 1, image_size=56)
    assert (model.config.image_token_id, model.config.text_config.vocab_size) == (VOCAB + 2, VOCAB + 3)
    with pytest.raises(OSError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        HoVLEProcessor.from_language_model(folder, model.config)


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_sentencepiece_s_with_the_chat_template(released):
    import sentencepiece

    tokenizer = load_tokenizer(released)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(released / "tokenizer.model"))
    text = "two people  and a 猫, 3.14? привет 🙂"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == f"<s><|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|><|im_start|>user\nHi<|im_end|>"
    assert tokenizer.pad_token == "</s>"


def test_a_chat_template_of_their_own_stays(tmp_path):
    folder = write_released(tmp_path / "model")
    write_tokenizer(folder, chat_template="{{ messages[0]['content'] }}!")
    assert load_tokenizer(folder).apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!"
    assert load_tokenizer(folder, chat_template="{{ 'x' }}").chat_template == "{{ 'x' }}"
    (folder / "chat_template.jinja").write_text("{{ 'from the file' }}")
    assert load_tokenizer(folder).chat_template == "{{ 'from the file' }}"
    with pytest.raises(ValueError, match=r"colour: the converted tokenizer of .* has no such option"):
        load_tokenizer(folder, colour=1)


# --- HoVLE around it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("location", ["pre", "post"])
def test_a_new_hovle_gives_the_llama_s_text_logits(released, tmp_path, location):
    llama = plain_llama()
    model = HoVLEForConditionalGeneration.from_language_model(
        released, 2, image_size=56, pixel_shuffle_loc=location, dtype=torch.float32
    ).eval()
    processor = HoVLEProcessor.from_language_model(released, model.config)
    assert model.config.text_config.vocab_size == VOCAB + 3
    assert processor.image_token_id == model.config.image_token_id == VOCAB + 2
    with torch.no_grad():
        found = model(token_ids()).logits[..., :VOCAB]
        torch.testing.assert_close(found, llama(token_ids()).logits, atol=1e-6, rtol=0)
    model.save_pretrained(tmp_path / "hovle")
    processor.save_pretrained(tmp_path / "hovle")
    loaded = HoVLEForConditionalGeneration.from_pretrained(tmp_path / "hovle").eval()
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits[..., :VOCAB], found)
    text = "a 猫 and two people"
    tokenizer = HoVLEProcessor.from_pretrained(tmp_path / "hovle").tokenizer
    assert tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    assert not (tmp_path / "hovle" / "internlm2.py").exists()  # a model folder takes what runs it, not converters


def test_the_config_alone_is_a_llama_s(released):
    with pytest.raises(ValueError, match="foo: a converted InternLM2 config takes no such option"):
        load_language_config(released, foo=1)
    config = load_language_config(released)
    assert (config.model_type, config.num_hidden_layers, config.attention_bias) == ("llama", 3, False)


# --- the paper's first stage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["hovle-2.6b", "hovle-2.6b-hd"])
def test_the_paper_s_first_stage_trains_around_it(released, tmp_path, folder, capsys):
    import timm
    from PIL import Image

    language_model = shutil.copytree(released, tmp_path / "internlm2")
    config = json.loads((language_model / "config.json").read_text())
    (language_model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    weights = tmp_path / "teacher.pt"
    torch.save(timm.create_model("test_efficientnet", pretrained=False).state_dict(), weights)
    (tmp_path / "pictures").mkdir()
    for index in range(6):
        Image.new("RGB", (60 + index, 50), (40 * index, 90, 10)).save(tmp_path / "pictures" / f"{index}.png")
    recipe = [
        f"{folder}/distillation",
        f"model.language_model={language_model}",
        "model.num_embedding_layers=2",
        "model.image_size=56",
        f"teacher={{name: test_efficientnet, checkpoint: {weights}, image_size: 64}}",
        f"data={{source: pictures, path: {tmp_path / 'pictures'}}}",
        *[f"validation={{source: pictures, path: {tmp_path / 'pictures'}}}", "num_validation_batches=1"],
        f"output={tmp_path / 'run'}",
        *["rows_per_batch=1", "row_length=400", "packing_window=4", "gradient_accumulation_steps=1"],
        *["num_workers=0", "dtype=float32", "compile=off", "num_steps=2", "log_every=1"],
        "language.source=python_docs",
    ]
    assert main(["train", *recipe, "--dry-run"]) == 0
    assert "trains          stem, holistic_layers, text_embeddings" in capsys.readouterr().out
    assert main(["train", *recipe]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("event", "step") == "step" and "loss" in line] == [1, 2]
    trained = HoVLEForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    head = released_tensors(plain_llama())["output.weight"].float()
    assert torch.equal(trained.lm_head.weight[:VOCAB].float(), head)  # the language model stays


# --- strangers' values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must lie between 1 and"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must lie between 1 and"),
        ({"num_hidden_layers": 900}, "num_hidden_layers in config.json is 900, but the tensors are those of 3 layers"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a number between 0 and 1"),
        ({"hidden_act": "evil"}, "hidden_act must be an activation"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0}}, r"rope_scaling\.factor must be a positive number, got 0"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, r"rope_scaling\.factor .*got nan"),
        ({"rope_theta": 0}, "rope_theta must be a positive number"),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_values_that_cannot_work_are_refused_by_name(released, tmp_path, monkeypatch, fields, message, form):
    folder = tmp_path / "model"
    folder.mkdir()
    write_weights(folder, released_tensors(plain_llama()), form)
    (folder / "config.json").write_text(json.dumps(RELEASED | fields))
    monkeypatch.setattr(internlm2, "decoder_rows", None)  # nothing is built first
    with pytest.raises(ValueError, match=message):
        load_language_model(folder)


def test_a_panic_of_the_tokenizers_library_is_told_as_a_value_error(released, monkeypatch):
    class PanicException(BaseException):
        pass

    def fail(folder):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(internlm2, "fast_tokenizer", fail)
    with pytest.raises(ValueError, match=r"tokenizer\.model cannot be converted: index out of bounds"):
        load_tokenizer(released)
