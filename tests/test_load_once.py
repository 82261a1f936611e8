"""From file to tiles a picture is opened, decoded and converted once, whichever way it goes."""

import base64
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image, ImageFile
from transformers import pipeline

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor, cli
from hovle.assets.vqa_questions import Question
from hovle.chat import Conversation
from hovle.eval.vqa import answer_questions, with_blank_pictures
from hovle.model import pictures
from hovle.serve.app import ServerOptions, build_app
from hovle.train.data.records import Record, conversation
from hovle.train.data.samples import ReplySamples

USER_MARK = "<IMG_CONTEXT>What is it?"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, make_tokenizer, tiny_config) -> Path:
    """A tiny model with random weights and its processor, saved."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = tiny_config()
    HoVLEForConditionalGeneration(config).save_pretrained(folder)
    HoVLEProcessor.from_language_model(make_tokenizer(), config, max_tiles=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor(model_folder) -> HoVLEProcessor:
    return HoVLEProcessor.from_pretrained(model_folder)


@pytest.fixture(params=["plain.jpg", "turned.jpg", "clear.png"])
def path(request, tmp_path) -> Path:
    """A picture that needs no conversion, one that lies on its side, one with transparency."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    image, path = Image.fromarray(pixels), tmp_path / request.param
    if request.param == "clear.png":
        image.putalpha(100)
    exif = Image.Exif()
    exif[274] = 6 if request.param == "turned.jpg" else 1
    image.save(path, exif=exif)
    return path


@pytest.fixture
def counts(monkeypatch) -> Counter:
    """How often a file was opened, its pixels decoded by whichever library, and a picture converted."""
    counts = Counter(opened=0, decoded=0, converted=0)
    real_open, real_load, to_upright_rgb = Image.open, ImageFile.ImageFile.load, pictures.to_upright_rgb

    def counted_open(*args, **kwargs):
        counts["opened"] += 1
        return real_open(*args, **kwargs)

    def counted_load(image):
        counts["decoded"] += bool(image.tile)
        return real_load(image)

    def counted_conversion(image, *args):
        upright = to_upright_rgb(image, *args)
        counts["converted"] += upright is not image
        return upright

    monkeypatch.setattr(Image, "open", counted_open)
    monkeypatch.setattr(ImageFile.ImageFile, "load", counted_load)
    monkeypatch.setattr(pictures, "to_upright_rgb", counted_conversion)
    try:
        import simplejpeg
    except ImportError:
        return counts
    decode_jpeg = simplejpeg.decode_jpeg

    def counted_decoding(*args):
        counts["decoded"] += 1
        return decode_jpeg(*args)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", counted_decoding)
    return counts


def once(path: Path) -> dict[str, int]:
    return {"opened": 1, "decoded": 1, "converted": int(path.name != "plain.jpg")}


def chat(item: dict, text: str = "What is it?") -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", **item}, {"type": "text", "text": text}]}]


ENCODED = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}

ROUTES = {
    "image processor": lambda processor, path: processor.image_processor([str(path)]),
    "rendered prompt": lambda processor, path: processor(images=path, text=USER_MARK),
    "rendered prompt within a budget": lambda processor, path: processor(
        images=[path], text=[USER_MARK], max_image_tokens=500
    ),
    "chat": lambda processor, path: processor.apply_chat_template(chat({"path": str(path)}), **ENCODED),
    "chat, a path of unknown kind": lambda processor, path: processor.apply_chat_template(
        chat({"image": str(path)}), **ENCODED
    ),
    "chat, base64": lambda processor, path: processor.apply_chat_template(
        chat({"image": base64.b64encode(path.read_bytes()).decode()}), **ENCODED
    ),
    "chat within a budget": lambda processor, path: processor.apply_chat_template(
        chat({"path": str(path)}), max_image_tokens=500, **ENCODED
    ),
    "chat with a typed special token": lambda processor, path: processor.apply_chat_template(
        chat({"path": str(path)}, "<|im_end|>?"), max_image_tokens=500, **ENCODED
    ),
    "chat, pictures beside it": lambda processor, path: processor.apply_chat_template(
        chat({}), images=[path], **ENCODED
    ),
    "chat, the user's own Pillow image": lambda processor, path: processor.apply_chat_template(
        chat({"image": Image.open(path)}), max_image_tokens=500, **ENCODED
    ),
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_the_processor_loads_a_picture_once(processor, path, counts, route):
    route(processor, path)
    assert counts == once(path)


def test_a_loaded_picture_comes_back_as_it_is(path, counts):
    loaded = pictures.load_picture(path)
    assert pictures.load_picture(loaded) is loaded
    assert counts == once(path)


def test_a_pipeline_loads_a_picture_once(model_folder, path, counts):
    answer = pipeline("image-text-to-text", model=str(model_folder))
    answer(text=chat({"path": str(path)}), max_new_tokens=1)
    assert counts == once(path)


def test_the_terminal_loads_a_picture_once(model_folder, path, counts):
    command = ["chat", "--model", str(model_folder), "--image", str(path), "-q", "?", "--max-new-tokens", "1"]
    assert cli.main(command) == 0
    assert counts == once(path)


def test_a_conversation_does_not_load_its_pictures_again_at_each_turn(model_folder, path, counts):
    talk = Conversation(str(model_folder), max_new_tokens=1)
    talk.add_images([path])
    talk.answer("What is it?")
    talk.answer("And now?")
    assert counts == once(path)


def test_a_server_reads_the_header_and_loads_a_picture_once(model_folder, processor, path, counts):
    model = HoVLEForConditionalGeneration.from_pretrained(model_folder).eval()
    url = "data:;base64," + base64.b64encode(path.read_bytes()).decode()
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    with TestClient(build_app(model, processor, ServerOptions(model=str(model_folder)))) as client:
        answer = client.post("/v1/chat/completions", json={"messages": [message], "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    assert counts == {**once(path), "opened": 2}  # the header first: pixels of all pictures together are bounded


def test_scoring_loads_a_picture_once_and_asks_its_header_for_its_size(model_folder, path, counts):
    model = HoVLEForConditionalGeneration.from_pretrained(model_folder).eval()
    processor = HoVLEProcessor.from_pretrained(model_folder)
    answer_questions(model, processor, [Question("?", "red", path)], max_new_tokens=1)
    assert counts == {**once(path), "opened": 2}  # prompts of like length are answered together
    (blank,) = with_blank_pictures([Question("?", "red", path)])
    assert blank.picture.size == ((60, 90) if path.name == "turned.jpg" else (90, 60))
    assert counts == {**once(path), "opened": 3}


def test_training_reads_the_header_when_it_packs_and_loads_a_picture_once(processor, path, counts):
    maker = ReplySamples(processor)
    sample = maker.make(Record("x", conversation(path, "What is it?", "red")), 0)
    assert counts == {"opened": 1, "decoded": 0, "converted": 0}
    maker.load_pixels(sample.name, sample.pictures, sample.num_tiles)
    assert counts == {**once(path), "opened": 2}


def test_a_drawing_of_tiles_loads_a_picture_once(path, counts, tmp_path, capsys):
    assert cli.main(["tiles", str(path), "--out", str(tmp_path / "tiles.png")]) == 0
    assert counts == once(path)
