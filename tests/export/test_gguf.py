"""`hovle export --to gguf`: what the files hold, read with transformers; what llama.cpp makes of them (slow)."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from hovle import HoVLEProcessor, cli
from hovle.chat import Conversation
from hovle.export.command import export
from hovle.export.flat import stock_decoder
from hovle.export.gguf import QUANTIZATIONS, file_name
from hovle.model.pixels import normalize_pixels

ODD_TEXTS = [
    "",
    " ",
    "A bus, 12 apples and 3.14159",
    "\n\n1234567890\t\t  x  ",
    "it's WE'LL don't I'M 's",
    "naïve café \u2013 \u201cquotes\u201d \u2026 ¿qué? Ünïcödé",
    "日本語のテキスト 中文字符 한국어",
    "🙂👩‍👩‍👧‍👦 \U0001f1e9\U0001f1ea",
    "a\u0301 e\u0301\u0323 \u00a0\u2009\u3000|",
    "trailing spaces   \r\n\r\nwindows\r\n",
    "def f(x):\n    return x ** 2  # \\n",
    "x" * 300,
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model_folder) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "exported"
    export(model_folder, folder, "gguf")
    return folder


def rounded(decoder, quantization: str):
    """The decoder with weights as they come back from a file."""
    decoder = copy.deepcopy(decoder)
    for name, weight in decoder.named_parameters():
        is_outer = name in ("model.embed_tokens.weight", "lm_head.weight")
        kind = GGMLQuantizationType["Q8_0" if is_outer and quantization == "q4_1" else quantization.upper()]
        if weight.dim() == 2:
            back = dequantize(quantize(weight.detach().numpy(), kind), kind)
            weight.data = torch.from_numpy(back.copy()).view(weight.shape)
    return decoder


def logits_of(decoder) -> torch.Tensor:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        return decoder(ids).logits


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_decoder_back(family, tmp_path, save_model):
    # transformers reads no size of heads from a GGUF file, and takes Qwen 3's own.
    text = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        "head_dim": 128 if family == "qwen3" else 16,
    }
    model = save_model(tmp_path / "model", family, text)
    export(tmp_path / "model", tmp_path / "exported", "gguf")
    whole = stock_decoder(model)
    for quantization in QUANTIZATIONS:
        name = file_name(quantization)
        decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", gguf_file=name, dtype=torch.float32)
        torch.testing.assert_close(logits_of(decoder), logits_of(rounded(whole, quantization)), atol=1e-4, rtol=0)
        difference = (logits_of(decoder) - logits_of(whole)).abs().mean()
        assert 0 < difference < {"f16": 0.01, "q8_0": 0.1, "q4_1": 1.0}[quantization]


def test_table_and_head_keep_eight_bits_in_the_four_bit_file(exported):
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(exported / file_name("q4_1")).tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "Q4_1"
    assert kinds["output_norm.weight"] == "F32"


def field(path: Path, name: str):
    return GGUFReader(path).fields[name].contents()


def test_the_vocabulary_is_the_tokenizers(exported, model_folder):
    path, tokenizer = exported / file_name("f16"), AutoTokenizer.from_pretrained(model_folder)
    tokens = field(path, "tokenizer.ggml.tokens")
    assert len(tokens) == 416
    for token in ("<img>", "</img>", "<IMG_CONTEXT>", "<|im_end|>"):
        index = tokenizer.convert_tokens_to_ids(token)
        assert tokens[index] == token
        assert field(path, "tokenizer.ggml.token_type")[index] == 3  # control
    assert field(path, "tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert field(path, "tokenizer.ggml.pre") == "gpt-2"
    assert field(path, "tokenizer.chat_template") == HoVLEProcessor.from_pretrained(model_folder).chat_template


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'yarn'",
        ),
    ],
)
def test_what_llama_cpp_would_run_otherwise_is_refused(text, reason, tmp_path, save_model):
    save_model(tmp_path / "model", text=text)
    with pytest.raises(ValueError, match=reason):
        export(tmp_path / "model", tmp_path / "exported", "gguf")


def test_unknown_families_are_refused_with_what_remains(tmp_path, save_model, capsys):
    save_model(tmp_path / "model", "phi")
    assert cli.main(["export", str(tmp_path / "model"), str(tmp_path / "exported"), "--to", "gguf"]) == 1
    assert "'phi'" in (error := capsys.readouterr().err)
    assert "--to llama" in error


def test_a_weight_beyond_f16_is_refused_by_name(tmp_path, save_model):
    model = save_model(tmp_path / "model")
    model.model.language_model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e5
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"blk.1.ffn_up.weight reaches 1e\+05"):
        export(tmp_path / "model", tmp_path / "exported", "gguf")
    assert not (tmp_path / "exported").exists()


def test_a_tokenizer_that_llama_cpp_does_not_know_is_left_out_and_told(tmp_path, save_model, capsys):
    save_model(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(content))
    assert cli.main(["export", str(tmp_path / "model"), str(tmp_path / "exported"), "--to", "gguf"]) == 0
    assert "no vocabulary" in capsys.readouterr().out
    assert field(tmp_path / "exported" / file_name("f16"), "tokenizer.ggml.model") == "none"


def test_rows_that_do_not_divide_stay_f16_and_are_told(tmp_path, save_model, capsys):
    save_model(tmp_path / "model", text={"intermediate_size": 80})
    assert cli.main(["export", str(tmp_path / "model"), str(tmp_path / "exported"), "--to", "gguf"]) == 0
    assert "In model-q8_0.gguf 4 tensors stay f16" in capsys.readouterr().out
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "exported" / file_name("q8_0")).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"


def test_an_engine_without_its_files_says_what_makes_them(model_folder):
    with pytest.raises(ValueError, match=r"hovle export MODEL DST --to gguf|pip install 'hovle\[llamacpp\]'"):
        Conversation(model_folder, engine="llama.cpp")


# ---------------------------------------------------------------------------------------------- in llama.cpp


def chat(picture) -> list[dict]:
    return [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]}
    ]


def test_the_engine_normalises_tiles_of_bytes(tiny_config):
    from hovle.export.llama_cpp import LlamaCppForConditionalGeneration

    config = tiny_config(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.25])
    seen = []
    stem = SimpleNamespace(embed=lambda pixels: seen.append(pixels) or np.zeros((len(pixels), 4, 64)))
    engine = LlamaCppForConditionalGeneration(config, decoder=None, stem=stem)
    tiles = torch.randint(256, (2, 3, 56, 56), dtype=torch.uint8)
    engine._features(tiles)
    np.testing.assert_array_equal(seen[0], normalize_pixels(tiles, config.image_mean, config.image_std).numpy())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_llama_cpp_gives_the_models_logits_on_pictures_and_words(family, tmp_path, save_model, pictures):
    from hovle.export.llama_cpp import LlamaCppForConditionalGeneration

    model = save_model(tmp_path / "model", family)
    export(tmp_path / "model", tmp_path / "exported", "gguf")
    processor = HoVLEProcessor.from_pretrained(tmp_path / "model")
    engine = LlamaCppForConditionalGeneration.load(tmp_path / "exported")
    inputs = processor.apply_chat_template(
        chat(pictures[0]), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = inputs["input_ids"][0].numpy()
    is_image = ids == processor.image_token_id
    features = engine.stem.embed(inputs["pixel_values"].numpy()).reshape(-1, 64)
    with torch.no_grad():
        expected = model(**inputs).logits[0]
    found = torch.from_numpy(engine.decoder.all_logits(ids, is_image, features, every=True))
    # Measured worst case: see the log.
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    assert engine.generate(**inputs, **greedy).tolist() == model.generate(**inputs, **greedy).tolist()


@pytest.mark.slow
def test_a_conversation_in_llama_cpp_says_what_one_in_torch_says(exported, model_folder, pictures):
    talks = [Conversation(model_folder, 6), Conversation(exported, 6, engine="llama.cpp")]
    for talk in talks:
        talk.add_images([pictures[1]])
    for question in ("What is it?", "And now? " * 60):  # a run of tokens too long for memory that is lost to survive
        first, second = (talk.answer(question) for talk in talks)
        assert first == second
    for talk in talks:
        talk.restart()
        talk.add_images([pictures[2], pictures[3]])
    first, second = (talk.answer("What differs?") for talk in talks)
    assert first == second


@pytest.mark.slow
def test_llama_cpp_tokenizes_as_the_tokenizer(exported, model_folder):
    import llama_cpp

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = llama_cpp.Llama(str(exported / file_name("f16")), vocab_only=True, verbose=False)
    for text in ODD_TEXTS:
        found = model.tokenize(text.encode(), add_bos=False, special=True)
        assert found == tokenizer(text, add_special_tokens=False)["input_ids"], text
