"""Shipped models: stored in 8 bits beside a language model that is fetched, put together once, and refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

import hovle
from hovle import HoVLEForConditionalGeneration, HoVLEProcessor, assets, packaged
from hovle.cli import main
from hovle.loading import load_config, load_model
from hovle.packaged.packing import pack
from hovle.packaged.storage import restore, store
from hovle.train import load_stage
from hovle.train.model.start import start_model, with_shipped_model
from hovle.train.run.handoff import HANDOFF_PROBE

RANK = 2


@pytest.fixture(scope="module")
def language_model(tmp_path_factory, make_tokenizer) -> Path:
    """A random Llama of two layers with its tokenizer, exact in bfloat16."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    text = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = LlamaConfig(**text, num_hidden_layers=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, language_model) -> Path:
    """A HoVLE around it that has learnt: new layers, adapters of rank 2 merged, and the rows of new tokens."""
    folder = tmp_path_factory.mktemp("trained")
    model = HoVLEForConditionalGeneration.from_language_model(
        str(language_model), 2, image_size=56, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        new = (model.model.patch_embedding, model.model.projector, model.model.embedding_layers)
        for parameter in (parameter for part in new for parameter in part.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for layer in model.model.language_layers:
            weight = layer.self_attn.q_proj.weight
            up, down = torch.randn(64, RANK, generator=generator), torch.randn(RANK, 64, generator=generator)
            weight.add_(0.02 * up @ down)
    model.save_pretrained(folder)
    processor = HoVLEProcessor.from_language_model(str(language_model), model.config, max_tiles=5)
    processor.chat_template = processor.chat_template.replace("assistant", "answer")
    processor.save_pretrained(folder)
    save_file({"logits": torch.zeros(1)}, folder / HANDOFF_PROBE)  # no part of a shipped model
    (folder / "language_model.py").write_text("of an older hovle")  # nor is code
    return folder


@pytest.fixture
def shipped(tmp_path, trained, language_model, monkeypatch) -> Path:
    """The trained model shipped as `smol` by a package of its own, with an own cache; gives the shipped folder."""
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "SHIPPED", tmp_path / "package")
    monkeypatch.setattr(assets, "language_model", lambda name: {"tiny": language_model}[name])
    pack(trained, language_model, "tiny", "smol", tmp_path / "package" / "smol", rank=RANK)
    return tmp_path / "package" / "smol"


def prompt(folder: Path) -> dict[str, torch.Tensor]:
    model_config = load_config(folder)
    ids = torch.tensor([[5, model_config.image_token_id, *[model_config.image_token_id] * 3, 9, 17, 30]])
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "pixel_values": pixels}


# --- storage --------------------------------------------------------------------------------------------------------


def test_each_kind_of_change_is_stored_as_small_as_it_can_be_and_comes_back():
    generator = torch.Generator().manual_seed(0)
    shapes = dict.fromkeys(("same", "rows", "adapted", "other"), (300, 40)) | {"conv": (6, 3, 2, 2), "norm": (40,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    trained = {name: tensor.clone() for name, tensor in base.items()}
    trained["rows"][[3, 299]] += 1
    trained["adapted"] += torch.randn(300, RANK, generator=generator) @ torch.randn(RANK, 40, generator=generator)
    for name in ("other", "conv", "norm"):
        trained[name] = torch.randn(base[name].shape, generator=generator)
    stored = store(trained, base, rank=RANK)
    assert {key.rpartition(":")[0]: key.rpartition(":")[2] for key in stored if not key.endswith("scale")} == {
        "rows": "rows", "adapted": "down", "other": "whole", "conv": "whole", "norm": "plain",
    }  # fmt: skip
    assert stored["other:whole"].dtype == torch.int8
    assert stored["adapted:up"].shape == (300, RANK)
    found = restore(stored, base)
    for name, worst in {"same": 0, "norm": 0, "rows": 2e-3, "adapted": 0.1, "other": 0.02, "conv": 0.02}.items():
        assert (found[name] - trained[name]).abs().max() <= worst, name


def test_a_change_of_higher_rank_is_stored_whole():
    base = {"weight": torch.zeros(30, 20)}
    stored = store({"weight": torch.randn(30, 20, generator=torch.Generator().manual_seed(0))}, base, rank=3)
    assert {*stored} == {"weight:whole", "weight:whole_scale"}


def test_rows_of_zeros_come_back_as_zeros():
    found = restore(
        store({"weight": torch.zeros(3, 4)}, {"weight": torch.ones(3, 4)}, 0), {"weight": torch.ones(3, 4)}
    )
    assert not found["weight"].any()


# --- packing and assembling -----------------------------------------------------------------------------------------


def test_a_packed_model_is_small_and_says_what_storing_it_cost(shipped, trained):
    described = json.loads((shipped / "package.json").read_text())
    assert described["weights_by_kind"].keys() == {"whole", "plain", "up", "down", "rows", "row_numbers"}
    model = load_model(trained).model
    parts = (model.patch_embedding, model.projector, model.embedding_layers)
    new = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert described["weights_by_kind"]["whole"] < 1.1 * new  # a byte each, and scales
    assert described["weights_by_kind"]["up"] == 2 * 64 * (RANK + 4)  # of two layers' queries
    assert described["loss"]["divergence"] < 1e-2
    assert described["loss"]["same_likeliest"] > 0.9
    assert {*described["files"]} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "weights.safetensors",
    }


def test_an_assembled_model_is_a_plain_folder_that_says_nearly_what_the_trained_one_says(shipped, trained):
    folder = hovle.pretrained("smol")
    inputs = prompt(trained)
    expected, found = (
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)(**inputs).logits
        for path in (trained, folder)
    )
    assert (found - expected).abs().max() / expected.abs().max() < 0.05
    weights = load_file(folder / "model.safetensors")
    untouched = "model.language_model.layers.3.mlp.up_proj.weight"
    assert weights[untouched].equal(load_file(trained / "model.safetensors")[untouched])
    ours, theirs = AutoProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(trained)
    assert ours.chat_template == theirs.chat_template
    assert ours.image_processor.to_dict() == theirs.image_processor.to_dict()
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()


def test_a_model_is_assembled_once(shipped, monkeypatch):
    folder = hovle.pretrained("smol")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(assets, "language_model", lambda name: pytest.fail("fetched again"))
    assert hovle.pretrained("smol") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_loaders_commands_and_recipes_take_the_name(shipped, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the drawing of tiles goes there
    folder = hovle.pretrained("smol")
    assert load_model("smol").name_or_path == str(folder)
    assert main(["tiles", "--model", "smol", str(_picture(tmp_path))]) == 0, capsys.readouterr().err
    config = load_stage("smol/alignment", ["model.checkpoint=smol"])
    assert with_shipped_model(config).model.checkpoint == str(folder)
    assert with_shipped_model(load_stage("smol/alignment")) == load_stage("smol/alignment")


def test_a_shipped_start_is_there_to_train_from_and_is_no_model_to_ask(shipped, trained, language_model, monkeypatch):
    pack(trained, language_model, "tiny", "smol-distilled", shipped.with_name("smol-distilled"), rank=0)
    assert packaged.shipped_names() == ["smol", "smol-distilled"]
    config = with_shipped_model(load_stage("smol/distillation", ["model.lower_layers=smol-distilled"]))
    assert config.model.lower_layers == str(hovle.pretrained("smol-distilled"))
    config = with_shipped_model(load_stage("smol/alignment", ["model.checkpoint=smol-distilled"]))
    assert config.model.checkpoint == str(hovle.pretrained("smol-distilled"))
    assert packaged.resolve_model("smol-distilled") == "smol-distilled"
    named_as_a_model = load_stage("smol/distillation", ["model.lower_layers=smol"])
    assert with_shipped_model(named_as_a_model).model.lower_layers == "smol"


def test_whose_work_the_weights_were_made_from_ships_and_lies_in_the_assembled_folder(
    shipped, trained, language_model, monkeypatch
):
    monkeypatch.setattr(assets, "language_model", lambda name: language_model)
    folder = shipped.with_name("smol-distilled")
    learnt_from = ["easy-vqa", "emoji-datasource-twitter", "easy-vqa"]
    pack(trained, language_model, "smollm2-135m-instruct", folder.name, folder, RANK, learnt_from)
    told = (hovle.pretrained(folder.name) / "ATTRIBUTION.md").read_text()
    assert told.count("Copyright (c) 2019 Victor Zhou. License: MIT. pypi package `easy-vqa` 1.0") == 1
    assert all(part in told for part in ("SmolLM2 by", "Twemoji by Twitter", "CC-BY-4.0"))
    with pytest.raises(ValueError, match="No asset of `hovle fetch` is called photographs, paintings"):
        pack(trained, language_model, "easy-vqa", "smol", shipped.with_name("no"), 0, ["photographs", "paintings"])
    assert not shipped.with_name("no").exists()


def test_neither_code_nor_the_makers_folders_ship(shipped, language_model):
    assert not list(shipped.glob("*.py"))
    assert all(str(language_model.parent) not in path.read_text() for path in shipped.glob("*.json"))


def test_the_start_that_ships_is_whole_and_is_what_the_recipe_makes():
    folder = packaged.SHIPPED / "smol-distilled"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 40e6
    told = [path.read_text(encoding="utf-8") for path in folder.glob("*.json")]
    assert not any(place in text for text in told for place in ("/root", "/home", "/tmp", ".cache"))
    stage = load_stage("smol/distillation", ["model.lower_layers=smol-distilled"])
    model, processor = start_model(with_shipped_model(stage))
    start = load_model(hovle.pretrained("smol-distilled"), dtype=torch.float32)
    assert start.config.num_embedding_layers == model.config.num_embedding_layers
    for taken, shipped in zip(model.model.embedding_layers, start.model.embedding_layers, strict=True):
        assert torch.equal(taken.mlp.down_proj.weight, shipped.mlp.down_proj.weight)
        assert taken.mlp.down_proj.weight.any()
    assert processor.chat_template == (folder / "chat_template.jinja").read_text(encoding="utf-8")


def test_clients_name_a_served_model_as_the_command_does(shipped, monkeypatch):
    served = []
    monkeypatch.setattr("hovle.serve.command.run", lambda args: served.append(args.served_model_name) or 0)
    for options in ([], ["--served-model-name", "mine"]):
        assert main(["serve", "smol", *options]) == 0
    assert main(["serve", str(hovle.pretrained("smol"))]) == 0
    assert served == ["smol", "mine", None]


def _picture(folder: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (60, 60), "red").save(folder / "red.png")
    return folder / "red.png"


def test_a_folder_of_that_name_comes_first(shipped, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "smol")
    assert packaged.resolve_model("smol") == "smol"


# --- what cannot work -----------------------------------------------------------------------------------------------


def test_while_no_weights_ship_the_name_says_so_and_how_to_make_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packaged, "SHIPPED", tmp_path)
    with pytest.raises(ValueError, match=r"smol: no trained weights are in this package yet; make one: train one"):
        hovle.pretrained("smol")
    assert main(["chat", "--model", "smol", "-q", "Hello?"]) == 1
    assert "no trained weights are in this package yet" in capsys.readouterr().err


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"no shipped model named 'smoll'; there are smol"):
        hovle.pretrained("smoll")


def test_damaged_weights_are_refused_and_nothing_is_left_in_the_cache(shipped, tmp_path):
    content = bytearray((shipped / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (shipped / "weights.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"weights.safetensors is damaged"):
        hovle.pretrained("smol")
    assert not list((tmp_path / "cache").glob("smol-*"))


def test_another_language_model_is_refused(shipped, language_model, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(language_model, other)
    model = LlamaForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(other)
    monkeypatch.setattr(assets, "language_model", lambda name: other)
    with pytest.raises(ValueError, match=r"is not the language model that smol was built around"):
        hovle.pretrained("smol")


def test_a_description_of_another_version_is_refused(shipped):
    described = json.loads((shipped / "package.json").read_text())
    (shipped / "package.json").write_text(json.dumps({**described, "format": 99}))
    with pytest.raises(ValueError, match=r"has the format 99; this version of hovle reads 1"):
        hovle.pretrained("smol")


def test_a_model_around_another_language_model_is_not_packed(trained, tmp_path, make_tokenizer):
    other = tmp_path / "llama"
    text = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**text, num_hidden_layers=2)).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    with pytest.raises(ValueError, match="has other tensors than a HoVLE around"):
        pack(trained, other, "tiny", "smol", tmp_path / "out")
