"""`hovle plan`: what it predicts, assumes, refuses and prints."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers.configuration_utils import PreTrainedConfig

from hovle.cli import main
from hovle.train.config import load_stage
from hovle.train.monitor.estimate import is_planned
from hovle.train.plan.command import check_stages, plan_stage, read_stages
from hovle.train.plan.cost import StageCost, Workload
from hovle.train.plan.devices import GPUS, choose_device
from hovle.train.plan.shapes import language_model_config, model_config
from hovle.train.run.stage import run_stage

EXPECTED = "expected={tiles_per_sample: 1, text_tokens_per_sample: 20, supervised_tokens_per_sample: 9}"
PAPER = ["hovle-2.6b/distillation", "hovle-2.6b/alignment", "hovle-2.6b/instruction_tuning"]


@pytest.fixture
def recipe(next_token_config, tmp_path) -> str:
    next_token_config()
    return str(tmp_path / "next_token.yaml")


# --- the paper's run -------------------------------------------------------------------------------------------------


def paper_stage(number: int, *overrides: str):
    *_, (_, stage, model) = read_stages([*PAPER[: number + 1], *overrides])
    return stage, model


def total_flops(number: int, *overrides: str) -> dict[str, float]:
    stage, model = paper_stage(number, *overrides)
    plan = plan_stage("", stage, model, GPUS["A100-80G"], count=64)
    return {name: count * plan.micro_batches * plan.count * plan.num_steps for name, count in plan.flops.items()}


def test_the_papers_model_has_the_papers_parameters():
    stage, model = paper_stage(1)
    cost = StageCost(stage, model, torch.bfloat16)
    # The released 2,606 M hold the language model's own input table (190 M), which nothing reads, and a class slot.
    assert cost.num_parameters + 92553 * 2048 == pytest.approx(2_606_327_808, rel=1e-4)
    assert cost.num_trainable == pytest.approx(717e6, rel=0.002)


def test_distillation_of_the_paper_costs_what_arithmetic_says():
    expected = "expected={text_tokens_per_sample: 20, filled_ratio: 1}"
    flops = total_flops(0, "language=null", "rows_per_batch=8", expected, "row_length=1504")
    # 500 M x (teacher 0.73 + 256 picture tokens 0.77 + random text 0 to 0.4 TFLOP); attention, stem come on top.
    assert 7.5e20 < flops["teacher"] + flops["holistic layers"] < 9.5e20
    assert flops["teacher"] == pytest.approx(500e6 * 0.73e12, rel=0.05)
    assert flops["holistic attention"] + flops["stem"] < 0.15 * sum(flops.values())


def test_alignment_of_the_paper_costs_what_arithmetic_says():
    flops = total_flops(1, "language=null")
    # 50 M samples of 0.6 K tokens, 6 N D in the holistic layers and 4 N D in the frozen language model.
    assert flops["holistic layers"] + flops["language model"] + flops["head"] == pytest.approx(2.9e20, rel=0.1)
    # Rows of 4,096 tokens are attended to as a whole, whatever documents they hold.
    assert flops["language model attention"] < 0.25 * sum(flops.values())


def test_instruction_tuning_of_the_paper_costs_what_arithmetic_says():
    flops = total_flops(2, "language=null", "gradient_accumulation_steps=32")
    # 5 M samples of 2 K tokens, 6 N D with N = 2.2e9 throughout.
    assert flops["holistic layers"] + flops["language model"] + flops["head"] == pytest.approx(1.3e20, rel=0.1)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_papers_stages_fit_their_gpus_and_keep_its_batch(number):
    stage, model = paper_stage(number)
    plan = plan_stage("", stage, model, GPUS["A100-80G"], count=64)
    assert plan.peak_gib < 80
    assert plan.samples_per_step == pytest.approx(4096, rel=0.05)
    published = {0: 500e6, 1: 50e6, 2: 5e6}[number]
    assert plan.samples_per_step * plan.num_steps == pytest.approx(published, rel=0.01)


def test_small_recipes_fit_their_gpus():
    for folder, gpu in (("smollm2-360m", "RTX-4090-24G"), ("smollm2-1.7b", "A100-80G")):
        for name, stage, model in read_stages([f"{folder}/{Path(paper).name}" for paper in PAPER]):
            plan = plan_stage(name, stage, model, GPUS[gpu])
            assert plan.peak_gib < GPUS[gpu].memory_gib, name


def test_the_recipe_for_photographs_takes_an_h100_at_most_fifty_hours():
    stages = read_stages([f"smollm2-360m-photographs/{Path(paper).name}" for paper in PAPER])
    plans = [plan_stage(name, stage, model, GPUS["H100-80G"]) for name, stage, model in stages]
    assert all(plan.peak_gib < 80 for plan in plans)
    assert 40 < sum(plan.hours for plan in plans) <= 50


# --- assumptions and advice ------------------------------------------------------------------------------------------


def test_hours_and_cost_follow_the_assumptions(next_token_config):
    config = next_token_config(EXPECTED)
    model = model_config(config)
    plans = [
        plan_stage("", config, model, choose_device("A100-80G", torch.bfloat16, mfu, price), count)
        for mfu, price, count in ((0.2, 1.0, 1), (0.4, 3.0, 8))
    ]
    # Not quite twice as fast: reading and writing the optimizer's state stays.
    assert 13 < plans[1].tokens_per_second / plans[0].tokens_per_second < 16
    assert 1.7 < plans[0].hours / plans[1].hours < 2
    assert plans[1].dollars / plans[1].hours == pytest.approx(24 * plans[0].dollars / plans[0].hours)
    assert plans[1].samples_per_step == 8 * plans[0].samples_per_step


def test_the_rows_suggested_fit_and_one_more_does_not(next_token_config):
    config = next_token_config(EXPECTED)
    model, device = model_config(config), choose_device("L4-24G", torch.bfloat16)
    device = type(device)(**{**vars(device), "memory_gib": device.process_gib + 0.2})
    rows = plan_stage("", config, model, device).largest_rows_per_batch
    cost, work = StageCost(config, model, torch.float32), Workload.expected(config, model)
    assert 0 < rows < 1024
    held = [cost.memory(work.with_rows(number)).peak * 1.05 / 2**30 for number in (rows, rows + 1)]
    assert held[0] <= 0.2 < held[1]


def test_what_does_not_fit_is_said_with_advice(capsys):
    assert main(["plan", "hovle-2.6b/instruction_tuning", "--gpu", "RTX-4090-24G"]) == 0
    printed = capsys.readouterr().out
    assert "DOES NOT FIT into 24 GiB: try activation_checkpointing, sharding, shorter rows or lora" in printed


def test_a_checkpoint_to_come_has_the_shapes_of_the_recipe_that_writes_it(recipe, next_token_config, tmp_path):
    values = yaml.safe_load(Path(recipe).read_text())
    later = {**values, "model": {"checkpoint": f"{values['output']}/model"}, "output": "runs/later"}
    path = tmp_path / "other" / "later.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(later))
    with pytest.raises(ValueError, match=r"No model in .*: expected a folder .* Name the recipe that writes it"):
        read_stages([str(path)])
    (_, _, first), (_, _, second) = read_stages([recipe, str(path)])
    assert first.to_dict() == second.to_dict()
    (path.parent / "first.yaml").write_text(Path(recipe).read_text())
    (path.parent / "notes.yaml").write_text("no: recipe")
    [(_, _, found)] = read_stages([str(path), "learning_rate=1e-5", "objective={name: next_token}"])  # beside it
    assert found.to_dict() == first.to_dict()


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    """Each question waits for half a minute where there is no network."""
    asked = []

    def ask(name, **_):
        asked.append(name)
        raise OSError("We couldn't connect") from LocalEntryNotFoundError("no network")

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", ask)
    with pytest.raises(ValueError, match=r"the Hub gave none \(no/such-model cannot be loaded: We couldn't connect\)"):
        language_model_config("no/such-model")
    assert asked == ["no/such-model"]


def test_an_unknown_language_model_is_refused_with_what_is_known(offline):
    with pytest.raises(ValueError, match=r"No config of the language model 'no/such-model'.*SmolLM2-360M"):
        language_model_config("no/such-model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "A1000"], "Unknown GPU 'A1000'; known: B200"),
        (["--mfu", "40"], "--mfu is a share of the peak"),
        (["--count", "0"], "--count must be at least 1"),
        (["dtype=float32"], "rates of bfloat16 only"),
    ],
)
def test_mistakes_are_told_in_one_line(recipe, capsys, arguments, message):
    dtype = [] if "dtype=float32" in arguments else ["dtype=auto"]
    assert main(["plan", recipe, EXPECTED, *dtype, *arguments]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("hovle plan: ")
    assert message in line


# --- output ----------------------------------------------------------------------------------------------------------


def test_json_holds_what_the_table_shows(recipe, capsys):
    assert main(["plan", recipe, EXPECTED, "dtype=auto", "--gpu", "L4-24G", "--json"]) == 0
    [plan] = json.loads(capsys.readouterr().out)
    assert main(["plan", recipe, EXPECTED, "dtype=auto", "--gpu", "L4-24G"]) == 0
    printed = capsys.readouterr().out
    assert "assumed: 40% of the peak reached (--mfu), $0.60 per hour" in printed
    [shown] = [line.split() for line in printed.splitlines() if line.startswith(plan["name"])][:1]
    expected = {
        "peak_gib": ".1f",
        "largest_rows_per_batch": "",
        "samples_per_step": ",.0f",
        "num_steps": ",",
        "tokens_per_second": ",.0f",
        "total_flops": ".2e",
        "hours": ",.1f",
    }
    assert [name for name, form in expected.items() if format(plan[name], form) not in shown] == []


def test_this_machine_is_measured_first(recipe, capsys):
    assert main(["plan", recipe, EXPECTED, "--gpu", "cpu", "--json"]) == 0
    [plan] = json.loads(capsys.readouterr().out)
    assert plan["tokens_per_second"] > 1
    assert plan["dollars"] == 0


def test_help_lists_every_gpu(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in GPUS)


def test_check_prints_prediction_beside_measurement_of_a_real_process(recipe, capsys):
    assert main(["plan", recipe, EXPECTED, "--check", "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)
    assert abs(result["errors"]["flops"]) < 0.05
    assert abs(result["errors"]["peak_bytes"]) < 0.15
    assert result["measured"]["peak_bytes"] > result["measured"]["process_bytes"] > 100 * 2**20


def test_a_prediction_far_off_fails_the_check(recipe, capsys, monkeypatch):
    result = {"predicted": {"flops": 2e12, "peak_bytes": 1}, "measured": {"flops": 1e12, "peak_bytes": 1}}
    monkeypatch.setattr(
        "hovle.train.plan.command.check_stage",
        lambda config, model: {**result, "dtype": "float32", "errors": {"flops": 1.0, "peak_bytes": 0.0}},
    )
    assert check_stages([("x", load_stage(recipe), None)]) == 1
    assert "2.000     1.000  2.000" in capsys.readouterr().out


def test_a_run_predicts_nothing_where_the_plan_does_not_know_the_teacher(next_token_config, distillation_config):
    assert is_planned(next_token_config())
    assert is_planned(distillation_config("teacher.cache=features"))
    assert not is_planned(distillation_config("teacher.kind=open_clip"))


def test_a_run_with_checkpointed_layers_predicts_that_they_run_again(next_token_config, tmp_path):
    flops = []
    for number, change in enumerate(([], ["activation_checkpointing=true"])):
        config = next_token_config("num_steps=1", f"output={tmp_path / str(number)}", *change)
        run_stage(config)
        first = json.loads((tmp_path / str(number) / "log.jsonl").read_text().splitlines()[0])
        flops.append(first["predicted"]["flops_per_step"])
    assert 1.1 < flops[1] / flops[0] < 4 / 3


def test_sharding_lets_a_plan_fit_more_rows(next_token_config):
    whole = ("dtype=auto", "trainable=[stem, holistic_layers, language_model]")
    config, sharded = next_token_config(EXPECTED, *whole), next_token_config(EXPECTED, *whole, "sharding=full")
    model, device = model_config(config), GPUS["L4-24G"]
    alone, shared = (plan_stage("", stage, model, device, count=8) for stage in (config, sharded))
    assert shared.memory.joined > 0 == alone.memory.joined
    assert shared.tokens_per_second > alone.tokens_per_second  # each changes an eighth of the weights
    large = [
        plan_stage("", *paper_stage(2, *change), GPUS["A100-80G"], count=64) for change in ([], ["sharding=full"])
    ]
    assert large[1].largest_rows_per_batch > large[0].largest_rows_per_batch > 0
