"""Validation, derived sizes and storage of HoVLE's configuration."""

import dataclasses

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from hovle import HoVLEConfig

UNUSUAL = {
    "num_embedding_layers": 3,
    "embedding_rope_parameters": {"rope_type": "dynamic", "rope_theta": 123.0, "factor": 2.0},
    "normalize_encoder_output": True,
    "image_size": 96,
    "patch_size": 8,
    "num_channels": 1,
    "image_mean": [0.25],
    "image_std": [0.5],
    "pixel_shuffle_loc": "post",
    "downsample_ratio": 0.25,
    "image_attention": "bidirectional",
    "image_token_id": 7,
    "language_head_bias": True,
    "initializer_range": 0.01,
}


def text_config(**fields) -> LlamaConfig:
    return LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=5, **fields)


def test_every_field_of_the_class_is_documented():
    own = HoVLEConfig.__annotations__.keys() - {"tie_word_embeddings"}
    assert [name for name in own if f"        {name}: " not in HoVLEConfig.__doc__] == []


def test_every_field_survives_json(tmp_path):
    config = HoVLEConfig(
        text_config=text_config(rope_parameters={"rope_type": "default", "rope_theta": 5.0}), **UNUSUAL
    )
    config.save_pretrained(tmp_path)
    loaded = HoVLEConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in UNUSUAL} == UNUSUAL
    assert isinstance(loaded.text_config, LlamaConfig)
    assert loaded.text_config.num_hidden_layers == 5
    assert loaded.text_config.rope_parameters["rope_theta"] == 5.0
    assert loaded.to_dict()["text_config"] == config.to_dict()["text_config"]
    assert set(UNUSUAL) == HoVLEConfig.__annotations__.keys() - {"text_config", "tie_word_embeddings"}


def test_auto_config_finds_the_class(tmp_path):
    HoVLEConfig(text_config=Qwen2Config(num_hidden_layers=9)).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, HoVLEConfig)
    assert isinstance(loaded.text_config, Qwen2Config)
    assert isinstance(AutoConfig.for_model("hovle"), HoVLEConfig)


def test_a_dict_becomes_the_class_its_model_type_names_and_is_left_alone():
    given = {"model_type": "qwen2", "num_hidden_layers": 9}
    config = HoVLEConfig(text_config=given)
    assert isinstance(config.text_config, Qwen2Config)
    assert given == {"model_type": "qwen2", "num_hidden_layers": 9}
    assert isinstance(HoVLEConfig(text_config={"num_hidden_layers": 9}).text_config, LlamaConfig)
    assert isinstance(HoVLEConfig().text_config, LlamaConfig)


def test_caches_count_all_layers_through_the_text_config():
    config = HoVLEConfig(text_config=text_config(), num_embedding_layers=2)
    assert config.get_text_config(decoder=True).num_hidden_layers == 5
    assert config.num_language_layers == 3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("claimed", [True, False])
def test_the_language_model_decides_whether_its_head_is_tied(tied, claimed, tmp_path):
    config = HoVLEConfig(
        text_config=text_config(tie_word_embeddings=tied), num_embedding_layers=1, tie_word_embeddings=claimed
    )
    assert config.tie_word_embeddings == tied
    config.save_pretrained(tmp_path)
    assert HoVLEConfig.from_pretrained(tmp_path).tie_word_embeddings == tied


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 256),
        ({"pixel_shuffle_loc": "post"}, 256),
        ({"pixel_shuffle_loc": "none"}, 1024),
        ({"pixel_shuffle_loc": "none", "patch_size": 28}, 256),
        ({"pixel_shuffle_loc": "none", "patch_size": 32}, 196),
        ({"downsample_ratio": 0.25}, 64),
        ({"downsample_ratio": 1 / 3, "image_size": 420}, 100),
        ({"downsample_ratio": 1.0}, 1024),
    ],
)
def test_tokens_per_tile_follow_from_the_sizes(fields, tokens):
    config = HoVLEConfig(**fields)
    assert config.image_seq_length == tokens
    assert config.tokens_per_tile(2 * config.image_size) == 4 * tokens


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_embedding_layers": 5},
            r"num_embedding_layers \(5\) must lie between 0 and .* \(4\): text_config counts",
        ),
        ({"num_embedding_layers": -1}, r"num_embedding_layers \(-1\) must lie between 0"),
        ({"pixel_shuffle_loc": "before"}, "must be one of pre, post, none, got 'before'"),
        ({"downsample_ratio": 0.4}, r"downsample_ratio \(0.4\) must be 1 divided by a whole number"),
        ({"downsample_ratio": 0.0}, r"downsample_ratio \(0.0\) must be 1 divided by a whole number"),
        ({"downsample_ratio": 2.0}, r"downsample_ratio \(2.0\) must be 1 divided by a whole number"),
        ({"image_size": 440}, r"image_size \(440\) must be a positive multiple of 28 pixels.*: 420 and 448"),
        ({"image_size": 10}, r"image_size \(10\) must be a positive multiple of 28 pixels.*: 28\."),
        ({"image_size": 0}, r"image_size \(0\) must be a positive multiple of 28 pixels"),
        ({"image_size": 441, "pixel_shuffle_loc": "none"}, r"multiple of 14 pixels.*: 434 and 448"),
        ({"patch_size": 0}, r"patch_size \(0\) must be positive"),
    ],
)
def test_impossible_fields_are_refused_with_what_would_work(fields, message):
    with pytest.raises(StrictDataclassError, match=message):  # transformers wraps the ValueError
        HoVLEConfig(**{"text_config": text_config(), "num_embedding_layers": 1, **fields})


@pytest.mark.parametrize(
    ("field", "value"), [("image_size", "448"), ("num_embedding_layers", 2.5), ("pixel_shuffle_loc", None)]
)
def test_a_wrong_type_is_refused_by_name(field, value):
    with pytest.raises(StrictDataclassError, match=field):
        HoVLEConfig(**{field: value})


def test_the_class_keeps_no_state_between_instances():
    first, second = HoVLEConfig(), HoVLEConfig()
    first.text_config.num_hidden_layers = 99
    assert second.text_config.num_hidden_layers != 99
    assert dataclasses.is_dataclass(HoVLEConfig)
