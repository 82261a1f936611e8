"""What vLLM's and SGLang's backends for models of transformers look at before they load one, and what they then do.

Read in SGLang 0.5.23 (`configs/model_config.py`, `model_loader/utils.py`, `models/transformers.py`,
`utils/hf_transformers/common.py`, `multimodal/processors/transformers_auto.py`, `parser/jinja_template_utils.py`)
and in vLLM 0.33 (`model_executor/models/transformers`); neither is installed here. SGLang takes a model for text, and
drops its pictures, unless its config has one of text beside itself.
"""

import json

import pytest
import torch
from transformers import AttentionInterface, AutoModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel

from hovle import HoVLEConfig, HoVLEForConditionalGeneration, HoVLEModel, HoVLEProcessor

PLACES_OF_TEXT = ("thinker_config", "llm_config", "language_config", "text_config")
"""Where SGLang looks for the config of a language model; the first that is there counts."""


def attend(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention as an engine has it: causal over its own cache, whatever masks say."""
    heads = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(heads, dim=1) for states in (key, value))
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return found.transpose(1, 2).contiguous(), None


@pytest.fixture(params=["vllm", "vllm_mla", "sglang"])
def engine(request):
    """Name of an engine's attention, registered as the engine does it."""
    AttentionInterface.register(request.param, attend)
    yield request.param
    AttentionInterface._global_mapping.pop(request.param)


def config_for(folder, engine: str) -> HoVLEConfig:
    config = HoVLEConfig.from_pretrained(folder)
    config.text_config._attn_implementation = engine
    return config


def test_an_engine_that_sets_its_attention_gives_the_models_own_hidden_states(engine, model_folder, pictures):
    processor = HoVLEProcessor.from_pretrained(model_folder)
    inputs = processor(pictures[0], f"<img>{processor.image_token}</img> What is it?", return_tensors="pt")
    own = HoVLEModel.from_pretrained(model_folder).eval()
    model = AutoModel.from_config(config_for(model_folder, engine)).eval()
    model.load_state_dict(own.state_dict())
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        is_image = inputs["input_ids"] == processor.image_token_id
        embeds[is_image] = model.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)
        positions = torch.arange(embeds.shape[1])[None]
        found = model(inputs_embeds=embeds, position_ids=positions, use_cache=False)[0]
        expected = own(**inputs, use_cache=False)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


REFUSED = {
    "HoVLE-HD": {"pixel_shuffle_loc": "post"},
    "image_attention is 'bidirectional'": {"image_attention": "bidirectional"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_an_engine_that_would_misread_a_model_is_refused_with_the_reason(reason, engine, tmp_path, save_model):
    save_model(tmp_path, with_processor=False, **REFUSED[reason])
    with pytest.raises(ValueError, match=rf"(vLLM|SGLang) cannot run this model: .*{reason}.*hovle serve"):
        AutoModel.from_config(config_for(tmp_path, engine))


def test_sglang_finds_the_config_of_the_text_beside_the_models_own(model_folder):
    config = HoVLEConfig.from_pretrained(model_folder)
    (place,) = [name for name in PLACES_OF_TEXT if hasattr(config, name)]
    assert getattr(config, place) is not config
    assert not config.architectures[0].startswith(("Llava", "Transformers"))  # which it treats otherwise
    assert not hasattr(config, "language_model_only")


def test_a_picture_that_an_engines_prompt_does_not_mark_is_refused_instead_of_dropped(model_folder, pictures):
    # SGLang leaves the marking of pictures to the chat template, and a stock one of a language model marks none.
    processor = HoVLEProcessor.from_pretrained(model_folder)
    with pytest.raises(ValueError, match=r"mark 0 pictures .* but 1 are given"):
        processor(text="What is it?", images=[pictures[0]], return_tensors="pt")


def test_sglang_takes_the_model_for_one_that_reads_pictures(model_folder):
    config = HoVLEConfig.from_pretrained(model_folder)
    assert config.text_config is not config
    assert config.text_config.num_attention_heads
    assert config.image_token_id
    assert "AutoModel" in json.loads((model_folder / "config.json").read_text())["auto_map"]
    assert HoVLEModel.is_backend_compatible()


def test_vllm_finds_one_attention_for_each_layer_and_a_stock_decoder_to_compile(model_folder):
    model = HoVLEForConditionalGeneration.from_pretrained(model_folder)
    attentions = [module for module in model.modules() if isinstance(module, LlamaAttention)]
    assert [attention.layer_idx for attention in attentions] == list(range(model.config.text_config.num_hidden_layers))
    assert type(model.model.get_decoder()) is LlamaModel


def test_vllm_counts_the_tokens_of_pictures_from_their_sizes(model_folder):
    processor = HoVLEProcessor.from_pretrained(model_folder)
    counts = processor._get_num_multimodal_tokens(image_sizes=[(60, 150), (20, 20)])
    assert counts["num_image_patches"] == [4, 1]
    assert counts["num_image_tokens"] == [2 + 4 * 4, 2 + 4]
    assert processor.image_token == "<IMG_CONTEXT>"
    assert set(processor.model_input_names) >= {"input_ids", "attention_mask", "pixel_values"}
