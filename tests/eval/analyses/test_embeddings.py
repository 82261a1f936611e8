"""`hovle eval embeddings`: image and text embeddings beside the language model's words."""

import json

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.cli import main
from hovle.eval.analyses.embedding_reading import following, read_embeddings
from hovle.eval.analyses.embeddings import word_table
from hovle.eval.analyses.model_under_test import ModelUnderTest


@pytest.fixture
def around_llama(tmp_path, make_tokenizer):
    """`around_llama(**fields)`: a fresh HoVLE around a random Llama; gives the folders of both."""

    def build(**fields) -> tuple[str, str]:
        torch.manual_seed(0)
        text = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
        language_model = LlamaForCausalLM(LlamaConfig(**text, num_hidden_layers=2, num_key_value_heads=2))
        language_model.save_pretrained(tmp_path / "llama")
        make_tokenizer().save_pretrained(tmp_path / "llama")
        model = HoVLEForConditionalGeneration.from_language_model(tmp_path / "llama", 2, image_size=56, **fields)
        model.save_pretrained(tmp_path / "model")
        processor = HoVLEProcessor.from_language_model(tmp_path / "llama", model.config, max_tiles=6)
        processor.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model"), str(tmp_path / "llama")

    return build


def test_a_fresh_models_text_is_the_tables(around_llama, picture):
    model, language_model = around_llama()
    tested = ModelUnderTest(model)
    for table in (word_table(tested, None), word_table(tested, language_model)):
        found = read_embeddings(tested, tested.prepare(picture, "what is it?"), table)
        known = ~found.text_cosine.isnan()
        assert known.sum() > 10
        torch.testing.assert_close(found.text_cosine[known], torch.ones(int(known.sum())))
        torch.testing.assert_close(found.text_norm[known], found.table_norm[found.token_ids[known]])
        assert found.image_cosine.max() < 0.9
        for drift in found.drifts[:1]:  # the holistic layers change nothing yet
            assert drift.to_input["text"] == pytest.approx([1.0, 1.0])
            assert drift.to_first["image"] == pytest.approx([1.0, 1.0])


def test_nearest_words_are_those_of_a_direct_search(save_hovle, picture):
    tested = ModelUnderTest(save_hovle())
    prompt = tested.prepare(picture, "what is it?")
    table = word_table(tested, None)
    found = read_embeddings(tested, prompt, table)
    inputs = {name: prompt.inputs[name] for name in ("input_ids", "pixel_values")}
    with torch.no_grad():
        embeds = tested.model.get_holistic_embeddings(**inputs).language_inputs_embeds[0]
    image = embeds[prompt.inputs["input_ids"][0] == tested.model.config.image_token_id]
    no_words = set(tested.processor.image_token_ids)
    for place, vector in enumerate(image):
        cosines = torch.nn.functional.cosine_similarity(vector[None], table, dim=-1)
        best = max((token for token in range(len(table)) if token not in no_words), key=lambda token: cosines[token])
        assert found.nearest[place] == best
        assert float(found.image_cosine[place]) == pytest.approx(float(cosines[best]), abs=1e-5)
        expected = float(vector.norm() / table.norm(dim=-1).mean())
        assert float(found.image_norm[place]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fields", [{}, {"pixel_shuffle_loc": "post"}])
def test_drift_is_that_of_the_hidden_states(save_hovle, picture, fields):
    tested = ModelUnderTest(save_hovle(**fields))
    inputs = tested.prepare(picture, "what is it?").inputs
    inputs = {name: inputs[name] for name in ("input_ids", "pixel_values")}
    sections = tested.sections(inputs["input_ids"][0], 1)
    with torch.no_grad():
        with following(sections) as drifts:
            tested.model(**inputs, use_cache=False)
        outputs = tested.model.get_holistic_embeddings(**inputs, output_hidden_states=True)
    for before, after, found in zip(
        outputs.hidden_states, outputs.hidden_states[1:], drifts[0].to_input["image"][1:], strict=False
    ):
        cosine = torch.nn.functional.cosine_similarity(before[0], after[0], dim=-1)[sections[0].image_mask]
        assert found == pytest.approx(float(cosine.mean()), abs=1e-5)
    assert [len(drift.to_first["text"]) for drift in drifts] == [2, 2]
    assert min(drifts[1].to_first["text"]) < 0.99
    assert len(sections[0].image_mask) - len(sections[1].image_mask) == (16 * 3 if fields else 0)


def test_the_command_writes_numbers_and_labelled_pictures(around_llama, picture_file, tmp_path, capsys):
    model, language_model = around_llama()
    arguments = ["eval", "embeddings", model, str(picture_file), "--language-model", language_model]
    assert main([*arguments, "--output", str(tmp_path / "o")]) == 0
    result = json.loads((tmp_path / "o" / "embeddings.json").read_text())
    assert [len(row) for row in result["image"]["nearest_words"]] == [6, 6]
    assert [len(row) for row in result["image"]["thumbnail_words"]] == [2, 2]
    assert result["text"]["cosine"]["min"] == pytest.approx(1, abs=1e-5)
    assert [drift["section"] for drift in result["drift"]] == ["holistic layers", "language model"]
    for name in ("words.png", "embeddings.png"):
        with Image.open(tmp_path / "o" / name) as drawing:
            assert len(drawing.convert("L").getcolors()) > 10
    assert "text   cosine 1.000" in capsys.readouterr().out


def test_a_picture_of_too_many_cells_is_shown_by_its_thumbnail(save_hovle, tmp_path):
    Image.effect_noise((900, 100), 90).convert("RGB").save(tmp_path / "wide.png")
    model = save_hovle(max_tiles=12, image_size=112)
    arguments = ["eval", "embeddings", model, str(tmp_path / "wide.png"), "--output", str(tmp_path / "o")]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "o" / "embeddings.json").read_text())
    assert len(result["image"]["nearest_words"][0]) > 24  # all of them
    with Image.open(tmp_path / "o" / "words.png") as drawing:
        assert drawing.width < 2 * drawing.height


def test_wrong_input_is_refused_by_message(save_internvl, save_hovle, picture_file, tmp_path, capsys):
    assert main(["eval", "embeddings", save_internvl(), str(picture_file)]) == 1
    assert "only a HoVLE has a holistic embedding to look at" in capsys.readouterr().err
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**text, num_hidden_layers=1)).save_pretrained(tmp_path / "narrow")
    arguments = ["eval", "embeddings", save_hovle(), str(picture_file), "--language-model", str(tmp_path / "narrow")]
    assert main(arguments) == 1
    assert "has vectors of 32 numbers" in capsys.readouterr().err
