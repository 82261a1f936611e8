"""What transformers asks of every processor and image processor it ships, adapted to HoVLE.

Checks that `test_processing_hovle.py` and `test_image_processing_hovle.py` make are not repeated here.
"""

import copy
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, BatchFeature
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

from hovle import HoVLEImageProcessor, HoVLEProcessor

MARK = "<IMG_CONTEXT>"


def picture(width: int = 80, height: int = 60) -> Image.Image:
    """A smooth picture, different along both sides."""
    down, across = np.mgrid[0:height, 0:width]
    channels = [across * 255 / max(width - 1, 1), down * 255 / max(height - 1, 1), (across + down) % 97]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def said_by(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def processor(make_tokenizer) -> HoVLEProcessor:
    """Tiles of 56 px with 4 tokens each, up to 4 of them."""
    return HoVLEProcessor.from_language_model(make_tokenizer(), image_size=56, max_tiles=4)


@pytest.fixture(scope="module")
def image_processor() -> HoVLEImageProcessor:
    return HoVLEImageProcessor(tile_size=28, max_tiles=4)


# --- processor -------------------------------------------------------------------------------------------------------


def test_the_outputs_are_the_models_inputs(processor):
    names = {"input_ids", "attention_mask", "pixel_values"}
    assert set(processor.model_input_names) == names
    batch = processor(images=picture(), text=f"a {MARK}", return_tensors="pt")
    assert isinstance(batch, BatchFeature)
    assert set(batch) == names
    assert set(processor(text="only words")) == names - {"pixel_values"}


def test_the_parts_have_their_classes_and_names(processor):
    assert processor.get_attributes() == ["image_processor", "tokenizer"]
    assert isinstance(processor.image_processor, HoVLEImageProcessor)
    assert processor.tokenizer.convert_tokens_to_ids(processor.image_token) == processor.image_token_id
    with pytest.raises(TypeError, match="tokenizer"):
        HoVLEProcessor(processor.image_processor, processor.image_processor)


def test_text_alone_is_what_the_tokenizer_makes_of_it(processor):
    texts = ["two words", "three more words"]
    expected = processor.tokenizer(texts, padding=True, return_tensors="pt")
    found = processor(text=texts, return_tensors="pt")
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["attention_mask"], expected["attention_mask"])
    assert processor.batch_decode(found["input_ids"], skip_special_tokens=True) == texts
    assert processor.decode(found["input_ids"][1]) == texts[1]
    assert processor.post_process_image_text_to_text(found["input_ids"]) == texts


@pytest.mark.parametrize(
    ("kwargs", "length"),
    [
        ({"padding": "max_length", "max_length": 40}, 40),
        ({"text_kwargs": {"padding": "max_length", "max_length": 40}}, 40),
        ({"common_kwargs": {"return_tensors": "pt"}, "padding": "max_length", "max_length": 40}, 40),
        ({"pad_to_multiple_of": 64}, 64),
    ],
    ids=["flat", "nested", "common", "multiple"],
)
def test_arguments_of_the_tokenizer_hold_for_one_call(processor, kwargs, length):
    inputs = {"images": picture(), "text": f"{MARK} what is it, please?"}
    usual = processor(**inputs, return_tensors="pt")["input_ids"]
    kwargs = kwargs if "common_kwargs" in kwargs else {**kwargs, "return_tensors": "pt"}
    assert processor(**inputs, **kwargs)["input_ids"].shape == (1, length)
    assert torch.equal(processor(**inputs, return_tensors="pt")["input_ids"], usual)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"do_rescale": False, "do_normalize": False},
        {"images_kwargs": {"do_rescale": False, "do_normalize": False}},
    ],
    ids=["flat", "nested"],
)
def test_arguments_of_the_image_processor_hold_for_one_call(processor, kwargs):
    inputs = {"images": picture(), "text": MARK, "return_tensors": "pt"}
    usual = processor(**inputs)["pixel_values"]
    raw = processor(**inputs, **kwargs)["pixel_values"]
    assert raw.min() >= 0
    assert 200 < raw.max() <= 255
    settings = processor.image_processor
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.image_mean, settings.image_std))
    assert raw.dtype == torch.uint8
    # torch's filter, not Pillow's: as far apart as where torchvision's is compared below
    assert (raw / 255 - (usual * std + mean)).abs().max() <= 4.01 / 255


def test_an_argument_given_twice_is_refused(processor):
    with pytest.raises(ValueError, match="max_tiles was passed two times"):
        processor(images=picture(), text=MARK, max_tiles=2, images_kwargs={"max_tiles": 3})


@pytest.mark.parametrize(
    "kwargs",
    [{"max_tile": 2}, {"images_kwargs": {"max_tile": 2}}, {"text_kwargs": {"max_tile": 2}}],
    ids=["flat", "of pictures", "of text"],
)
def test_an_unknown_argument_is_refused_by_name(processor, kwargs):
    messages = [{"role": "user", "content": [{"type": "image", "image": picture()}]}]
    with pytest.raises(ValueError, match="max_tile: no argument"):
        processor(images=picture(), text=MARK, **kwargs)
    with pytest.raises(ValueError, match="max_tile: no argument"):
        processor.apply_chat_template(messages, tokenize=True, processor_kwargs=kwargs)


@pytest.mark.parametrize("tokenize", [False, True])
def test_a_chat_refuses_what_is_no_variable_of_its_template_either(processor, make_tokenizer, tokenize):
    messages = [said_by("user", "hello")]
    with pytest.raises(ValueError, match=r"mood: no argument .* no variable of the chat template"):
        processor.apply_chat_template(messages, tokenize=tokenize, mood="cheerful")
    template = "{{ mood }}: {% for message in messages %}{{ message['content'] }}{% endfor %}"
    moody = HoVLEProcessor.from_language_model(make_tokenizer(template), image_size=56)
    assert moody.apply_chat_template(messages, mood="cheerful") == "cheerful: hello"
    plain = processor.apply_chat_template(messages, tokenize=tokenize)
    for harmless in ({"enable_thinking": False}, {"sanitize_control_tokens": True}, {"do_sample": False}):
        assert processor.apply_chat_template(messages, tokenize=tokenize, **harmless) == plain


def test_tensors_come_as_asked(processor):
    inputs = {"images": picture(), "text": f"{MARK} ?"}
    as_torch, as_numpy = (processor(**inputs, return_tensors=kind) for kind in ("pt", "np"))
    as_lists = processor(**inputs)
    for name, values in as_torch.items():
        assert isinstance(as_numpy[name], np.ndarray)
        np.testing.assert_array_equal(as_numpy[name], values.numpy())
        np.testing.assert_array_equal(np.asarray(as_lists[name]), values.numpy())


@pytest.mark.parametrize("is_batched", [False, True])
@pytest.mark.parametrize("return_dict", [False, True])
def test_a_chat_comes_as_ids_or_with_everything(processor, is_batched, return_dict):
    chat = [
        said_by("system", "be short"),
        {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "what?"}]},
        said_by("assistant", "a slope"),
        said_by("user", "and now?"),
    ]
    arguments = {"add_generation_prompt": True, "tokenize": True, "return_tensors": "pt", "return_dict": return_dict}
    found = processor.apply_chat_template([chat, chat[:2]] if is_batched else chat, **arguments)
    ids = found["input_ids"] if return_dict else found
    assert ids.shape[0] == (2 if is_batched else 1)
    assert set(found) >= {"pixel_values", "attention_mask"} if return_dict else isinstance(found, torch.Tensor)
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    expected = processor(images=picture(), text=text, return_tensors="pt")["input_ids"]
    assert torch.equal(ids[:1], expected)


def test_an_answer_can_be_begun(processor):
    chat = [said_by("user", "count"), said_by("assistant", "one, two")]
    text = processor.apply_chat_template(chat, continue_final_message=True)
    assert text.endswith("one, two")
    with pytest.raises(ValueError, match="continue_final_message"):
        processor.apply_chat_template(chat, continue_final_message=True, add_generation_prompt=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # transformers leaves files open
def test_named_templates_are_saved_and_chosen(make_tokenizer, tmp_path):
    processor = HoVLEProcessor.from_language_model(make_tokenizer(), image_size=56)
    short = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    processor.chat_template = {"default": processor.chat_template, "short": short}
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    chat = [said_by("user", "hello")]
    assert loaded.apply_chat_template(chat, chat_template="short") == "hello"
    assert loaded.apply_chat_template(chat, chat_template="say {{ messages[0]['content'] }}") == "say hello"
    assert loaded.apply_chat_template(chat) == processor.apply_chat_template(chat)


def test_settings_can_be_replaced_while_loading(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = HoVLEProcessor.from_pretrained(tmp_path, max_tiles=2)
    assert (loaded.image_processor.max_patches, processor.image_processor.max_patches) == (2, 4)
    wide = picture(200, 50)
    assert len(loaded(images=wide, text=MARK, return_tensors="pt")["pixel_values"]) == 3


def test_saving_twice_gives_the_same_files(processor, tmp_path):
    processor.save_pretrained(tmp_path / "first")
    AutoProcessor.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for file in ("processor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "first" / file).read_text() == (tmp_path / "second" / file).read_text()


# --- image processor -------------------------------------------------------------------------------------------------


def forms_of(image: Image.Image) -> dict:
    """The same picture in every form that holds pixels."""
    array = np.asarray(image)
    first = np.ascontiguousarray(array.transpose(2, 0, 1))
    return {
        "array, channels last": array,
        "array, channels first": first,
        "float array": array.astype(np.float32) / 255,
        "tensor": torch.from_numpy(first),
        "float tensor": torch.from_numpy(first) / 255,
        "with opacity": np.dstack([array, np.full(array.shape[:2], 255, np.uint8)]),
    }


@pytest.mark.parametrize("form", forms_of(picture()))
def test_every_form_of_a_picture_gives_the_same_tiles(image_processor, form):
    expected = image_processor(picture(), return_tensors="pt")
    found = image_processor(forms_of(picture())[form], return_tensors="pt")
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert torch.equal(found["num_patches"], expected["num_patches"])


def test_grey_pictures_get_three_equal_channels(image_processor):
    outputs = image_processor(picture().convert("L"), return_tensors="pt", do_normalize=False)
    pixels = outputs["pixel_values"]
    assert pixels.shape[1] == 3
    assert torch.equal(pixels[:, 0], pixels[:, 1])
    assert torch.equal(pixels[:, 0], pixels[:, 2])


@pytest.mark.parametrize(("width", "height"), [(80, 60), (300, 60), (60, 300), (28, 28), (500, 400)])
def test_torchvision_and_pillow_agree_within_rounding(image_processor, width, height):
    """The other backend of the base class: same grid, same tiles, pixels within a grey level or two."""
    settings = {"size": {"height": 28, "width": 28}, "crop_to_patches": True, "max_patches": 4, "do_normalize": False}
    fast = GotOcr2ImageProcessor(**settings)(picture(width, height), return_tensors="pt")
    ours = image_processor(picture(width, height), return_tensors="pt", do_normalize=False)
    assert torch.equal(ours["num_patches"], fast["num_patches"])
    difference = 255 * (ours["pixel_values"] - fast["pixel_values"]).abs()
    assert difference.max() <= 4  # where the third channel jumps
    assert difference.mean() < 0.5


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"do_rescale": False, "do_normalize": False, "resample": 2}, lambda pixels: pixels * 255),
        ({"do_normalize": False}, lambda pixels: pixels),
        ({"do_normalize": False, "rescale_factor": 1 / 510}, lambda pixels: pixels / 2),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, lambda pixels: (pixels - 0.5) / 0.25),
    ],
    ids=["raw", "plain", "factor", "mean and deviation"],
)
def test_every_step_can_be_set(image_processor, options, change, tmp_path):
    same = {name: options[name] for name in ("resample",) if name in options}
    plain = image_processor(picture(), return_tensors="pt", do_normalize=False, **same)["pixel_values"]
    expected = change(plain)
    found = image_processor(picture(), return_tensors="pt", **options)["pixel_values"]
    torch.testing.assert_close(found.float(), expected, atol=2e-5, rtol=1e-6)
    HoVLEImageProcessor(tile_size=28, max_tiles=4, **options).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(loaded(picture(), return_tensors="pt")["pixel_values"], found)


@pytest.mark.parametrize("resample", [Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
def test_the_filter_can_be_set(image_processor, resample):
    one_tile = image_processor(
        picture(), return_tensors="pt", resample=resample, max_tiles=1, do_normalize=False, do_rescale=False
    )["pixel_values"][0]
    expected = np.asarray(picture().resize((28, 28), resample))
    np.testing.assert_array_equal(one_tile.numpy().transpose(1, 2, 0), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": {"height": 28, "width": 56}}, "tiles are square"),
        ({"size": {"shortest_edge": 28}}, "tiles are square"),
        ({"do_resize": False}, "do_resize=False cannot be had"),
        ({"do_center_crop": True}, "do_center_crop=True cannot be had"),
        ({"do_pad": True}, "do_pad=True cannot be had"),
        ({"data_format": "channels_last"}, "data_format='channels_last' cannot be had"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_tiles_do_not_have_is_refused(image_processor, options, words):
    with pytest.raises(ValueError, match=words):
        image_processor(picture(), **options)
    with pytest.raises(ValueError, match=words):
        HoVLEImageProcessor(**options)


def test_settings_survive_json(image_processor):
    again = HoVLEImageProcessor.from_dict(json.loads(image_processor.to_json_string()))
    assert again.to_dict() == image_processor.to_dict()
    assert (dict(again.size), again.max_patches) == ({"height": 28, "width": 28}, 4)


# --- one stored size and limit behind all names ----------------------------------------------------------------------

TALL = picture(40, 200)
NAMES = {
    "tile_size": [("tile_size", 112), ("size", {"height": 112, "width": 112}), ("size", 112)],
    "max_tiles": [("max_tiles", 2), ("max_patches", 2)],
    "min_tiles": [("min_tiles", 3), ("min_patches", 3)],
}


@pytest.mark.parametrize(
    ("read_as", "name", "value"),
    [(read_as, name, value) for read_as, pairs in NAMES.items() for name, value in pairs],
)
@pytest.mark.parametrize("how", ["set", "loaded with", "set on what was loaded"])
def test_a_setting_is_one_under_all_its_names(processor, tmp_path, read_as, name, value, how):
    processor = copy.deepcopy(processor)
    if how != "set":
        processor.save_pretrained(tmp_path / "before")
        given = {name: value} if how == "loaded with" else {}
        processor = HoVLEProcessor.from_pretrained(tmp_path / "before", **given)
    if how != "loaded with":
        setattr(processor.image_processor, name, value)
    processor.save_pretrained(tmp_path / "after")
    for one in (processor, HoVLEProcessor.from_pretrained(tmp_path / "after")):
        images = one.image_processor
        assert getattr(images, read_as) == (value["height"] if isinstance(value, dict) else value)
        assert (images.tile_size, images.min_tiles, images.max_tiles) == tuple(
            images.grid_settings()[key].height if key == "size" else images.grid_settings()[key]
            for key in ("size", "min_patches", "max_patches")
        )
        inputs = one(images=TALL, text=MARK, return_tensors="pt")
        counted = one._get_num_multimodal_tokens(image_sizes=[(TALL.height, TALL.width)])
        assert len(inputs["pixel_values"]) == counted.num_image_patches[0]
        assert inputs["pixel_values"].shape[-1] == images.tile_size
        assert (inputs["input_ids"] == one.image_token_id).sum() + 2 == counted.num_image_tokens[0]
        assert one.image_seq_length == (images.tile_size // 28) ** 2


def test_a_size_that_is_not_square_is_still_refused(processor):
    images = copy.deepcopy(processor.image_processor)
    images.size = {"height": 56, "width": 28}
    with pytest.raises(ValueError, match="tiles are square"):
        images(TALL)
    with pytest.raises(ValueError, match="tiles are square"):
        HoVLEImageProcessor(size={"height": 56, "width": 28})


@pytest.mark.parametrize("name", ["max_pixels", "min_pixels", "max_tile", "tilesize", "do_image_splitting"])
def test_an_argument_that_nothing_looks_at_is_refused_while_loading_and_building(
    processor, make_tokenizer, tmp_path, name
):
    processor.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path / "text")
    refused = [
        lambda: HoVLEProcessor.from_pretrained(tmp_path, **{name: 3}),
        lambda: AutoProcessor.from_pretrained(tmp_path, **{name: 3}),
        lambda: HoVLEImageProcessor.from_pretrained(tmp_path, **{name: 3}),
        lambda: AutoImageProcessor.from_pretrained(tmp_path, **{name: 3}),
        lambda: HoVLEImageProcessor(**{name: 3}),
        lambda: HoVLEProcessor.from_language_model(tmp_path / "text", **{name: 3}),
    ]
    for load in refused:
        with pytest.raises(ValueError, match=f"{name}: no argument of .*max_tiles"):
            load()


def test_arguments_that_are_looked_at_are_taken_while_loading(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    for load in (HoVLEProcessor.from_pretrained, AutoProcessor.from_pretrained):
        loaded = load(
            tmp_path,
            max_tiles=2,
            text_after_image="\n",
            model_max_length=77,
            pad_token="<|im_end|>",
            local_files_only=True,
            use_fast=True,
            dtype="auto",
            device_map=None,
            trust_remote_code=False,
        )
        assert (loaded.image_processor.max_tiles, loaded.text_after_image) == (2, "\n")
        assert (loaded.tokenizer.model_max_length, loaded.tokenizer.pad_token) == (77, "<|im_end|>")
        loaded.save_pretrained(tmp_path / "saved")
        assert "max_tiles" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


def test_pictures_as_datasets_gives_them_are_read_on_every_way_in(processor):
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    item = {"bytes": buffer.getvalue(), "path": "elsewhere/a.png"}
    expected = processor(images=picture(), text=MARK, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(images=[item], text=MARK, return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(processor.image_processor(item, return_tensors="pt")["pixel_values"], expected)
    for content in ({"type": "image", "image": item}, {"type": "image", **item}):
        batch = processor.apply_chat_template(
            [{"role": "user", "content": [content]}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert torch.equal(batch["pixel_values"], expected)
