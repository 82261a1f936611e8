"""LoRA on the language model's layers: where it goes, that it loads with peft, that it merges."""

import pytest
import torch

from hovle import HoVLEForConditionalGeneration
from hovle.train.config import LoraConfig
from hovle.train.data.tiles import PixelNormalization
from hovle.train.model.adapters import add_lora, merged_state_dict
from hovle.train.model.parameters import select_trainable, store_parameters
from hovle.train.objectives.next_token import NextTokenObjective
from hovle.train.run.checkpoint import trainable_state
from hovle.train.run.run_folder import write_adapter, write_model
from hovle.train.run.stage import run_stage

# peft 0.21.2 asks for `is_gradient_checkpointing`, which transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def adapted(parts, next_token_config):
    """The tiny HoVLE with random adapters: `(model, PeftModel)`."""
    model, _ = parts
    select_trainable(model, next_token_config("trainable=[]", "lora.rank=4"))
    peft_model = add_lora(model, LoraConfig(rank=4, alpha=6.5))
    randomise(model)
    return model, peft_model


@torch.no_grad()
def randomise(model) -> None:
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.normal_(std=0.1)


def logits_of(model, batch) -> torch.Tensor:
    with torch.no_grad():
        model.eval()
        return model(
            input_ids=batch.input_ids,
            pixel_values=PixelNormalization()(batch.pixel_values),
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits


def test_adapters_sit_on_every_projection_of_the_language_model_and_nowhere_else(adapted):
    model, _ = adapted
    names = {name.split(".lora_")[0] for name, item in model.named_parameters() if item.requires_grad}
    projections = [f"self_attn.{letter}_proj" for letter in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert names == {f"model.language_model.layers.{layer}.{name}" for layer in (2, 3) for name in projections}


def test_adapters_go_where_the_recipe_says(parts):
    model, _ = parts
    add_lora(model, LoraConfig(rank=4, target_modules=("q_proj", "down_proj")))
    names = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    targets = ("self_attn.q_proj", "mlp.down_proj")
    assert names == {f"model.language_model.layers.{layer}.{name}" for layer in (2, 3) for name in targets}


def test_a_misspelt_target_is_refused_with_what_there_is(parts):
    with pytest.raises(ValueError, match=r"no linear map q_prj, W; they have down_proj, gate_proj, .*, v_proj\."):
        add_lora(parts[0], LoraConfig(target_modules=("q_prj", "W", "v_proj")))


def test_what_else_is_trainable_stays_so(parts, next_token_config):
    model, _ = parts
    select_trainable(model, next_token_config("trainable=[stem]", "lora.rank=4"))
    add_lora(model, LoraConfig(rank=4))
    assert all(parameter.requires_grad for parameter in model.model.patch_embedding.parameters())
    assert not any(
        item.requires_grad for name, item in model.model.embedding_layers.named_parameters() if ".lora_" not in name
    )


def test_new_adapters_change_nothing(parts, batches):
    model, _ = parts
    [batch] = batches("chat")
    before = logits_of(model, batch)
    add_lora(model, LoraConfig(rank=4))
    torch.testing.assert_close(logits_of(model, batch), before, atol=1e-6, rtol=0)


def test_merging_gives_a_plain_state_dict_and_leaves_the_model_alone(adapted, batches, checkpoints):
    model, _ = adapted
    [batch] = batches("chat")
    expected = logits_of(model, batch)
    plain = HoVLEForConditionalGeneration.from_pretrained(checkpoints["tied"], dtype=torch.float32)
    assert (logits_of(plain, batch) - expected).abs().max() > 0.1
    plain.load_state_dict(merged_state_dict(model))  # strict
    torch.testing.assert_close(logits_of(plain, batch), expected, atol=1e-4, rtol=0)  # worst 5e-6
    assert torch.equal(logits_of(model, batch), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_saved_adapter_loads_with_peft_and_equals_the_merged_model(
    adapted, parts, batches, checkpoints, tmp_path, dtype
):
    from peft import PeftModel

    model, peft_model = adapted
    store_parameters(model, dtype)  # frozen weights may be stored in bfloat16; merging must not round to it
    [batch] = batches("chat")
    trained = trainable_state(NextTokenObjective(model))
    write_adapter(tmp_path / "run" / "adapter", peft_model, trained)
    write_model(tmp_path / "run" / "model", model.config, parts[1], merged_state_dict(model), batch, None)
    start = HoVLEForConditionalGeneration.from_pretrained(checkpoints["tied"], dtype=torch.float32)
    loaded = PeftModel.from_pretrained(start, tmp_path / "run" / "adapter")
    merged = HoVLEForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits_of(merged, batch), logits_of(loaded, batch), atol=1e-4, rtol=0)
    plain = HoVLEForConditionalGeneration.from_pretrained(checkpoints["tied"], dtype=torch.float32)
    assert (logits_of(plain, batch) - logits_of(merged, batch)).abs().max() > 0.1
    folded = loaded.merge_and_unload()
    torch.testing.assert_close(logits_of(folded, batch), logits_of(merged, batch), atol=1e-4, rtol=0)


def test_no_adapter_folder_where_more_than_adapters_learned(next_token_config):
    folder = run_stage(next_token_config("trainable=[stem]", "lora.rank=4", "num_steps=1"))
    assert not (folder.parent / "adapter").exists()  # an adapter alone would not be the model
