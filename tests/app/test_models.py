"""Which models are in memory."""

import gc
import weakref

import pytest

from hovle.app.models import Models


def test_one_model_is_in_memory_at_a_time(folders, monkeypatch):
    models = Models(folders)
    first = weakref.ref(models.conversation(folders[0]).model)
    alive = []
    real = Models._load

    def load(self, name: str):
        conversation = real(self, name)
        gc.collect()
        alive.append(first() is not None)
        return conversation

    monkeypatch.setattr(Models, "_load", load)
    models.conversation(folders[0])
    assert alive == []
    models.conversation(folders[1])
    assert alive == [False]
    assert models.is_loaded(folders[1])
    assert not models.is_loaded(folders[0])


def test_a_folder_without_a_model_is_refused_before_any_is_loaded(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(Models, "_load", lambda self, name: pytest.fail("was loaded"))
    with pytest.raises(ValueError, match="nothing"):
        Models([folders[0], str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="named twice"):
        Models([folders[0], folders[0]])
