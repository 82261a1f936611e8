"""`dev/train_smol.py`: which settings a stage gets, and how long its steps take."""

import importlib.util
import json
import sys
from types import ModuleType

import pytest
from places import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module, with the one beside it that it imports."""
    sys.path.insert(0, str(ROOT / "dev"))
    try:
        spec = importlib.util.spec_from_file_location("train_smol", ROOT / "dev" / "train_smol.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "dev"))
    return module


def test_a_stage_gets_the_settings_of_all_and_its_own(script):
    given = ["rows_per_batch=32", "distillation:teacher.0.cache=null", "alignment:seed=2", "output=c:/runs"]
    assert script.overrides_of("distillation", given) == [
        "rows_per_batch=32",
        "teacher.0.cache=null",
        "output=c:/runs",
    ]
    assert script.overrides_of("alignment", given) == ["rows_per_batch=32", "seed=2", "output=c:/runs"]
    with pytest.raises(ValueError, match="there is no stage 'align'; there are letters, lines, distillation"):
        script.overrides_of("distillation", ["align:seed=2"])


def test_steps_are_timed_without_those_that_compile(script, tmp_path):
    taken = [30.0, 30.0, 1.0, 2.0, 2.0]
    entries = [{"event": "start"}, *({"step": step, "elapsed_seconds": item} for step, item in enumerate(taken, 1))]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert script.step_seconds(tmp_path / "log.jsonl") == 2.0
