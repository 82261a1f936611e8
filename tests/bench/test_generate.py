"""`hovle bench generate`: all parts with the smallest models; the figures themselves say nothing here."""

import functools
import json

import pytest
import torch
import torch._dynamo

from hovle import cli
from hovle.bench.generate_measure import costs
from hovle.bench.generate_models import FAMILIES, build, expected_costs, prompt
from hovle.inference import compiled

SHORT = ["--family", "tiny", "--words", "6", "--new-tokens", "3", "--rounds", "1", "--bandwidth-bytes", "4096"]


def test_every_part_is_measured_and_tokens_stand_beside_speeds(tmp_path, capsys, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(compiled, "compiler_problem", lambda _device: None)
    out = tmp_path / "speed" / "generate.json"
    assert cli.main(["bench", "generate", *SHORT, "--compile", "--device", "cpu", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    printed = capsys.readouterr()
    assert result == json.loads(printed.out)
    rows = result["rows"]
    assert {row["part"] for row in rows} == {"prompts", "costs", "question", "long", "int8", "pictures"}
    timed = [row for row in rows if row["part"] == "prompts"]
    assert {row["model"] for row in timed if not row["compiled"]} == {"base", "hd", "internvl2"}
    assert {row["model"] for row in timed if row["compiled"]} == {"base", "hd", "internvl2"}
    assert all(len(row["tokens"]) == row["rows"] and len(row["tokens"][0]) == 3 for row in timed)
    checked = [row for row in rows if "same_tokens" in row]
    assert len(checked) == 6 + 3
    assert all(row["same_tokens"] for row in checked)
    assert result["environment"]["dtype"] == "float32"
    assert "bandwidth_ratio" in printed.err
    assert "56 px, 3 tiles, 2 rows, compiled: 100%" in printed.err


@pytest.mark.parametrize("name", ["base", "hd"])
def test_flops_and_cache_are_those_of_the_cost_model(name):
    model = build(FAMILIES["tiny"][name], 1.0, torch.device("cpu"), torch.float32)
    found = costs(model, prompt(model, FAMILIES["tiny"][name], 3, 56, 20))
    expected = expected_costs(model, 3, 56, 20)
    assert found["kv_bytes"] == expected["kv_bytes"]
    assert found["flops"] == pytest.approx(expected["flops"], rel=0.02)


def test_shapes_are_the_released_ones():
    with torch.device("meta"):
        sizes = {
            name: variant.build(1.0).num_parameters()
            for family in ("released", "smol")
            for name, variant in FAMILIES[family].items()
            if name != "base" or family == "released"
        }
    # HoVLE: of the 2.606 billion of the checkpoint, one of two tables; InternVL2-2B 2.206, SmolVLM-256M 0.256.
    expected = {"base": 2.417e9, "hd": 2.417e9, "internvl2": 2.206e9, "smolvlm": 0.256e9}
    assert sizes == pytest.approx(expected, rel=0.002)


def test_a_share_that_is_none_is_refused(capsys):
    assert cli.main(["bench", "generate", *SHORT, "--layers", "2"]) == 1
    assert "--layers above 0" in capsys.readouterr().err
