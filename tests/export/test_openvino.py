"""`hovle export --to openvino`: stock OpenVINO GenAI answers as the model (slow, with hovle[openvino])."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.chat import Conversation
from hovle.export.command import export
from hovle.export.engines import load_exported
from hovle.export.flat import load_flat
from hovle.export.openvino import write


def test_a_format_without_its_packages_says_what_installs_them(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"openvino.*pip install 'hovle\[openvino\]'"):
        export(model_folder, tmp_path / "exported", "openvino")
    assert not (tmp_path / "exported").exists()


def test_a_model_without_a_tokenizer_is_refused(tmp_path, save_model):
    save_model(tmp_path / "model", with_processor=False)
    with pytest.raises(ValueError, match="no tokenizer"):
        write(load_flat(tmp_path / "model"), tmp_path / "exported")


def test_an_engine_without_its_files_says_what_makes_them(model_folder):
    with pytest.raises(ValueError, match=r"hovle export MODEL DST --to openvino|pip install 'hovle\[openvino\]'"):
        Conversation(model_folder, engine="openvino")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model_folder) -> Path:
    folder = tmp_path_factory.mktemp("openvino") / "exported"
    (remark,) = export(model_folder, folder, "openvino")
    assert "1 to 4 tiles" in remark
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["SDPA", "PA"])
def test_genai_answers_as_the_model_where_nothing_is_resized(backend, exported, model_folder, pictures):
    import openvino
    import openvino_genai

    picture = pictures[0].resize((56, 56))
    pipeline = openvino_genai.VLMPipeline(
        str(exported), "CPU", ATTENTION_BACKEND=backend, INFERENCE_PRECISION_HINT="f32"
    )
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.ignore_eos = 8, False, True
    image = openvino.Tensor(np.asarray(picture)[None])
    found = pipeline.generate("What is it?", images=[image], generation_config=config).texts[0]
    processor = HoVLEProcessor.from_pretrained(model_folder)
    model = HoVLEForConditionalGeneration.from_pretrained(model_folder).eval()
    items = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": items}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, min_new_tokens=8, max_new_tokens=8, do_sample=False)
    assert found == processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_a_number_format_that_is_asked_for_is_what_all_graphs_compute_in(exported, model_folder, pictures):
    import openvino

    ours = load_exported(exported, "openvino", dtype="float32")
    graphs = (ours.decoder.words, ours.decoder.layers.get_compiled_model())
    assert {graph.get_property("INFERENCE_PRECISION_HINT") for graph in graphs} == {openvino.Type.f32}
    processor = HoVLEProcessor.from_pretrained(model_folder)
    inputs = processor(text=f"{processor.image_token}What is it?", images=pictures[1], return_tensors="pt")
    theirs = HoVLEForConditionalGeneration.from_pretrained(model_folder).eval()
    expected = theirs(**inputs).logits[0, -1]
    torch.testing.assert_close(ours(**inputs).logits[0, -1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_conversation_in_openvino_says_what_one_in_torch_says(exported, model_folder, pictures):
    talks = [Conversation(model_folder, 6), Conversation(exported, 6, engine="openvino")]
    for talk in talks:
        talk.add_images([pictures[1]])
    for question in ("What is it?", "And now?"):
        first, second = (talk.answer(question) for talk in talks)
        assert first == second
    for talk in talks:
        talk.restart()
        talk.add_images([pictures[2], pictures[3]])
    first, second = (talk.answer("What differs?") for talk in talks)
    assert first == second


@pytest.mark.slow
def test_a_model_of_one_tile_sees_the_whole_picture_however_genai_cuts_it(tmp_path, save_model):
    import openvino

    model = save_model(tmp_path / "model")
    HoVLEProcessor.from_pretrained(tmp_path / "model", max_tiles=1).save_pretrained(tmp_path / "model")
    assert export(tmp_path / "model", tmp_path / "exported", "openvino") == []
    graph = openvino.Core().compile_model(tmp_path / "exported" / "openvino_vision_embeddings_model.xml", "CPU")
    pixels = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        expected = model.get_image_features(pixels[-1:]).pooler_output.numpy()
    (found,) = graph(pixels.numpy()).values()
    assert found.shape == (1, 4, 64)
    np.testing.assert_allclose(found, expected, atol=2e-2)  # in bfloat16 where the processor has it
