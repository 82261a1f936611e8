"""`hovle serve --engine llama.cpp`, `openvino` and `onnx`: what `hovle export` wrote, behind the same front."""

import base64
import io

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from tiny_models import shake

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.export.command import export
from hovle.export.engines import load_exported
from hovle.serve.app import ServerOptions, build_app


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((150, 60))


def url(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


@pytest.mark.slow
@pytest.mark.parametrize(("to", "engine"), [("gguf", "llama.cpp"), ("openvino", "openvino"), ("onnx", "onnx")])
def test_answers_equal_those_of_the_engine_itself(tmp_path, make_tokenizer, tiny_config, to, engine):
    torch.manual_seed(0)
    config = tiny_config(text_config={"vocab_size": 416})
    processor = HoVLEProcessor.from_language_model(make_tokenizer(), config, max_tiles=4)
    shake(HoVLEForConditionalGeneration(config)).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "exported", to)
    model = load_exported(tmp_path / "exported", engine)
    expected = []
    for seed in range(3):
        content = [{"type": "image", "image": picture(seed)}, {"type": "text", "text": "What is it?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(ids, skip_special_tokens=True))
    with TestClient(build_app(model, processor, ServerOptions("tiny"))) as client:
        for seed in range(3):
            content = [
                {"type": "image_url", "image_url": {"url": url(picture(seed))}},
                {"type": "text", "text": "What is it?"},
            ]
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
            answer = client.post("/v1/chat/completions", json=body).json()
            assert answer["choices"][0]["message"]["content"] == expected[seed]
