"""What is taken for a folder with a model, and what for a Hub id."""

import re

import pytest

from hovle.files.checkpoint_files import local_folder
from hovle.files.model_folder import is_hub_id, refuse_missing_folder
from hovle.train.model.start import check_checkpoint

PATHS = ["runs/x", "a/b/c", "x", "./x", "/x/y", "~/x", "../x", "a b/c", "owner/", "owner/na:me"]


@pytest.mark.parametrize("name", ["owner/name", "OpenGVLab/HoVLE-2.6B", "o/n_1"])
def test_owner_and_name_are_a_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # there is no folder "owner" here
    assert is_hub_id(name)
    refuse_missing_folder(name)


@pytest.mark.parametrize("check", [refuse_missing_folder, check_checkpoint, local_folder])
@pytest.mark.parametrize("name", PATHS)
def test_all_else_is_a_path_and_no_hub_is_asked_for_it(name, check, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "hovle.files.checkpoint_files.snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked")
    )
    assert not is_hub_id(name)
    with pytest.raises(ValueError, match=rf"No model in {re.escape(name)}, as there is no such folder: expected a"):
        check(name)


def test_models_beside_a_missing_one_are_named(tmp_path):
    for number in range(10):
        (tmp_path / f"model-{number}").mkdir()
        (tmp_path / f"model-{number}" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"In {tmp_path} there are model-0, .*model-7, \.\.\.\.$"):
        refuse_missing_folder(tmp_path / "modle-1")


def test_a_folder_without_a_model_is_told_from_a_missing_one(tmp_path):
    with pytest.raises(ValueError, match=rf"No model in {tmp_path}: expected a folder with config.json"):
        refuse_missing_folder(tmp_path)
