"""The first filters of a new stem: what they see of which pixels, and how strongly."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hovle import HoVLEForConditionalGeneration
from hovle.model.first_filters import patch_waves, token_filters


def new_model(**fields) -> HoVLEForConditionalGeneration:
    """Around a tiny language model; a patch of 4 x 4 pixels has fewer waves than the width of 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=300
    )
    settings = {"image_size": 32, "patch_size": 4, **fields}
    return HoVLEForConditionalGeneration.from_language_model(LlamaForCausalLM(config), 1, **settings)


def before_activation(model: HoVLEForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """What enters the stem's nonlinearity, without the places of patches; shape `(N, S, D)`."""
    found = []
    hook = model.model.projector.act.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        model.model.patch_embedding.position_embedding.zero_()
        model.get_image_features(pixel_values)
    hook.remove()
    return found[0]


def test_waves_of_a_patch_are_orthonormal_and_all_there_are():
    waves = patch_waves(4, 64).flatten(1)
    assert waves.shape == (48, 48)
    torch.testing.assert_close(waves @ waves.T, torch.eye(48), atol=1e-5, rtol=0)
    assert torch.equal(patch_waves(14, 576)[:20], patch_waves(14, 20))
    assert (patch_waves(14, 576).abs().amin(dim=(1, 2, 3)) < 1).all()


def test_the_stem_answers_as_its_filters_do():
    model = new_model()
    pixels = torch.randn(2, 3, 32, 32)
    expected = nn.functional.conv2d(pixels, token_filters(8, 64), stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(before_activation(model, pixels), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("side", "count"), [(8, 64), (28, 576), (28, 2048), (32, 100), (4, 3), (28, 7000)])
def test_filters_differ_and_see_one_place_each(side, count):
    filters = token_filters(side, count)
    assert filters.shape == (count, 3, side, side)
    used = filters.flatten(1).any(dim=1)
    assert used.sum() > 0.75 * count
    unit = nn.functional.normalize(filters[used].flatten(1), dim=1)
    likeness = (unit[:600] @ unit[:600].T).fill_diagonal_(0).abs()
    assert likeness.max() < 0.999
    seen = filters[used].abs().amax(dim=1) > 0
    window = max(8, -(-side // 3))  # three places a side is what a width of 100 has room for
    assert seen.any(dim=1).sum(dim=1).max() <= (window if count == 100 else 8)
    assert seen.any(dim=0).all()  # no pixel is left out


def test_flat_pictures_move_only_what_tells_brightness_and_color():
    responses = nn.functional.conv2d(torch.ones(1, 3, 28, 28), token_filters(28, 576)).flatten()
    assert (responses.abs() > 1e-4).sum() == 36  # of each place the one for brightness
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 28, 28)
    assert (nn.functional.conv2d(red, token_filters(28, 576)).abs() > 1e-4).sum() == 3 * 36


def test_pictures_enter_as_large_as_words_and_around_zero():
    model = new_model()
    noise = nn.functional.interpolate(torch.randn(64, 3, 8, 8), 32, mode="bicubic")
    model.get_input_embeddings().weight.data.normal_(0, 0.13)
    model = HoVLEForConditionalGeneration.from_language_model(
        _language_model_of(model), 1, image_size=32, patch_size=4
    )
    with torch.no_grad():
        tokens = model.get_image_features(noise).pooler_output
    assert 0.5 < float(tokens.std()) / 0.13 < 2
    assert abs(float(tokens.mean())) < 0.03


def _language_model_of(model: HoVLEForConditionalGeneration) -> LlamaForCausalLM:
    language_model = LlamaForCausalLM(LlamaConfig(**{**model.config.text_config.to_dict(), "num_hidden_layers": 2}))
    language_model.get_input_embeddings().weight.data.copy_(model.get_input_embeddings().weight)
    return language_model


@pytest.mark.parametrize("location", ["post", "none"])
def test_a_stem_without_a_nonlinearity_before_the_layers_keeps_its_own(location):
    model = new_model(pixel_shuffle_loc=location)
    weight = model.model.patch_embedding.projection.weight
    assert float(weight.detach().std()) == pytest.approx(model.config.initializer_range, rel=0.1)
