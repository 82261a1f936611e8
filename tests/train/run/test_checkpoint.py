"""Checkpoints: complete or absent; the newest counts; a changed run or model is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hovle import HoVLEForConditionalGeneration
from hovle.files import atomic
from hovle.files.atomic import append_log
from hovle.train.data.packing import PackedBatches, StreamPosition
from hovle.train.data.records import Record, conversation
from hovle.train.data.samples import ReplySamples
from hovle.train.data.tiles import PixelNormalization
from hovle.train.run import checkpoint as checkpoints
from hovle.train.run import handoff


def write(text: str):
    return lambda folder: (folder / "weights").write_text(text)


def test_a_saved_checkpoint_replaces_older_ones(tmp_path):
    checkpoints.save_checkpoint(tmp_path, 2, write("two"), {"step": 2})
    checkpoints.save_checkpoint(tmp_path, 4, write("four"), {"step": 4})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000004"]
    newest = checkpoints.find_checkpoint(tmp_path)
    assert newest is not None
    assert (newest / "weights").read_text() == "four"
    assert checkpoints.load_training_state(newest) == {"step": 4}


def test_the_newest_and_the_best_stay(tmp_path):
    best = {1: 1, 2: 2, 3: 2, 4: 2, 5: 2, 6: 6}
    for step, best_step in best.items():
        checkpoints.save_checkpoint(tmp_path, step, write(str(step)), {}, keep_last=2, best_step=best_step)
        kept = {folder.name for folder in checkpoints.sorted_checkpoints(tmp_path)}
        assert kept == {f"checkpoint-{place:06d}" for place in {step, max(step - 1, 1), best_step}}
        assert (tmp_path / "best" / "weights").read_text() == str(best_step)


@pytest.mark.parametrize("moment", ["weights", "state", "rename"])
def test_an_interrupted_save_leaves_the_older_checkpoint_usable(tmp_path, monkeypatch, moment):
    checkpoints.save_checkpoint(tmp_path, 2, write("two"), {"step": 2})

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    save = write("four")
    if moment == "weights":
        save = fail
    elif moment == "state":
        monkeypatch.setattr(torch, "save", fail)
    else:
        monkeypatch.setattr(atomic.os, "rename", fail)
    with pytest.raises(
        checkpoints.SaveError, match=r"step 4 .*No space left.*checkpoint-000002 is complete: continue"
    ):
        checkpoints.save_checkpoint(tmp_path, 4, save, {"step": 4})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000002"]
    newest = checkpoints.find_checkpoint(tmp_path)
    assert newest is not None
    assert (newest / "weights").read_text() == "two"
    assert checkpoints.load_training_state(newest) == {"step": 2}


@pytest.mark.parametrize("action", ["link", "removal"])
def test_a_link_or_removal_that_fails_ends_the_run_with_the_new_checkpoint_complete(tmp_path, monkeypatch, action):
    checkpoints.save_checkpoint(tmp_path, 2, write("two"), {"step": 2})

    def fail(*args, **kwargs):
        raise PermissionError("Read-only file system")

    monkeypatch.setattr(checkpoints, "link_best" if action == "link" else "remove_folder", fail)
    with pytest.raises(checkpoints.SaveError, match=r"step 4 is complete, but .*Read-only.*continue with --resume"):
        checkpoints.save_checkpoint(tmp_path, 4, write("four"), {"step": 4}, best_step=4)
    newest = checkpoints.find_checkpoint(tmp_path)
    assert newest is not None
    assert checkpoints.load_training_state(newest) == {"step": 4}


def test_a_folder_left_by_a_killed_process_is_no_checkpoint(tmp_path):
    killed = tmp_path / ".checkpoint-000004.writing"
    killed.mkdir()
    (killed / "weights").write_text("half")
    assert checkpoints.find_checkpoint(tmp_path) is None
    checkpoints.save_checkpoint(tmp_path, 4, write("four"), {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000004"]


def test_the_newest_checkpoint_has_the_most_steps(tmp_path):
    for name in ("checkpoint-999999", "checkpoint-1000000", "checkpoint-000010"):
        (tmp_path / name).mkdir()
    newest = checkpoints.find_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "checkpoint-1000000"


def test_training_state_that_would_run_code_is_refused(tmp_path):
    torch.save({"step": Path("x")}, tmp_path / checkpoints.TRAINING_STATE)
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoints.load_training_state(tmp_path)


def test_a_changed_recipe_is_named_with_old_and_new_value(next_token_config):
    config = next_token_config()
    state = {"config": config.to_dict(), "data_fingerprint": "abc"}
    checkpoints.check_same_run(config, state, "abc")
    changed = next_token_config("learning_rate=0.5", "model.max_tiles=3")
    with pytest.raises(ValueError, match=r"recipe changed .*model: .*'max_tiles': 3.*; learning_rate: 0\.001 -> 0\.5"):
        checkpoints.check_same_run(changed, state, "abc")
    with pytest.raises(ValueError, match=r"data changed .*abc -> def"):
        checkpoints.check_same_run(config, state, "def")


def test_what_moves_no_number_may_change(next_token_config):
    state = {"config": next_token_config().to_dict(), "data_fingerprint": "abc"}
    moved = next_token_config("num_workers=1", "log_every=7", "checkpoint_every=5", "output=elsewhere")
    checkpoints.check_same_run(moved, state, "abc")
    assert {field.name for field in dataclasses.fields(moved)} >= set(checkpoints.RESUMABLE_CHANGES)


def test_a_field_that_is_new_since_the_checkpoint_had_its_default(next_token_config):
    old = next_token_config().to_dict()
    for name in ("adam_betas", "max_tiles_per_picture", "quantize_frozen"):
        del old[name]
    del old["data"][0]["weight"]
    checkpoints.check_same_run(next_token_config(), {"config": old, "data_fingerprint": "abc"}, "abc")
    other = next_token_config("data.weight=4", "max_tiles_per_picture=1")
    assert checkpoints.changed_fields(old, other.to_dict()) == ["data", "max_tiles_per_picture"]


FLAT_DISTILLATION = {
    "num_random_tokens": 50,
    "image_loss": "cosine",
    "temperature": 0.07,
    "tiles_per_set": 16,
    "text_weight": 1.0,
    "scale_weight": 0.1,
}
FLAT_DATA = {
    "split": "train",
    "picture_folder": None,
    "format": "auto",
    "subset": None,
    "revision": None,
    "streaming": False,
    "prompt": "",
    "questions_per_sample": 1,
    "balance_answers": False,
}
"""What version 0.1 wrote beside each objective's and source's own fields."""


def test_a_checkpoint_with_the_fields_of_all_kinds_and_older_names_is_resumed(next_token_config):
    config = next_token_config("validation.source=pictures", "validation.path=x")
    old = config.to_dict()
    old["objective"] |= FLAT_DISTILLATION
    for source in (*old["data"], old["validation"]):
        source |= FLAT_DATA
    old |= {"blind_check": old.pop("image_ablation"), "stop_when_blind": old.pop("stop_when_images_ignored")}
    checkpoints.check_same_run(config, {"config": old, "data_fingerprint": "abc"}, "abc")
    old["validation"]["split"] = "test"  # which pictures never read, but the run may have meant something by it
    with pytest.raises(ValueError, match=r"recipe changed .*validation: .*'split': 'test'"):
        checkpoints.check_same_run(config, {"config": old, "data_fingerprint": "abc"}, "abc")


def test_a_recipe_that_cannot_be_read_any_more_is_compared_as_it_stands(next_token_config):
    old = {**next_token_config().to_dict(), "seed": 1, "field_of_old": 3}
    del old["compile"]
    assert checkpoints.changed_fields(old, next_token_config().to_dict()) == ["seed", "compile"]


def test_pinning_the_commit_of_a_data_set_is_no_other_recipe(next_token_config):
    hub = next_token_config("data.source=huggingface", "data.path=owner/name")
    pinned = next_token_config("data.source=huggingface", "data.path=owner/name", "data.revision=abc")
    state = {"config": hub.to_dict(), "data_fingerprint": "0123@abc"}
    checkpoints.check_same_run(pinned, state, "0123@abc")
    with pytest.raises(ValueError, match=r"0123@abc -> 0123@def.* set its `revision` to the commit after the @"):
        checkpoints.check_same_run(hub, state, "0123@def")


# --- hand-off --------------------------------------------------------------------------------------------------------


@pytest.fixture
def handed_over(parts, batches, checkpoints_copy) -> Path:
    """A model folder with the probe its stage wrote."""
    model, _ = parts
    handoff.write_probe(checkpoints_copy, handoff.make_probe(model, batches("chat")[0], PixelNormalization()))
    return checkpoints_copy


@pytest.fixture
def checkpoints_copy(request, tmp_path) -> Path:
    folder = request.getfixturevalue("checkpoints")["tied"]
    return Path(shutil.copytree(folder, tmp_path / "model"))


def load(folder: Path) -> HoVLEForConditionalGeneration:
    return HoVLEForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def test_an_untouched_model_passes_the_handoff_check(handed_over):
    model = load(handed_over).train()
    difference = handoff.check_handoff(model, handed_over)
    assert difference is not None
    assert difference < 1e-6
    assert model.training


def test_a_folder_without_a_probe_is_not_checked(checkpoints_copy):
    assert handoff.check_handoff(load(checkpoints_copy), checkpoints_copy) is None


def test_engines_that_take_every_file_of_tensors_find_weights_only(handed_over):
    """As vLLM's loader does, which ended in "no module or parameter named 'input_ids'" at a trained model."""
    names = {name for path in handed_over.glob("*.safetensors") for name in load_file(path)}
    assert names <= set(load(handed_over).state_dict())


def test_the_probe_holds_a_picture_and_no_padding(handed_over, parts):
    probe = load_file(handed_over / handoff.HANDOFF_PROBE)
    image_token_id = parts[0].config.image_token_id
    assert int((probe["input_ids"] == image_token_id).sum()) == 4 * len(probe["pixel_values"]) > 0
    assert probe["input_ids"][0, -1] != 0
    assert probe["logits"].shape == (1, 8, parts[0].config.text_config.vocab_size)


@pytest.mark.parametrize(
    "name",
    [
        "model.patch_embedding.projection.weight",
        "model.projector.linear_2.bias",
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.3.mlp.down_proj.weight",
        "model.language_model.norm.weight",
        "model.language_model.embed_tokens.weight",
    ],
)
def test_a_tampered_weight_file_is_refused(handed_over, name):
    path = handed_over / "model.safetensors"
    weights = load_file(path)
    weights[name] = weights[name].flip(0) + 0.05
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"Hand-off check failed: the model loaded from .* differs"):
        handoff.check_handoff(load(handed_over), handed_over)


def test_the_probe_sees_the_picture_through_shared_beginnings(parts, data, next_token_config):
    model, processor = parts
    picture = data / "pictures" / "00.png"
    record = Record("x", conversation(picture, "Why?", "A bus"), (conversation(picture, "A tree?", "The street."),))
    stream = PackedBatches([record], ReplySamples(processor), next_token_config(), StreamPosition(), 0, 1, 0)
    probe = handoff.make_probe(model, next(iter(stream)), PixelNormalization())
    with torch.no_grad():
        model.model.projector.linear_2.bias += 1
    assert (handoff.probe_logits(model, probe) - probe["logits"]).abs().max() > 0.01


def test_weights_that_are_not_numbers_are_refused(handed_over):
    path = handed_over / "model.safetensors"
    weights = load_file(path)
    weights["model.language_model.norm.weight"][3] = float("nan")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match="Hand-off check failed"):
        handoff.check_handoff(load(handed_over), handed_over)


def test_a_changed_config_is_refused(handed_over):
    config = json.loads((handed_over / "config.json").read_text())
    config["num_embedding_layers"] = 2
    config["text_config"]["rope_parameters"]["rope_theta"] = 500.0
    (handed_over / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Hand-off check failed"):
        handoff.check_handoff(load(handed_over), handed_over)


def test_log_entries_are_lines_of_json(tmp_path):
    append_log(tmp_path / "log.jsonl", {"step": 1})
    append_log(tmp_path / "log.jsonl", {"step": 2})
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
    ]
