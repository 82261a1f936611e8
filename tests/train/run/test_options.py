"""Options of a run: epochs instead of steps, data held out, an early end, bfloat16 files, a failed first start."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hovle.cli import main
from hovle.files.atomic import locked
from hovle.train import run_stage
from hovle.train.config.data import ChatData, PictureData
from hovle.train.data.mixture import open_held_out, open_mixture
from hovle.train.data.readers import load_part, load_records
from hovle.train.data.records import Records
from hovle.train.run.checkpoint import find_checkpoint, load_training_state
from hovle.train.step import assembly


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def events(folder: Path, name: str) -> list[dict]:
    return [entry for entry in read_log(folder) if entry.get("event") == name]


# --- epochs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_epochs_become_as_many_steps_as_the_packed_data_fill(accumulation, next_token_config, tmp_path, capsys):
    changes = ("num_steps=0", "num_epochs=2", f"gradient_accumulation_steps={accumulation}", "packing_window=1")
    folder = run_stage(next_token_config(*changes))
    *_, last = (entry for entry in read_log(folder.parent) if "loss" in entry)
    recipe = yaml.safe_load((folder.parent / "recipe.yaml").read_text())
    assert recipe["num_steps"] == last["step"]
    assert 2 * 18 <= last["samples_drawn"] < 3 * 18  # a last step is a whole one, and some wait to be packed
    assert f"batches, {accumulation} in a step: {last['step']} steps." in capsys.readouterr().out
    assert run_stage(next_token_config(*changes), resume=True) == folder


def test_a_run_of_epochs_goes_on_where_it_was_interrupted(next_token_config, monkeypatch, tmp_path):
    changes = ("num_steps=0", "num_epochs=1", "checkpoint_every=1")
    straight = run_stage(next_token_config(*changes, f"output={tmp_path / 'straight'}"))
    step = assembly.train_step
    with monkeypatch.context() as patch:
        calls = iter(range(100))
        patch.setattr(assembly, "train_step", lambda *a, **k: step(*a, **k) if next(calls) < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_stage(next_token_config(*changes))
    folder = run_stage(next_token_config(*changes), resume=True)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, load_file(straight / "model.safetensors")[name])


def test_epochs_that_nobody_can_count_are_refused(next_token_config, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"num_steps \(7\) is not what num_epochs \(1\) takes, \d+: leave one"):
        run_stage(next_token_config("num_steps=7", "num_epochs=1"))
    assert main(["plan", str(tmp_path / "next_token.yaml"), "num_steps=0", "num_epochs=1"]) == 1
    assert "a plan reads no data to count the steps: add num_steps=N" in capsys.readouterr().err


# --- held out --------------------------------------------------------------------------------------------------------


def names(records: Records) -> list[str]:
    return [records[place].name for place in range(len(records))]


def test_what_is_held_out_is_never_trained_on_whatever_the_seed(next_token_config, data):
    config = ChatData(path=str(data / "chat.jsonl"), held_out=0.25)
    trained, held_out = load_part(config), load_part(config, held_out=True)
    assert (len(trained), len(held_out)) == (14, 4)
    assert sorted(names(trained) + names(held_out)) == sorted(names(load_records(config)))
    for seed in (0, 1):
        stage = next_token_config("data.held_out=0.25", f"seed={seed}")
        drawn = {open_mixture(stage.data, seed).record_at(index).name for index in range(3 * 14)}
        measured = {open_held_out(stage).record_at(index).name for index in range(4)}
        assert drawn == {*names(trained)}
        assert measured == {*names(held_out)}


def test_a_run_measures_what_its_sources_hold_out(next_token_config, data, tmp_path):
    folder = run_stage(next_token_config("data.held_out=0.25", "num_steps=2", "validate_every=1"))
    assert [entry["step"] for entry in events(folder.parent, "validation")] == [0, 1, 2]
    assert events(folder.parent, "image_ablation")


def test_a_part_without_records_is_refused(data):
    with pytest.raises(ValueError, match=r"pictures:pictures: held_out 0.01 of 12 records is 0: raise or lower it"):
        load_part(PictureData(path=str(data / "pictures"), held_out=0.01))


# --- an early end ----------------------------------------------------------------------------------------------------


def test_a_run_ends_where_validation_falls_no_more(next_token_config, tmp_path, capsys):
    """At learning rate 0 no validation is better than the first one."""
    changes = ("data.held_out=0.25", "validate_every=1", "patience=2", "learning_rate=0", "checkpoint_every=1")
    folder = run_stage(next_token_config(*changes, "num_steps=50"))
    [end] = events(folder.parent, "early_stop")
    assert end["step"] == events(folder.parent, "finish")[0]["step"] == 3
    assert "for 2 validations: the run ends here (patience)" in capsys.readouterr().err
    newest = find_checkpoint(folder.parent)
    assert newest is not None
    assert load_training_state(newest)["waiting"]["num_validations"] == 1  # of step 2, from which a run would go on


def test_a_run_that_learns_is_not_ended(next_token_config, data):
    validation = ("validation.source=chat", f"validation.path={data / 'chat.jsonl'}", "validate_every=2", "patience=1")
    everything = "trainable=[stem, holistic_layers, language_model]"
    folder = run_stage(next_token_config(*validation, everything, "learning_rate=0.01", "num_steps=6"))
    assert events(folder.parent, "finish")[0]["step"] == 6
    assert not events(folder.parent, "early_stop")


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_model_saved_in_bfloat16_is_the_rounded_one_and_is_handed_on(next_token_config, tmp_path):
    exact = run_stage(next_token_config(f"output={tmp_path / 'exact'}"))
    folder = run_stage(next_token_config("save_dtype=bfloat16"))
    expected, found = (load_file(place / "model.safetensors") for place in (exact, folder))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in expected.items())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    later = run_stage(next_token_config(f"model.checkpoint={folder}", f"output={tmp_path / 'next'}", "num_steps=1"))
    assert events(later.parent, "start")[0]["handoff"] < 1e-5


def fail(*_, **__):
    raise RuntimeError("out of memory")


def test_a_first_start_that_failed_does_not_block_the_next(next_token_config, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(assembly, "train_step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run_stage(next_token_config())
    assert (tmp_path / "run" / "recipe.yaml").is_file()
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="already holds a run"):
        run_stage(next_token_config("rows_per_batch=1"))  # as it may be going on
    folder = run_stage(next_token_config("rows_per_batch=1"))
    assert len(events(folder.parent, "start")) == 1
    assert yaml.safe_load((folder.parent / "recipe.yaml").read_text())["rows_per_batch"] == 1


def test_a_run_that_took_steps_or_holds_other_files_is_kept(next_token_config, monkeypatch, tmp_path):
    step = assembly.train_step
    with monkeypatch.context() as patch:
        calls = iter(range(100))
        patch.setattr(assembly, "train_step", lambda *a, **k: step(*a, **k) if next(calls) < 1 else fail())
        with pytest.raises(RuntimeError, match="out of memory"):
            run_stage(next_token_config())
    with pytest.raises(ValueError, match="already holds a run"):
        run_stage(next_token_config())
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    (tmp_path / "run" / "log.jsonl").write_text(log[0] + "\n")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="already holds a run"):
        run_stage(next_token_config())
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
