"""`hovle export --to onnx`: ONNX Runtime says what the model says, about pictures of one and several tiles."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch

from hovle import HoVLEForConditionalGeneration, HoVLEImageProcessor, HoVLEProcessor
from hovle.chat import Conversation
from hovle.export import onnx as format_onnx
from hovle.export.command import export
from hovle.export.flat import load_flat
from hovle.export.onnx_runtime import DECODER, STEM, WORDS, Graph, OnnxForConditionalGeneration

SMALL = {"text": {"num_hidden_layers": 2}, "num_embedding_layers": 1}
"""Of one holistic layer and one of the language model: half the time of tracing."""

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, save_model) -> Path:
    folder = tmp_path_factory.mktemp("hovle")
    save_model(folder, **SMALL)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model_folder) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "exported"
    (remark,) = export(model_folder, folder, "onnx")
    assert "all 1 to 4" in remark
    return folder


def encode(processor: HoVLEProcessor, question: str, *pictures) -> dict:
    items = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": items}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def test_greedy_tokens_are_those_of_torch(exported, model_folder, pictures):
    processor = HoVLEProcessor.from_pretrained(model_folder)
    model = HoVLEForConditionalGeneration.from_pretrained(model_folder).eval()
    engine = OnnxForConditionalGeneration.load(exported)
    prompts = [
        encode(processor, "What is it?", pictures[2]),
        encode(processor, "What is it?", pictures[0]),
        encode(processor, "What differs?", pictures[0], pictures[1]),
        encode(processor, "What differs?", pictures[0], pictures[3]),  # begins as the last one did
        encode(processor, "Who are you?"),
    ]
    num_tiles = [len(prompt.get("pixel_values", [])) for prompt in prompts]
    assert num_tiles[0] == 1
    assert num_tiles[1] > 2
    assert num_tiles[4] == 0
    for prompt in prompts:
        assert engine.generate(**prompt, **GREEDY).tolist() == model.generate(**prompt, **GREEDY).tolist()


def test_a_conversation_goes_on_behind_what_was_said(exported, model_folder, pictures):
    talks = [Conversation(model_folder, 6), Conversation(exported, 6, engine="onnx")]
    for talk in talks:
        talk.add_images([pictures[1]])
    for question in ("What is it?", "And now?"):
        first, second = (talk.answer(question) for talk in talks)
        assert first == second
    decoder = talks[1].model.decoder
    read = len(decoder.known.ids)
    lengths = []
    run = decoder.layers.__call__
    decoder.layers = lambda inputs: lengths.append(inputs["inputs_embeds"].shape[1]) or run(inputs)
    talks[1].answer("And then?")
    assert sum(lengths) < read


def test_transformers_js_finds_its_files_names_and_axes(exported):
    # Read in transformers.js 4.3.2: session_config.js, modeling_utils.js, llava/modeling_llava.js.
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "llava"
    assert config["image_token_index"] == 402
    assert config["text_config"]["model_type"] == "llama"
    num_layers = config["text_config"]["num_hidden_layers"]
    assert config["transformers.js_config"]["use_external_data_format"] is True
    for path in (STEM, WORDS, DECODER):
        assert (exported / f"{path}_data").is_file()
        onnx.checker.check_model(str(exported / path))
    assert Graph(exported / STEM).shapes == {"pixel_values": ["batch_size", 3, 56, 56]}
    assert Graph(exported / STEM).outputs == ["image_features"]
    assert Graph(exported / WORDS).shapes == {"input_ids": ["batch_size", "sequence_length"]}
    assert Graph(exported / WORDS).outputs == ["inputs_embeds"]
    decoder = Graph(exported / DECODER)
    past = {f"past_key_values.{layer}.{part}" for layer in range(num_layers) for part in ("key", "value")}
    assert decoder.shapes.keys() == past | {"inputs_embeds", "attention_mask", "position_ids", "num_logits_to_keep"}
    assert {str(decoder.shapes[name]) for name in past} == {"['batch_size', 2, 'past_sequence_length', 16]"}
    assert set(decoder.outputs) == {"logits"} | {name.replace("past_key_values", "present") for name in past}
    assert json.loads((exported / "tokenizer_config.json").read_text())["chat_template"]


def test_padding_on_the_left_changes_no_logits(exported):
    decoder = Graph(exported / DECODER)
    generator = np.random.default_rng(0)
    embeds = generator.standard_normal((2, 9, 64), np.float32)
    past = {name: np.empty((2, 2, 0, 16), np.float32) for name in decoder.shapes if name.startswith("past")}
    mask = np.array([[1] * 9, [0, 0, 0] + [1] * 6])

    def logits(rows: slice, start: int, keep: int) -> np.ndarray:
        inputs = {
            "inputs_embeds": embeds[rows, start:],
            "attention_mask": mask[rows, start:],
            "position_ids": np.maximum(mask[rows, start:].cumsum(axis=1) - 1, 0),
            "num_logits_to_keep": np.array(keep),
            **{name: value[rows] for name, value in past.items()},
        }
        return decoder(inputs)["logits"].numpy()

    both = logits(slice(0, 2), 0, 0)
    assert both.shape == (2, 9, 416)
    np.testing.assert_allclose(both[1, -1:], logits(slice(1, 2), 3, 1)[0], atol=1e-5)
    np.testing.assert_allclose(both[0, -1:], logits(slice(0, 1), 0, 1)[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["cohere2", "gemma3_text", "granite", "mistral", "phi", "qwen2", "qwen3"])
def test_every_family_says_the_same_beyond_its_window(family, tmp_path, save_model, pictures):
    model = save_model(tmp_path / "model", family)
    export(tmp_path / "model", tmp_path / "exported", "onnx")
    prompt = encode(HoVLEProcessor.from_pretrained(tmp_path / "model"), "What is it?", pictures[0])
    engine = OnnxForConditionalGeneration.load(tmp_path / "exported")
    assert engine.generate(**prompt, **GREEDY).tolist() == model.generate(**prompt, **GREEDY).tolist()


def test_a_model_without_a_tokenizer_keeps_how_pictures_are_cut(tmp_path, save_model):
    save_model(tmp_path / "model", with_processor=False, **SMALL)
    flat = load_flat(tmp_path / "model")
    (tmp_path / "exported").mkdir()
    format_onnx._write_documents(flat, tmp_path / "exported")
    assert not (tmp_path / "exported" / "tokenizer_config.json").exists()
    assert HoVLEImageProcessor.from_pretrained(tmp_path / "exported").tile_size == 56


def test_graphs_that_differ_from_the_model_are_not_left_behind(tmp_path, model_folder, exported, monkeypatch):
    graphs = {path: onnx_ir.load(exported / path) for path in (STEM, WORDS, DECODER)}
    attention = next(node for node in graphs[DECODER].graph if node.op_type == "Softmax")
    attention.op_type = "Identity"
    attention.attributes.clear()
    for name, path in {"_trace_stem": STEM, "_trace_words": WORDS, "_trace_decoder": DECODER}.items():
        monkeypatch.setattr(format_onnx, name, lambda flat, path=path: graphs[path])
    with pytest.raises(ValueError, match="logits differ"):
        export(model_folder, tmp_path / "exported", "onnx")
    assert not (tmp_path / "exported").exists()


NOT_FLAT = {
    "HoVLE-HD": {"pixel_shuffle_loc": "post"},
    "normalize_encoder_output": {"normalize_encoder_output": True},
    "rope of their own": {"embedding_rope_parameters": {"rope_theta": 7.0}},
    "'bidirectional'": {"image_attention": "bidirectional"},
    "turns with the length": {
        "text": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    },
}


@pytest.mark.parametrize("reason", NOT_FLAT)
def test_what_is_no_stock_decoder_with_a_fixed_rope_is_refused(reason, tmp_path, save_model):
    save_model(tmp_path / "model", **NOT_FLAT[reason])
    with pytest.raises(ValueError, match=reason):
        export(tmp_path / "model", tmp_path / "exported", "onnx")
    assert not (tmp_path / "exported").exists()


def test_without_its_packages_export_and_engine_say_what_installs_them(tmp_path, model_folder, exported, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx.*pip install 'hovle\[onnx\]'"):
        export(model_folder, tmp_path / "exported", "onnx")
    with pytest.raises(ValueError, match=r"onnxruntime.*pip install 'hovle\[onnx\]'"):
        Conversation(exported, engine="onnx")


def test_the_engine_names_the_file_that_a_folder_lacks_or_that_is_damaged(tmp_path, model_folder, exported):
    with pytest.raises(ValueError, match=r"vision_encoder.onnx is not in .*hovle export MODEL DST --to onnx"):
        Conversation(model_folder, engine="onnx")
    (tmp_path / "onnx").mkdir()
    for path in exported.rglob("*.*"):
        (tmp_path / path.relative_to(exported)).write_bytes(path.read_bytes())
    (tmp_path / STEM).write_bytes(b"not a graph")
    with pytest.raises(ValueError, match=r"cannot load .*vision_encoder.onnx"):
        OnnxForConditionalGeneration.load(tmp_path)


def test_several_prompts_and_padding_are_refused(exported):
    engine = OnnxForConditionalGeneration.load(exported)
    with pytest.raises(ValueError, match="ONNX Runtime runs one prompt at a time here, got 2"):
        engine(torch.tensor([[5], [6]]))
    with pytest.raises(ValueError, match="must not be padded"):
        engine(torch.tensor([[5, 6]]), attention_mask=torch.tensor([[0, 1]]))
