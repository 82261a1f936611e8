"""Values of the right type that cannot work: each is a ValueError that names the field, before anything is built."""

import json
import time

import pytest
from transformers import AutoConfig, LlamaConfig, MixtralConfig, Qwen2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.phi3 import Phi3Config

from hovle import HoVLEConfig

NAN, INF = float("nan"), float("inf")
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def fields(**changes) -> dict:
    """A small HoVLE as config.json describes it; `rope__x` changes a rotary parameter."""
    text = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4}
    return {"model_type": "hovle", "num_embedding_layers": 2, "text_config": text | changes}


def rope(**values) -> dict:
    return {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0} | values}


CASES = [
    *(({name: 0}, name) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size")),
    *(({name: 0}, name) for name in ("intermediate_size", "num_hidden_layers", "head_dim", "max_position_embeddings")),
    *(({name: -8}, name) for name in ("num_attention_heads", "hidden_size", "intermediate_size", "vocab_size")),
    ({"model_type": "qwen2_moe", "moe_intermediate_size": -8}, "moe_intermediate_size"),
    ({"model_type": "mixtral", "num_local_experts": -1}, "num_local_experts"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
    ({"hidden_size": 10**30}, "hidden_size"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_attention_heads"),
    *(({"rms_norm_eps": value}, "rms_norm_eps") for value in (-1.0, 0.0, NAN, INF, 2.0)),
    ({"model_type": "phi", "layer_norm_eps": -1.0}, "layer_norm_eps"),
    ({"hidden_act": "evil"}, "hidden_act"),
    ({"model_type": "gemma3_text", "hidden_activation": "evil"}, "hidden_activation"),
    *(({"initializer_range": value}, "initializer_range") for value in (-1.0, NAN)),
    *(({"attention_dropout": value}, "attention_dropout") for value in (-0.5, 1.5, NAN)),
    ({"model_type": "granite", "logits_scaling": 0.0}, "logits_scaling"),
    ({"model_type": "granite", "embedding_multiplier": NAN}, "embedding_multiplier"),
    ({"model_type": "gemma2", "final_logit_softcapping": 0.0}, "final_logit_softcapping"),
    ({"pad_token_id": 10**7}, "pad_token_id"),
    *((rope(factor=value), r"rope_parameters\.factor") for value in (0, -1.0, NAN, INF, "2")),
    *((rope(rope_theta=value), r"rope_parameters\.rope_theta") for value in (0, -1.0, NAN)),
    (rope(rope_type="spiral"), "rope_type"),
    (rope(rope_type=["linear"]), "rope_type"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": NAN}}, r"rope_scaling\.factor"),
    ({"rope_parameters": YARN | {"beta_fast": NAN}}, "beta_fast"),
    ({"rope_parameters": YARN | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings"),
    ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 2.0}}, "partial_rotary"),
    (
        {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 0}}},
        r"rope_parameters\.full_attention\.factor",
    ),
    ({"model_type": "no-such-model"}, "no-such-model"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"layer_types": 5, "model_type": "qwen2"}, "layer_types"),
]


@pytest.mark.parametrize(("changes", "name"), CASES, ids=lambda value: str(value)[:70])
def test_a_decoder_that_cannot_work_is_refused_by_the_field_s_name(tmp_path, changes, name):
    (tmp_path / "config.json").write_text(json.dumps(fields(**changes)))
    started = time.monotonic()
    for load in (
        lambda: HoVLEConfig(**{key: value for key, value in fields(**changes).items() if key != "model_type"}),
        lambda: HoVLEConfig.from_pretrained(tmp_path),
        lambda: AutoConfig.from_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=f"text_config.*{name}"):
            load()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("own", "name"),
    [
        *(({"num_channels": value}, "num_channels") for value in (0, -3, 10**6)),
        *(({"image_size": value}, "image_size") for value in (0, -28, 28 * 10**6)),
        *(({"patch_size": value}, "patch_size") for value in (0, -1, 10**6)),
        *(({"num_embedding_layers": value}, "num_embedding_layers") for value in (-1, 4, 10**6)),
        *(({"initializer_range": value}, "initializer_range") for value in (-0.1, NAN)),
        *(({"downsample_ratio": value}, "downsample_ratio") for value in (NAN, INF, -0.5)),
        *(({"embedding_rope_parameters": {"factor": value}}, r"rope_parameters\.factor") for value in (0, NAN)),
        ({"image_token_id": -1}, "image_token_id"),
        ({"text_config": "llama"}, "text_config"),
        ({"text_config": [1]}, "text_config"),
        ({"dtype": "system"}, "system"),
    ],
)
def test_a_folder_s_own_fields_are_checked_too(tmp_path, own, name):
    (tmp_path / "config.json").write_text(json.dumps(fields() | own))
    with pytest.raises(ValueError, match=name):
        HoVLEConfig.from_pretrained(tmp_path)


def test_a_value_spoilt_later_is_not_saved(tmp_path):
    config = HoVLEConfig(text_config=fields()["text_config"], num_embedding_layers=2)
    config.text_config.rms_norm_eps = -1.0
    with pytest.raises(Exception, match=r"text_config\.rms_norm_eps must be a number between 0 and 1.*got -1\.0"):
        config.save_pretrained(tmp_path)


def test_an_error_names_what_would_work():
    with pytest.raises(ValueError, match=r"hidden_act must be an activation that transformers has, such as silu"):
        HoVLEConfig(**fields(hidden_act="silo"))


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, MixtralConfig, Gemma3TextConfig, Phi3Config])
def test_what_published_models_have_passes(config_class):
    HoVLEConfig(text_config=config_class(), num_embedding_layers=2)
    HoVLEConfig(text_config=config_class().to_dict(), num_embedding_layers=2)


@pytest.mark.parametrize("where", ["config", "text_config"])
@pytest.mark.parametrize("name", ["attn_implementation", "experts_implementation"])
def test_a_file_cannot_ask_for_code_of_the_hub(tmp_path, where, name):
    content = fields()
    (content if where == "config" else content["text_config"])[name] = "evil/kernel"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"asks for code of the Hub: {name} is 'evil/kernel'"):
        HoVLEConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["more", "text_config"])
def test_a_config_nested_without_end_is_refused(tmp_path, key):
    inner = '{"a":' * 5000 + "1" + "}" * 5000
    (tmp_path / "config.json").write_text(json.dumps(fields())[:-1] + f', "{key}": {inner}}}')
    with pytest.raises(ValueError, match="nested too deeply"):
        HoVLEConfig.from_pretrained(tmp_path)
