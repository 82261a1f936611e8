"""Language models of many families as the backbone of HoVLE: what works as they do, and what is refused by name."""

import logging

import pytest
import tiny_models
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_models import IMAGE, shake
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cohere2Config,
    Exaone4Config,
    Gemma3Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    PhiConfig,
    SiglipVisionConfig,
    StableLmConfig,
    Starcoder2Config,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hovle import HoVLEConfig, HoVLEForConditionalGeneration
from hovle.model.language_model import config_around, load_language_config

STEM = {"image_size": 56, "image_token_id": IMAGE}  # a tile of 56 px is 4 tokens

TEXT = {**tiny_models.TEXT, "num_hidden_layers": 4}


def bare_language_model(config_class: type[PreTrainedConfig] = LlamaConfig, **fields) -> PreTrainedModel:
    torch.manual_seed(0)
    return shake(AutoModelForCausalLM.from_config(config_class(**{**TEXT, **fields}))).eval()


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


def test_a_model_is_built_where_gradients_are_off():
    with torch.no_grad():
        model = build(bare_language_model())
    assert model.config.num_embedding_layers == 2


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
    bare = shake(AutoModelForImageTextToText.from_config(config)).eval()
    bare.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "hovle.model.language_model"):
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


MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}


def assert_order_matters(model: HoVLEForConditionalGeneration) -> None:
    """The last token must notice swapped words and swapped tiles of one picture."""
    words, picture, tiles = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[*[IMAGE] * 8, 6]]), torch.randn(2, 3, 56, 56)
    embed = model.get_holistic_embeddings
    with torch.no_grad():
        spoken = [embed(ids).last_hidden_state[0, -1] for ids in (words, words[:, [2, 0, 1, 3]])]
        seen = [embed(picture, pixels).last_hidden_state[0, -1] for pixels in (tiles, tiles.flip(0))]
    # Without positions: 6e-7.
    assert (spoken[0] - spoken[1]).abs().max() > 1e-2
    assert (seen[0] - seen[1]).abs().max() > 1e-2


@pytest.mark.parametrize("config_class", [Cohere2Config, Exaone4Config])
def test_holistic_layers_know_positions_where_only_sliding_layers_do(config_class, caplog):
    bare = bare_language_model(config_class, num_hidden_layers=6, **MIXED)
    with caplog.at_level(logging.WARNING, "hovle.model.language_model"):
        model = build(bare, 1).eval()
    assert f"see 8 tokens back, pictures included: in {bare.config.model_type} only" in caplog.text
    assert_same_text(model, bare)
    assert_order_matters(shake(model).eval())
    own_rope = shake(build(bare, 1, embedding_rope_parameters={"rope_theta": 7.0})).eval()
    with torch.no_grad():
        found, other = (part.get_holistic_embeddings(torch.arange(3, 9)[None]) for part in (model, own_rope))
    assert (found.last_hidden_state - other.last_hidden_state).abs().max() > 1e-2


def test_exaone_4_without_a_window_keeps_full_attention():
    bare = bare_language_model(Exaone4Config, sliding_window=None, layer_types=["full_attention"] * 4)
    model = build(bare)
    assert model.config.text_config.layer_types == ["full_attention"] * 6
    assert_order_matters(shake(model).eval())


def test_separate_rope_of_layers_without_positions_is_refused():
    text_config = Cohere2Config(
        **TEXT, sliding_window=8, layer_types=["full_attention"] * 2 + ["sliding_attention"] * 2
    )
    fields = {"num_embedding_layers": 2, "embedding_rope_parameters": {"rope_theta": 7.0}, **STEM}
    with pytest.raises(
        StrictDataclassError,
        match="no effect: the first 2 layers of this cohere2 use no rotary positions",
    ):
        HoVLEConfig(text_config=text_config, **fields)
    assert HoVLEConfig(text_config=text_config, **{**fields, "num_embedding_layers": 3}).num_embedding_layers == 3


def test_a_backbone_without_any_positions_is_refused_by_name():
    bare = bare_language_model(Cohere2Config, sliding_window=None, layer_types=["full_attention"] * 4)
    with pytest.raises(ValueError, match=r"Cohere2Model cannot be the backbone of HoVLE: .* use no rotary positions"):
        build(bare)


def test_arguments_without_use_beside_a_loaded_language_model_are_refused():
    bare = bare_language_model()
    with pytest.raises(
        ValueError, match="image_sise, dtype: no field of HoVLEConfig, and options of loading have no use"
    ):
        build(bare, image_sise=56, dtype=torch.bfloat16)


@pytest.mark.parametrize("field", ["text_config", "tie_word_embeddings", "language_head_bias"])
def test_fields_that_the_language_model_decides_are_refused(field, tmp_path):
    bare = bare_language_model()
    bare.save_pretrained(tmp_path)
    for given in (bare, str(tmp_path)):
        with pytest.raises(ValueError, match=f"{field}: the language model decides.* untie_text_embeddings=True"):
            build(given, **{field: True})


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
ROUTED = {**EXPERTS, "n_routed_experts": 4}
BACKBONES = {
    # The lowest layers are dense: first a number of them, then an index, then a step, then one entry per layer.
    "deepseek_v3": {**ROUTED, **LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 2},
    "glm4_moe": {**ROUTED, "head_dim": 8, "first_k_dense_replace": 1},
    "afmoe": {**EXPERTS, "num_experts": 4, "num_dense_layers": 1, "head_dim": 8, "sliding_window": 4},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "head_dim": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "glm4_moe_lite": {**ROUTED, **LATENT, "num_key_value_heads": 4},
    "exaone_moe": {**EXPERTS, "num_experts": 4, "head_dim": 8, "sliding_window": 4},
    "hy_v3": {**EXPERTS, "num_experts": 4, "head_dim": 8},
    "mellum": {**EXPERTS, "num_experts": 4, "head_dim": 8, "sliding_window": 4},
    "laguna": {**EXPERTS, "num_experts": 4, "head_dim": 8, "num_attention_heads_per_layer": [4, 4, 4, 4]},
}


@pytest.mark.parametrize("name", [name for name in BACKBONES if name in CONFIG_MAPPING])
@pytest.mark.parametrize("num_embedding_layers", [1, 2])
def test_layers_that_differ_by_index_keep_what_they_are(name, num_embedding_layers, tmp_path):
    bare = bare_language_model(CONFIG_MAPPING[name], **BACKBONES[name])
    model = build(bare, num_embedding_layers).eval()
    assert_same_text(model, bare)
    for found, expected in zip(model.model.language_layers, bare.model.layers, strict=True):
        assert type(found.mlp) is type(expected.mlp)
    assert all(type(layer.mlp) is type(bare.model.layers[0].mlp) for layer in model.model.embedding_layers)
    model.save_pretrained(tmp_path)
    assert_same_text(HoVLEForConditionalGeneration.from_pretrained(tmp_path), bare)


REFUSED = {
    "modernbert-decoder": ({"local_attention": 8}, "ModernBertDecoderForCausalLM", "no decoder built like Llama's"),
    "granitemoehybrid": (
        {
            "position_embedding_type": "nope",
            "layer_types": ["attention"] * 4,
            "num_local_experts": 2,
            "shared_intermediate_size": 48,
            "mamba_n_heads": 2,
        },
        "GraniteMoeHybridModel",
        "lacks rotary positions",
    ),
    "jetmoe": (
        {"kv_channels": 8, "num_local_experts": 2, "num_experts_per_tok": 2, "num_attention_heads": None},
        "JetMoeForCausalLM",
        "AttributeError: 'JetMoeDecoderLayer' object has no attribute 'self_attn'",
    ),
    "gemma3n_text": (
        {
            "head_dim": 8,
            "laurel_rank": 4,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": None,
            "intermediate_size": [48] * 4,
        },
        "gemma3n_text",
        "intermediate size for every layer",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_the_reason(name):
    """JetMoe works but as HoVLE-HD, which reorders the cache slots of attention modules it must find."""
    fields, who, reason = REFUSED[name]
    bare = bare_language_model(CONFIG_MAPPING[name], **fields)
    with pytest.raises(ValueError, match=f"^{who}.* cannot be the backbone of HoVLE: .*{reason}"):
        build(bare, pixel_shuffle_loc="post")


def test_a_language_model_without_its_head_is_refused():
    with pytest.raises(ValueError, match=r"LlamaModel cannot be .* lacks the head .* AutoModelForCausalLM"):
        build(LlamaModel(LlamaConfig(**TEXT)))


@pytest.mark.parametrize("training", [True, False])
def test_the_new_model_is_in_the_mode_of_the_language_model(training, tmp_path):
    bare = bare_language_model().train(training)
    assert all(module.training == training for module in build(bare).modules())
    bare.save_pretrained(tmp_path)
    assert not any(module.training for module in build(str(tmp_path)).modules())


def test_tokens_that_the_language_model_never_writes_stay_suppressed():
    bare = bare_language_model()
    bare.generation_config.suppress_tokens = [7, 8]
    assert build(bare).generation_config.suppress_tokens == [7, 8, IMAGE]
    assert bare.generation_config.suppress_tokens == [7, 8]


def test_a_placeholder_outside_the_vocabulary_is_refused():
    with pytest.raises(StrictDataclassError, match=r"image_token_id \(-1\) must be the id of a token"):
        build(bare_language_model(), image_token_id=-1)
    config = HoVLEConfig(text_config=LlamaConfig(**TEXT), num_embedding_layers=1, **{**STEM, "image_token_id": 64})
    with pytest.raises(
        ValueError, match=r"image_token_id \(64\) must lie below .*vocab_size \(64\).* vocab_size to 65"
    ):
        config.check_image_token_id()
    with pytest.raises(ValueError, match=r"image_token_id \(64\) must lie below"):
        config_around(LlamaConfig(**TEXT), 1, image_token_id=64, vocab_size=64)


@pytest.mark.parametrize(
    ("config_class", "field"), [(PhiConfig, "embd_pdrop"), (Starcoder2Config, "embedding_dropout")]
)
def test_dropout_after_the_embedding_works_in_training_only(config_class, field):
    bare = bare_language_model(config_class, **{field: 0.5})
    model = build(bare, num_embedding_layers=1)
    assert_same_text(model, bare)
    ids = torch.arange(5, 15)[None]
    for decoder in (model.model, bare.get_decoder()):
        decoder.train()
        torch.manual_seed(0)
        found = decoder(ids).last_hidden_state
        torch.manual_seed(0)
        dropped = torch.nn.functional.dropout(bare.get_input_embeddings()(ids), 0.5)
        expected = bare.eval().get_decoder()(inputs_embeds=dropped).last_hidden_state
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("config_class", [LlamaConfig, StableLmConfig, GraniteConfig])
def test_a_window_that_the_family_ignores_is_refused(config_class):
    """Far longer than the text that is compared: such windows used to show only in prompts beyond them."""
    bare = bare_language_model(config_class, sliding_window=200)
    with pytest.raises(ValueError, match=r"ForCausalLM cannot be .* does not use sliding_window=200 of its config"):
        build(bare)
    assert bare.config.sliding_window == 200


def test_a_window_that_the_family_uses_is_kept():
    bare = bare_language_model(MistralConfig, sliding_window=200)
    model = build(bare).eval()
    assert model.config.text_config.sliding_window == bare.config.sliding_window == 200
    assert model.model.language_model.config.sliding_window == 200
    input_ids = torch.randint(3, 59, (1, 240), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found, expected = model(input_ids).logits[..., :64], bare(input_ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0.0)
