"""Tiles of bytes, which the model normalises: the same answers, a quarter of the memory, wherever the model runs."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from hovle import HoVLEConfig, HoVLEForConditionalGeneration, HoVLEImageProcessor, HoVLEProcessor
from hovle.loading import load_processor

BYTES = {"do_rescale": False, "do_normalize": False}
STATISTICS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25]}


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft areas with a little noise, hardly any pure black or white."""
    generator = np.random.default_rng(seed)
    areas = Image.fromarray(generator.integers(50, 200, (6, 8, 3), dtype=np.uint8))
    soft = np.asarray(areas.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((soft + generator.integers(-10, 11, soft.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module", params=[{}, STATISTICS, {"pixel_shuffle_loc": "post"}], ids=["usual", "other", "hd"])
def parts(request, make_tokenizer, tiny_config):
    """A model and its processor; the second is taught other statistics."""
    torch.manual_seed(0)
    config = tiny_config(**request.param)
    model = HoVLEForConditionalGeneration(config).eval()
    return model, HoVLEProcessor.from_language_model(make_tokenizer(), config, max_tiles=4)


def save(folder, model, processor, **settings):
    """A folder whose image processor has these settings."""
    processor = copy.deepcopy(processor)
    for name, value in settings.items():
        setattr(processor.image_processor, name, value)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def chat(picture: Image.Image | None) -> list[dict]:
    pictures = [] if picture is None else [{"type": "image", "image": picture}]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": "what is it?"}]}]


@pytest.mark.parametrize("size", [(500, 375), (90, 400), (56, 56), (40, 33), (1000, 300)])
@pytest.mark.parametrize("max_tiles", [1, 6])
def test_normalised_bytes_are_close_to_the_slow_way(size, max_tiles):
    image_processor = HoVLEImageProcessor(tile_size=56, max_tiles=max_tiles)
    picture = photograph(*size)
    slow = image_processor(picture, return_tensors="pt")
    fast = image_processor(picture, return_tensors="pt", **BYTES)
    assert fast["pixel_values"].dtype == torch.uint8
    assert torch.equal(fast["num_patches"], slow["num_patches"])
    mean, std = (
        torch.tensor(numbers).view(3, 1, 1) for numbers in (image_processor.image_mean, image_processor.image_std)
    )
    difference = (((fast["pixel_values"] / 255 - mean) / std) - slow["pixel_values"]).abs()
    assert difference.max() <= 0.035
    assert difference.mean() < 0.01  # worst 0.0040


def test_the_model_normalises_bytes_as_the_image_processor_does(parts):
    model, processor = parts
    inputs = processor.apply_chat_template(
        chat(photograph(56, 56)),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",  # no resizing: the same pixels
    )
    pixels = processor.image_processor(photograph(56, 56), return_tensors="pt", **BYTES)["pixel_values"]
    with torch.no_grad():
        expected = model(**inputs).logits
        found = model(**{**inputs, "pixel_values": pixels}).logits
        assert torch.equal(found, expected)
        half = copy.deepcopy(model).to(torch.bfloat16)
        as_usual = half(**inputs.to(torch.bfloat16)).logits
        assert torch.equal(half(**{**inputs, "pixel_values": pixels}).logits, as_usual)


def test_bytes_compile_as_one_graph(parts, whole_graph):
    model, processor = parts
    pixels = processor.image_processor(photograph(150, 100), return_tensors="pt", **BYTES)["pixel_values"]
    compiled = torch.compile(
        lambda tiles: model.get_image_features(tiles).pooler_output, fullgraph=True, backend="eager"
    )
    with whole_graph, torch.no_grad():
        assert torch.equal(compiled(pixels), model.get_image_features(pixels).pooler_output)


def test_a_folder_remembers_that_its_tiles_are_bytes(parts, tmp_path):
    save(tmp_path, *parts, **BYTES)
    processor = load_processor(tmp_path)
    model = HoVLEForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = processor.apply_chat_template(
        chat(photograph(150, 100)), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    ).to("cpu", torch.bfloat16)
    assert inputs["pixel_values"].dtype == torch.uint8
    slow = processor.apply_chat_template(
        chat(photograph(150, 100)),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"do_rescale": True, "do_normalize": True},
    )
    assert slow["pixel_values"].is_floating_point()
    answers = [model.generate(**batch, max_new_tokens=4, do_sample=False) for batch in (inputs, slow)]
    assert torch.equal(*answers)
    assert AutoImageProcessor.from_pretrained(tmp_path).gives_bytes()


def test_a_pipeline_with_bytes_mixes_prompts_with_and_without_pictures(parts, tmp_path):
    save(tmp_path, *parts, **BYTES)
    answer = pipeline("image-text-to-text", model=str(tmp_path), device="cpu")
    chats = [chat(photograph(150, 100)), chat(None), chat(photograph(56, 56))]
    settings = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    alone = [answer(text=one, **settings)[0]["generated_text"] for one in chats]
    together = answer(text=chats, batch_size=3, **settings)
    assert [one[0]["generated_text"] for one in together] == alone
    encoded = answer.processor.apply_chat_template(chat(None), tokenize=True, return_dict=True)
    assert encoded["pixel_values"].dtype == torch.uint8


@pytest.mark.parametrize("tensors", [None, "np", "pt"])
def test_bytes_come_as_they_are_asked_for(tensors):
    image_processor = HoVLEImageProcessor(tile_size=56, max_tiles=4, **BYTES)
    pictures = [photograph(150, 100), photograph(56, 56)]
    found = image_processor(pictures, return_tensors=tensors)
    expected = torch.cat([image_processor(one, return_tensors="pt")["pixel_values"] for one in pictures])
    assert type(found["pixel_values"]) is {None: list, "np": np.ndarray, "pt": torch.Tensor}[tensors]
    assert torch.equal(torch.as_tensor(np.asarray(found["pixel_values"])), expected)


def test_limits_of_each_picture_hold_for_bytes_too():
    image_processor = HoVLEImageProcessor(tile_size=56, max_tiles=6, **BYTES)
    found = image_processor([photograph(300, 200)] * 3, tile_limits=[1, 4, 6], return_tensors="pt")
    assert found["num_patches"].tolist() == [1, 5, 7]
    assert len(image_processor(photograph(300, 200), crop_to_patches=False)["pixel_values"]) == 1


def test_numbers_that_do_not_agree_are_refused_when_a_folder_is_loaded(parts, tmp_path):
    save(tmp_path, *parts, **BYTES, image_std=[0.1, 0.1, 0.1])
    with pytest.raises(
        ValueError, match=r"says image_mean, image_std and rescale_factor \[.*the model would normalise"
    ):
        load_processor(tmp_path)
    save(tmp_path, *parts, do_rescale=True, do_normalize=True, image_std=[0.1, 0.1, 0.1])
    assert load_processor(tmp_path).image_processor.image_std == (0.1, 0.1, 0.1)  # it normalises itself


def test_an_exported_folder_is_judged_by_the_config_it_keeps_for_hovle(parts, tmp_path):
    save(tmp_path, *parts, **BYTES)
    (tmp_path / "config.json").rename(tmp_path / "hovle_config.json")
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')  # as for transformers.js
    assert load_processor(tmp_path).image_processor.gives_bytes()
    save(tmp_path, *parts, **BYTES, image_std=[0.1, 0.1, 0.1])
    with pytest.raises(ValueError, match="its image processor gives bytes"):
        load_processor(tmp_path)


@pytest.mark.parametrize(
    "fields", [{"image_std": [0.0, 1.0, 1.0]}, {"image_mean": [float("nan")] * 3}, {"image_mean": [0.5]}]
)
def test_statistics_that_cannot_work_are_refused(fields):
    with pytest.raises(ValueError, match="image_mean and image_std must hold a finite number and a positive one"):
        HoVLEConfig(**fields)


def test_bytes_of_other_channels_need_their_own_statistics(tiny_config):
    model = HoVLEForConditionalGeneration(tiny_config(num_channels=1))
    with pytest.raises(
        ValueError, match="Tiles of bytes have 1 channels, but the config's image_mean and image_std have 3"
    ):
        model.get_image_features(torch.zeros(1, 1, 56, 56, dtype=torch.uint8))
    model = HoVLEForConditionalGeneration(tiny_config(num_channels=1, image_mean=[0.5], image_std=[0.5]))
    assert model.get_image_features(torch.zeros(1, 1, 56, 56, dtype=torch.uint8)).pooler_output.isfinite().all()
