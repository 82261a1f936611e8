"""Language models of many families as the backbone of HoVLE: what works as they do, and what is refused by name."""

import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    SiglipVisionConfig,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from hovle import HoVLEForConditionalGeneration
from hovle.language_model import load_language_config

IMAGE = 60  # placeholder id of the tiny models
STEM = {"image_size": 56, "image_token_id": IMAGE}  # a tile of 56 px is 4 tokens

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def shake(model: PreTrainedModel) -> PreTrainedModel:
    """Move every weight, so that a part which is skipped or swapped shows in the logits."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = 10 if parameter.dim() == 4 else 1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15 / fan_in)
    return model.eval()


def bare_language_model(config_class: type[PreTrainedConfig] = LlamaConfig, **fields) -> PreTrainedModel:
    torch.manual_seed(0)
    return shake(AutoModelForCausalLM.from_config(config_class(**{**TEXT, **fields})))


def assert_same_text(model: HoVLEForConditionalGeneration, bare: PreTrainedModel) -> None:
    """Logits of 24 words in two rows, the second with padding."""
    input_ids = torch.randint(3, 59, (2, 24), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(input_ids)
    mask[1, :5] = 0
    with torch.no_grad():
        found, expected = (part(input_ids, attention_mask=mask).logits[mask.bool()] for part in (model, bare))
    # Measured worst case: 0.0.
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, atol=1e-5, rtol=0.0)


def build(bare: PreTrainedModel | str, num_embedding_layers: int = 2, **fields) -> HoVLEForConditionalGeneration:
    return HoVLEForConditionalGeneration.from_language_model(bare, num_embedding_layers, **{**STEM, **fields})


@pytest.mark.parametrize("tied", [True, False])
def test_the_language_model_of_a_vision_language_model_becomes_the_backbone(tied, tmp_path, caplog):
    """As `AutoModelForCausalLM` gives them for every Gemma 3 above 1B; the inner config always says tied."""
    pattern = ["sliding_attention", "full_attention"] * 2
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=4, layer_types=pattern),
        vision_config=SiglipVisionConfig(**vision, image_size=56, patch_size=14),
        mm_tokens_per_image=4,
        image_token_index=63,
        boi_token_index=62,
        eoi_token_index=61,
        tie_word_embeddings=tied,
    )
    bare = shake(AutoModelForImageTextToText.from_config(config))
    bare.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "hovle.language_model"):
        model = build(str(tmp_path)).eval()
    assert "Of Gemma3ForConditionalGeneration only the language model (gemma3_text)" in caplog.text
    assert model.config.text_config.model_type == load_language_config(tmp_path).model_type == "gemma3_text"
    assert model.config.tie_word_embeddings == load_language_config(tmp_path).tie_word_embeddings == tied
    assert model.config.num_language_layers == 4
    assert_same_text(model, bare)
    with torch.no_grad():
        logits = model(torch.tensor([[5, *[IMAGE] * 4, 6]]), torch.randn(1, 3, 56, 56)).logits
    assert logits.isfinite().all()


def test_a_hovle_is_refused_as_the_backbone_of_another(tmp_path):
    model = build(bare_language_model())
    model.save_pretrained(tmp_path)
    for given in (model, str(tmp_path)):
        with pytest.raises(ValueError, match="is a HoVLE already, which cannot be the backbone of another"):
            build(given)
    with pytest.raises(ValueError, match="is a HoVLE already"):
        load_language_config(tmp_path)
