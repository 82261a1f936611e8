"""transformers' own pipeline: what is given to it directly reaches `generate`, and batches may be mixed."""

import pytest
import torch
from PIL import Image
from transformers import pipeline

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_tokenizer, tiny_config):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config()
    HoVLEForConditionalGeneration(config).save_pretrained(folder)
    HoVLEProcessor.from_language_model(make_tokenizer(), config, max_tiles=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answer(folder):
    return pipeline("image-text-to-text", model=str(folder), device="cpu")


def chat(*sizes: tuple[int, int], text: str = "what is it?") -> list[dict]:
    pictures = [{"type": "image", "image": Image.effect_noise(size, 80).convert("RGB")} for size in sizes]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


@pytest.fixture
def given(answer, monkeypatch):
    """What `generate` was given."""
    seen = []
    real = answer.model._prepare_generation_config

    def prepare(*args, **kwargs):
        config, rest = real(*args, **kwargs)
        seen.append(config)
        return config, rest

    monkeypatch.setattr(answer.model, "_prepare_generation_config", prepare)
    return seen


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("sizes", [[], [(60, 60)]], ids=["text", "picture"])
def test_arguments_of_generate_may_be_given_to_the_pipeline_itself(answer, given, batch_size, sizes):
    chats = [chat(*sizes), chat(*sizes, text="and this?")]
    settings = {"do_sample": True, "temperature": 1.7, "top_k": 7, "repetition_penalty": 1.1}
    answer(text=chats, max_new_tokens=4, batch_size=batch_size, return_full_text=False, **settings)
    assert given
    for config in given:
        assert {name: getattr(config, name) for name in settings} == settings


def test_a_temperature_given_directly_draws_and_do_sample_false_does_not(answer):
    def answers(**settings) -> set[str]:
        found = set()
        for seed in range(4):
            torch.manual_seed(seed)
            found.add(answer(text=chat(), max_new_tokens=8, return_full_text=False, **settings)[0]["generated_text"])
        return found

    assert len(answers(do_sample=False)) == 1
    assert len(answers(do_sample=True, temperature=2.0)) > 1


def test_an_argument_that_nothing_takes_is_refused(answer):
    with pytest.raises(ValueError, match="temprature: no argument"):
        answer(text=chat(), max_new_tokens=4, temprature=2.0)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_batches_of_texts_one_picture_and_several_answer_as_each_alone(answer, batch_size):
    chats = [chat(), chat((60, 60)), chat((200, 50), (50, 200)), chat(text="only words, and more of them than before")]
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    together = answer(text=chats, batch_size=batch_size, **options)
    alone = [answer(text=one, **options) for one in chats]
    assert [one[0]["generated_text"] for one in together] == [one[0]["generated_text"] for one in alone]


def test_prompts_of_a_batch_need_no_chat(answer):
    mark = answer.processor.image_token
    picture = Image.new("RGB", (60, 60), "red")
    found = answer(images=[picture], text=[f"{mark} what?"], max_new_tokens=3, do_sample=False, return_full_text=False)
    assert len(found) == 1


def test_what_a_pipeline_saves_is_what_it_loaded(answer, folder, tmp_path):
    answer.processor.save_pretrained(tmp_path)
    assert (tmp_path / "processor_config.json").read_text() == (folder / "processor_config.json").read_text()
