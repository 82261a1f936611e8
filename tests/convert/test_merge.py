"""Mixtures of two models: what is mixed with what, what stays, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor, cli
from hovle.convert.merge import PARTS, Merger, Weights
from hovle.train.run.handoff import HANDOFF_PROBE

SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def models(request, tmp_path_factory, make_tokenizer) -> dict[str, Path]:
    """A bare language model and two HoVLEs of 1 + 2 layers around it, every weight of which was moved; read only."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: root / name for name in ("bare", "a", "b")}
    torch.manual_seed(0)
    language_model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=request.param))
    language_model.save_pretrained(folders["bare"])
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folders["bare"])
    for name in ("a", "b"):
        model = HoVLEForConditionalGeneration.from_language_model(folders["bare"], 1, image_size=56)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folders[name])
        HoVLEProcessor.from_language_model(folders["bare"], model.config).save_pretrained(folders[name])
    (folders["a"] / HANDOFF_PROBE).write_bytes(b"of these weights")
    (folders["a"] / "training_state.pt").write_bytes(b"of an optimizer")
    return folders


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_every_part_has_its_share(models, tmp_path):
    merger = Merger(models["a"], models["b"])
    shares = {"stem": 0.0, "holistic": 0.25, "language": 1.0}
    merger.write(tmp_path / "mixed", Weights(**shares))
    first, second, mixed = (weights(folder) for folder in (models["a"], models["b"], tmp_path / "mixed"))
    assert mixed.keys() == first.keys()
    assert {merger.part_of(name) for name in mixed} == {*PARTS}
    for name, tensor in mixed.items():
        share = shares[merger.part_of(name)]
        torch.testing.assert_close(tensor, (1 - share) * first[name] + share * second[name])
    assert torch.equal(
        mixed["model.patch_embedding.projection.weight"], first["model.patch_embedding.projection.weight"]
    )
    assert torch.equal(mixed["model.language_model.norm.weight"], second["model.language_model.norm.weight"])


def test_the_ends_are_the_models_themselves(models, tmp_path):
    merger = Merger(models["a"], models["b"])
    for share, expected in ((0.0, "a"), (1.0, "b")):
        merger.write(tmp_path / expected, Weights(*[share] * 3))
        mixed = weights(tmp_path / expected)
        assert all(torch.equal(tensor, mixed[name]) for name, tensor in weights(models[expected]).items())


def test_a_bare_language_model_is_mixed_into_the_language_part_alone(models, tmp_path):
    merger = Merger(models["a"], models["bare"])
    assert merger.is_bare
    merger.write(tmp_path / "mixed", Weights(stem=1.0, holistic=1.0, language=1.0))
    first, mixed = weights(models["a"]), weights(tmp_path / "mixed")
    for name, tensor in mixed.items():
        if merger.part_of(name) != "language":
            assert torch.equal(tensor, first[name])
    model = HoVLEForConditionalGeneration.from_pretrained(tmp_path / "mixed")
    bare = LlamaForCausalLM.from_pretrained(models["bare"])
    embeds = torch.randn(1, 5, 32)
    with torch.no_grad():
        states = embeds
        for layer in (*model.model.language_layers,):
            tables = model.model.language_model.rotary_emb(states, torch.arange(5)[None])
            states = layer(states, position_embeddings=tables, position_ids=torch.arange(5)[None], attention_mask=None)
        found = model.lm_head(model.model.language_model.norm(states))[..., :512]
        torch.testing.assert_close(found, bare(inputs_embeds=embeds).logits, rtol=1e-4, atol=1e-5)
    rows = "model.language_model.embed_tokens.weight"
    assert torch.equal(mixed[rows][512:], first[rows][512:])  # the tokens of pictures


def test_the_mixture_is_a_model_folder_without_what_belongs_to_the_first_ones_weights(models, tmp_path):
    Merger(models["a"], models["b"]).write(tmp_path / "mixed", Weights(0.5, 0.5, 0.5))
    assert HoVLEProcessor.from_pretrained(tmp_path / "mixed").chat_template
    found = {path.name for path in (tmp_path / "mixed").iterdir()}
    assert {path.name for path in models["a"].iterdir()} - found == {HANDOFF_PROBE, "training_state.pt"}


def test_models_of_other_shapes_are_refused_by_name(models, tmp_path):
    other = HoVLEForConditionalGeneration.from_language_model(models["bare"], 2, image_size=56)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"configs differ in .*num_hidden_layers: 3 and 4"):
        Merger(models["a"], tmp_path / "other")
    wide = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 64}))
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"cannot be mixed, .*hidden_size: 32 and 64"):
        Merger(models["a"], tmp_path / "wide")
    with pytest.raises(ValueError, match="is no HoVLE"):
        Merger(models["bare"], models["a"])


def test_equal_shapes_do_not_make_equal_models(models, tmp_path):
    shutil.copytree(models["b"], tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.5
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"rms_norm_eps: 1e-06 and 0.5"):
        Merger(models["a"], tmp_path / "other")


def test_an_existing_folder_is_not_overwritten(models, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        Merger(models["a"], models["b"]).write(tmp_path, Weights(0.5, 0.5, 0.5))


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_lies_between_the_models(share):
    with pytest.raises(ValueError, match=r"weight of the holistic must lie in 0..1"):
        Weights(stem=0.0, holistic=share, language=0.0)


# --- the command -----------------------------------------------------------------------------------------------------


def test_several_weights_give_several_folders(models, tmp_path, capsys):
    arguments = [str(models["a"]), str(models["b"]), "--weight", "0", "0.5", "--out", str(tmp_path / "mixed")]
    assert cli.main(["merge", *arguments]) == 0
    assert sorted(path.name for path in (tmp_path / "mixed").iterdir()) == ["0", "0.5"]
    assert str(tmp_path / "mixed" / "0.5") in capsys.readouterr().out


def test_a_part_that_a_bare_language_model_lacks_is_no_option(models, capsys):
    arguments = [str(models["a"]), str(models["bare"]), "--weight", "0.5", "--stem", "0.1", "--out", "x"]
    assert cli.main(["merge", *arguments]) == 1
    assert "has no stem part to mix" in capsys.readouterr().err


def test_mixtures_are_scored_by_one_command(models, tmp_path, capsys):
    model = HoVLEForConditionalGeneration.from_language_model(models["bare"], 1, image_size=56)
    model.save_pretrained(tmp_path / "new")
    HoVLEProcessor.from_language_model(models["bare"], model.config).save_pretrained(tmp_path / "new")
    arguments = [str(tmp_path / "new"), str(models["bare"]), "--weight", "0", "1", "--score", "--questions", "3"]
    assert cli.main(["merge", *arguments]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["weight", "perplexity ratio", "easy-VQA balanced"]
    assert [row.split("|")[1:3] for row in rows] == [["0", "1"], ["1", "1"]] or all(" 1" in row for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_without_a_bare_language_model_nothing_can_be_scored(models, capsys):
    arguments = [str(models["a"]), str(models["b"]), "--weight", "0.5", "--score", "--questions", "3"]
    assert cli.main(["merge", *arguments]) == 1
    assert "name the model as --language-model" in capsys.readouterr().err
