"""Where a run's log goes beside its file."""

import json
from pathlib import Path

import pytest

from hovle.train import run_stage
from hovle.train.monitor.run_log import check_trackers, flatten, tracked_numbers


def test_tensorboard_receives_what_the_log_file_does(next_token_config, data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    validation = ("validation.source=chat", f"validation.path={data / 'chat.jsonl'}", "num_validation_batches=1")
    run_stage(next_token_config("tracking=[tensorboard]", "num_steps=2", *validation))
    [folder] = {path.parent for path in (tmp_path / "run").glob("hovle/events.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "event" not in entry]
    for name in ("loss", "gradient_norm_stem", "tokens_per_second"):
        shown = events.Scalars(f"train/{name}")
        assert [item.step for item in shown] == [1, 2]
        assert [item.value for item in shown] == pytest.approx([entry[name] for entry in steps])
    held_out = [entry["cross_entropy"] for entry in entries if entry.get("event") == "validation"]
    assert [item.value for item in events.Scalars("validation/cross_entropy")] == pytest.approx(held_out)
    assert len(held_out) == 2
    assert "image_ablation/blank_gap" in events.Tags()["scalars"]


def test_wandb_receives_what_the_log_file_does_without_a_network(next_token_config, data, tmp_path, monkeypatch):
    import wandb

    settings = {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}
    settings |= {f"{kind}_DIR": str(tmp_path / "own" / kind) for kind in ("CACHE", "CONFIG", "DATA")}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.chdir(tmp_path)
    validation = ("validation.source=chat", f"validation.path={data / 'chat.jsonl'}", "num_validation_batches=1")
    run_stage(next_token_config("tracking=[wandb]", "num_steps=2", *validation))
    wandb.teardown()  # its service writes on after a run's end, until the process ends
    [file] = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert not (tmp_path / "wandb").exists()
    name, recipe, rows = read_wandb(file)
    assert name == "run"
    assert recipe["model.image_size"] == 448
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "event" not in entry]
    for name in ("loss", "gradient_norm_stem", "tokens_per_second"):
        shown = [(row["_step"], row[f"train/{name}"]) for row in rows if f"train/{name}" in row]
        assert shown == [(entry["step"], entry[name]) for entry in steps]
    held_out = [entry["cross_entropy"] for entry in entries if entry.get("event") == "validation"]
    assert [row["validation/cross_entropy"] for row in rows if "validation/cross_entropy" in row] == held_out
    assert len(held_out) == 2
    assert any("image_ablation/blank_gap" in row for row in rows)


def read_wandb(file: Path) -> tuple[str, dict, list[dict]]:
    """Name, settings and rows of a run that wandb kept on the disk."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    store.open_for_scan(str(file))
    name, settings, rows = "", {}, []
    while data := store.scan_data():
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            name = record.run.display_name
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("config"):
            settings |= {item.key: json.loads(item.value_json) for item in record.config.update}
        if record.HasField("history"):
            rows.append(
                {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            )
    store.close()
    return name, settings, rows


def test_trackers_that_do_not_exist_or_are_not_installed_are_refused_before_the_run(next_token_config, tmp_path):
    with pytest.raises(ValueError, match=r"tracking names 'tensorbord'; accelerate knows .*tensorboard.*wandb"):
        run_stage(next_token_config("tracking=[tensorbord]"))
    with pytest.raises(ValueError, match="tracking names aim, which is not installed: pip install aim"):
        check_trackers(["aim"])
    assert not (tmp_path / "run").exists()


def test_numbers_are_tracked_by_their_event_and_words_are_not():
    entry = {"step": 3, "event": "start", "device": "cpu", "compiled": True, "batch_tflops": 0.5, "handoff": None}
    assert tracked_numbers(entry) == {"start/batch_tflops": 0.5}
    assert tracked_numbers({"step": 3, "loss": 1.5}) == {"train/loss": 1.5}


def test_nested_settings_are_named_by_their_path():
    found = flatten({"model": {"checkpoint": "x", "image_size": 56}, "trainable": ["stem"], "lora": None})
    assert found == {"model.checkpoint": "x", "model.image_size": 56, "trainable": "['stem']", "lora": None}


def test_trackers_are_closed_when_a_run_fails(next_token_config, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    from hovle.train.run import stage

    closed = []
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: closed.append(self.name))
    monkeypatch.setattr(stage, "train", lambda *args, **kwargs: 1 / 0)
    config = next_token_config("tracking=[tensorboard]")
    with pytest.raises(ZeroDivisionError):
        run_stage(config)
    assert closed == ["tensorboard"]
    assert (Path(config.output) / "log.jsonl").is_file()
