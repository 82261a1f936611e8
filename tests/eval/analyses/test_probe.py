"""Attention reduced block by block, against whole matrices."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch
from places import ROOT

import hovle.eval.analyses.probe as probe_module
from hovle.eval.analyses.attention_reading import read_attention
from hovle.eval.analyses.model_under_test import HOLISTIC, LANGUAGE, ModelUnderTest
from hovle.eval.analyses.probe import EVEN_SHARE_FRACTION, LayerReading, Section, probing

KINDS = {
    "hovle": {},
    "bidirectional": {"image_attention": "bidirectional"},
    "hd": {"pixel_shuffle_loc": "post"},
    "no holistic layers": {"num_embedding_layers": 0},
}


@pytest.fixture(params=[*KINDS, "internvl"])
def under_test(request, save_hovle, save_internvl) -> ModelUnderTest:
    return ModelUnderTest(save_internvl() if request.param == "internvl" else save_hovle(**KINDS[request.param]))


def whole_matrices(under_test: ModelUnderTest, input_ids, pixel_values) -> list[torch.Tensor]:
    """Attention of every layer, `(H, T, T)`, as transformers' eager attention gives it."""
    under_test.model.set_attn_implementation("eager")
    with torch.inference_mode():
        outputs = under_test.model(
            input_ids=input_ids[None], pixel_values=pixel_values, output_attentions=True, use_cache=False
        )
    return [layer[0].double() for layer in outputs.attentions]


def check(reading: LayerReading, weights: torch.Tensor, section: Section) -> None:
    """Compare a reading with sums over the whole matrix, row by row."""
    image = section.image_mask.tolist()
    places = [place for place, is_image in enumerate(image) if is_image]
    rows: dict[bool, list] = {False: [], True: []}
    for head in weights:
        for query, row in enumerate(head.tolist()):
            seen = [row[key] for key in places if row[key] > 0]  # float32: unseen is exactly 0
            if not seen:
                continue
            shares = [weight / sum(seen) for weight in seen]
            entropy = -sum(share * math.log(share) for share in shares) / math.log(len(seen)) if seen[1:] else None
            sparsity = sum(share < EVEN_SHARE_FRACTION / len(seen) for share in shares) / len(seen)
            rows[image[query]].append((sum(seen), row[0], entropy, sparsity if seen[1:] else None))
    for statistics, found in ((reading.text, rows[False]), (reading.image, rows[True])):
        mass, first, entropy, sparsity = (
            torch.tensor([values[part] for values in found if values[part] is not None]).mean() for part in range(4)
        )
        assert statistics.num_queries * len(weights) == len(found)
        means = statistics.means()
        assert means["image"] == pytest.approx(float(mass), abs=1e-5)
        assert means["first_token"] == pytest.approx(float(first), abs=1e-5)
        assert means["entropy"] == pytest.approx(float(entropy), abs=1e-5)
        assert means["sparsity"] == pytest.approx(float(sparsity), abs=1e-5)
        assert means["sparsity"] > 0.01  # attention is uneven enough to tell
    expected = weights[:, section.answer_queries][..., places].mean(dim=0)
    torch.testing.assert_close(reading.answer_maps.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("block_elements", [1000, 2**21], ids=["in blocks", "in one block"])
def test_readings_equal_sums_over_eager_attention(under_test, picture, monkeypatch, block_elements):
    monkeypatch.setitem(probe_module.BLOCK_ELEMENTS, "cpu", block_elements)
    prompt = under_test.prepare(picture, "what is it?")
    answer = under_test.encode("a bus and a tree")
    found = read_attention(under_test, prompt, answer)
    names = [section.name for section, _ in found.layers]
    assert names == ([HOLISTIC, LANGUAGE] if under_test.holistic_layers else [LANGUAGE])
    input_ids = torch.cat([prompt.inputs["input_ids"][0], answer[:-1]])
    matrices = whole_matrices(under_test, input_ids, prompt.inputs["pixel_values"])
    for section, layers in found.layers:
        for layer in layers:
            check(layer, matrices.pop(0), section)
    assert not matrices


def test_rows_sum_to_one(under_test, picture):
    found = read_attention(under_test, under_test.prepare(picture, "what is it?"), under_test.encode("red"))
    for _, layers in found.layers:
        for layer in layers:
            for rows in (layer.text, layer.image):
                torch.testing.assert_close(rows.mass.sum(dim=1), torch.ones(4).double(), atol=1e-5, rtol=0)


def test_logits_and_settings_stay_what_they_are(under_test, picture):
    prompt = under_test.prepare(picture, "what is it?")
    inputs = {"input_ids": prompt.inputs["input_ids"], "pixel_values": prompt.inputs["pixel_values"]}
    with torch.inference_mode():
        expected = under_test.model(**inputs, use_cache=False).logits
        before = under_test.language_layers[0].self_attn.config._attn_implementation
        with probing(under_test.sections(inputs["input_ids"][0], 1)):
            found = under_test.model(**inputs, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)
    assert under_test.language_layers[0].self_attn.config._attn_implementation == before != probe_module.NAME


def test_the_holistic_layers_of_hd_have_a_map_of_patches(save_hovle, picture):
    under_test = ModelUnderTest(save_hovle(pixel_shuffle_loc="post"))
    found = read_attention(under_test, under_test.prepare(picture, "what is it?"), under_test.encode("red"))
    (holistic, language) = (found.mean_map(*entry)[0] for entry in found.layers)
    assert [tuple(part.shape) for part in holistic] == [(4, 12), (4, 4)]
    assert [tuple(part.shape) for part in language] == [(2, 6), (2, 2)]


def test_what_cannot_be_read_is_refused(save_hovle, picture):
    under_test = ModelUnderTest(save_hovle())
    ids = under_test.prepare(picture, "what is it?").inputs["input_ids"]
    with probing(under_test.sections(ids[0], 1)) as probe, torch.inference_mode():
        with pytest.raises(ValueError, match=r"Layers \[0, 1\] of the holistic layers did not go through"):
            probe.readings(probe.sections[0])
        with pytest.raises(ValueError, match=rf"read for one prompt of {ids.shape[1]} tokens without a cache, got 2"):
            under_test.model(input_ids=torch.full((2, 5), 7), use_cache=False)
        attention = under_test.language_layers[0].self_attn
        states = torch.zeros(1, 4, ids.shape[1], 16)
        with pytest.raises(ValueError, match="LlamaAttention has attention sinks"):
            probe_module.probed_attention(attention, states, states[:, :2], states[:, :2], None, s_aux=torch.zeros(4))


def test_softcapped_scores_are_capped_in_the_reading_too(save_hovle, picture):
    under_test = ModelUnderTest(save_hovle())
    ids = under_test.prepare(picture, "what is it?").inputs["input_ids"][0]
    states = 5 * torch.randn(1, 4, len(ids), 16, generator=torch.Generator().manual_seed(0))
    attention = under_test.language_layers[0].self_attn
    with probing(under_test.sections(ids, 1)):
        found, _ = probe_module.probed_attention(
            attention, states, states[:, :2], states[:, :2], None, scaling=1.0, softcap=3.0
        )
    keys = states[:, :2].repeat_interleave(2, dim=1)
    scores = 3 * torch.tanh(states @ keys.transpose(2, 3) / 3)
    scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(found.transpose(1, 2), scores.softmax(dim=-1) @ keys, atol=1e-5, rtol=0)


def test_memory_stays_bounded_at_4000_tokens():
    """One layer's matrix, 4 heads of 4,000 x 4,000 in float32, is 256 MB; the run may take half of it."""
    script = """
        import torch
        from transformers import LlamaConfig
        from hovle import HoVLEConfig, HoVLEForConditionalGeneration
        from hovle.eval.analyses.probe import Section, probing
        from hovle.machine.memory import peak_resident_bytes

        text = LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                           num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096)
        config = HoVLEConfig(text_config=text.to_dict(), num_embedding_layers=0, image_size=448, patch_size=14,
                             image_token_id=31)
        model = HoVLEForConditionalGeneration(config).eval()
        ids = torch.tensor([[1] * 80 + [31] * 3840 + [2] * 80])
        pixels = torch.zeros(15, 3, 448, 448)
        layers = model.model.language_model.layers
        section = Section("all", list(layers), ids[0] == 31, torch.tensor([3998, 3999]))
        with torch.inference_mode():
            model(ids[:, :300].clamp(max=2), use_cache=False)
            before = peak_resident_bytes()
            with probing([section]) as probe:
                model(input_ids=ids, pixel_values=pixels, use_cache=False, logits_to_keep=1)
        assert len(probe.readings(section)) == 1
        print(peak_resident_bytes() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 128 * 2**20, done.stdout
