"""What vLLM's and SGLang's backends for models of transformers look at before they load one.

Read in SGLang 0.5.23 (`configs/model_config.py`, `model_loader/utils.py`) and vLLM's transformers backend; neither is
installed here. SGLang takes a model for text, and drops its pictures, unless its config has one of text beside itself.
"""

import json

from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel

from hovle import HoVLEConfig, HoVLEForConditionalGeneration, HoVLEModel, HoVLEProcessor


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
