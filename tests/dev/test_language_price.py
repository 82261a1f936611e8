"""`dev/language_price.py`: what is compared sees the same pictures."""

import dataclasses
import importlib.util
from types import ModuleType

import pytest
from places import ROOT

from hovle.train.config import load_stage


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("language_price", ROOT / "dev" / "language_price.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("stage", "rows"), [("distillation", 10), ("alignment", 11), ("instruction_tuning", 11)])
def test_the_demo_without_its_text_has_the_rows_of_pictures_it_had(script, stage, rows):
    free = script.without_language(load_stage(f"demo/{stage}"))
    assert (free.language, free.stop_when_forgetting, free.rows_per_batch) == (None, None, rows)


def test_text_that_shares_a_row_with_pictures_is_refused(script):
    config = load_stage("demo/distillation")
    shared = dataclasses.replace(config, language=dataclasses.replace(config.language, share=0.09))
    with pytest.raises(ValueError, match=r"A share of 0\.09 puts 113 tokens of text into a row of 114"):
        script.without_language(shared)
    with pytest.raises(ValueError, match="has no language block"):
        script.without_language(dataclasses.replace(config, language=None))
