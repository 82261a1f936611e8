"""Several processes do what one does, whole or sharded; an error of one ends all."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import DistributedType
from places import ROOT
from safetensors.torch import load_file

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.language.text_perplexity import TextRetention
from hovle.train import parallel
from hovle.train.config import RetentionConfig, StageConfig, load_stage
from hovle.train.data.batch import PackedBatch
from hovle.train.data.packing import PackedBatches, StreamPosition
from hovle.train.data.readers import load_records
from hovle.train.data.samples import ReplySamples
from hovle.train.model.parameters import select_trainable
from hovle.train.objectives.next_token import NextTokenObjective
from hovle.train.run.checkpoint import load_trainable, load_training_state
from hovle.train.run.handoff import check_handoff
from hovle.train.run.stage import run_stage
from hovle.train.step.optimizer import make_optimizer
from hovle.train.step.train_step import train_step

# peft 0.21.2 asks for `is_gradient_checkpointing`, which transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


WAYS = ["none", "full"] if parallel.can_shard(torch.device("cpu")) else ["none"]
"""How two processes of `two_processes.py` share a model; where torch cannot shard, "sharded" stages are replicated."""

HELD: dict[str, dict] = {
    "tuning": {"trainable": ["holistic_layers", "language_model"]},
    "adapters": {"trainable": ["stem"], "lora": {"rank": 2}},
}
"""What learns in stages that hold the language."""

FLOAT32 = torch.autocast("cpu", enabled=False)


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=290, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, next_token_values, distillation_values) -> Path:
    """Where two processes have left what `two_processes.py` makes them do; read only."""
    folder = tmp_path_factory.mktemp("two")
    for name, values in (("next_token", next_token_values), ("distillation", distillation_values)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**values, "output": str(folder / name)}))
    text = {"source": str(folder / "text.txt"), "around_images": True, "kl_weight": 1.0}
    held = {**next_token_values, "language": text, "output": "", "num_steps": 2, "learning_rate": 0.01}
    for name, learns in HELD.items():
        (folder / f"held-{name}.yaml").write_text(yaml.safe_dump({**held, **learns}))
    (folder / "text.txt").write_text("The lazy dog jumps over the quick brown fox.\n\n" * 120)
    torch.save(one_row_batches(load_stage(str(folder / "next_token.yaml"))), folder / "batches.pt")
    alone = [f"output={folder / 'begun-alone'}", "checkpoint_every=2", "gradient_accumulation_steps=2"]
    run_stage(load_stage(str(folder / "next_token.yaml"), alone)).rename(folder / "begun-alone-straight")
    result = torchrun(str(Path(__file__).with_name("two_processes.py")), str(folder))
    assert result.returncode == 0, result.stderr[-3000:]
    (folder / "stderr.txt").write_text(result.stderr)
    return folder


def one_row_batches(config: StageConfig) -> list[PackedBatch]:
    """Four micro-batches of one row, with different numbers of supervised tokens."""
    assert config.model.checkpoint is not None
    maker = ReplySamples(HoVLEProcessor.from_pretrained(config.model.checkpoint))
    config = dataclasses.replace(config, rows_per_batch=1)
    stream = PackedBatches(load_records(config.data[0]), maker, config, StreamPosition(), 0, 1, pad_token_id=0)
    return list(itertools.islice(stream, 4))


@pytest.fixture
def alone(folder):
    """The objective of the recipe, its micro-batches and configuration on this one process."""
    config = load_stage(str(folder / "next_token.yaml"))
    model = HoVLEForConditionalGeneration.from_pretrained(config.model.checkpoint, dtype=torch.float32)
    select_trainable(model, config)
    return NextTokenObjective(model).train(), torch.load(folder / "batches.pt", weights_only=False), config


def join(batches: list[PackedBatch]) -> PackedBatch:
    """One batch of all rows."""
    names = [name for batch in batches for name in batch.names]
    return PackedBatch(
        input_ids=torch.cat([batch.input_ids for batch in batches]),
        targets=torch.cat([batch.targets for batch in batches]),
        position_ids=torch.cat([batch.position_ids for batch in batches]),
        is_sample=torch.cat([batch.is_sample for batch in batches]),
        pixel_values=torch.cat([batch.pixel_values for batch in batches]),
        names=names,
    )


@pytest.mark.parametrize("sharding", WAYS)
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_two_processes_with_two_micro_batches_each_do_what_one_does_with_one_or_four(
    folder, alone, sharding, num_micro_batches
):
    objective, micro_batches, _ = alone
    assert len({int((batch.targets != -100).sum()) for batch in micro_batches}) > 1  # a mean of means would differ
    if num_micro_batches == 1:
        micro_batches = [join(micro_batches)]
    # Not Adam: it divides by the gradient's size, so where a gradient is all rounding, the step would be too.
    optimizer = torch.optim.SGD([item for item in objective.parameters() if item.requires_grad], lr=0.1)
    expected = [train_step(objective, optimizer, micro_batches, 0.5, FLOAT32) for _ in range(2)]
    for rank in range(2):
        found = torch.load(folder / f"{sharding}-{rank}.pt")
        for measured, step in zip(found["results"], expected, strict=True):
            assert measured["loss"] == pytest.approx(step.loss, rel=1e-6)
            assert measured["terms"] == pytest.approx(step.terms, rel=1e-6)
            assert measured["gradient_norm"] == pytest.approx(step.gradient_norm, rel=1e-5)
        assert set(found["weights"]) == set(objective.model.state_dict())
        for name, tensor in objective.model.state_dict().items():
            torch.testing.assert_close(found["weights"][name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sharding", WAYS)
def test_the_optimizers_state_goes_on_with_another_number_of_processes(folder, alone, sharding):
    objective, micro_batches, config = alone
    saved = torch.load(folder / f"{sharding}-0.pt")
    optimizer = make_optimizer(objective, config)
    load_trainable(objective, saved["before"])
    parallel.load_optimizer_state(objective, optimizer, saved["state"])
    train_step(objective, optimizer, micro_batches, 0.5, FLOAT32)
    found = dict(objective.named_parameters())
    moved = 0.0
    for name, tensor in saved["after"].items():
        torch.testing.assert_close(found[name].detach(), tensor, atol=1e-5, rtol=0)  # worst 2e-7
        moved = max(moved, float((tensor - saved["before"][name]).abs().max()))
    assert moved > 1e-4  # the step did something
    assert set(saved["state"]["state"]) == set(saved["before"])  # nothing for what is frozen


@pytest.mark.parametrize("sharding", WAYS)
def test_a_loss_that_is_not_a_number_on_one_process_stops_all_and_names_its_batch(folder, sharding):
    bad = torch.load(folder / "batches.pt", weights_only=False)[2].names
    for rank in range(2):
        message, same = torch.load(folder / f"nan-{sharding}-{rank}.pt")
        assert message.startswith(f"Loss is nan on the batch of {', '.join(bad)} ({len(bad)} samples); terms: ")
        assert same


def test_an_error_of_one_process_ends_the_others(folder):
    assert (folder / "error-0.txt").read_text() == "StopRunError: Process 1: the disk is mine"
    assert (folder / "error-1.txt").read_text() == "ValueError: the disk is mine"
    said = (folder / "stderr.txt").read_text()  # both write at once, so lines may run into each other
    assert said.count("already holds a run") == 2  # the folder of a finished stage was asked for again


@pytest.mark.parametrize("sharding", WAYS)
def test_two_processes_share_the_held_out_samples_that_one_measures_alone(folder, tmp_path, sharding):
    values = yaml.safe_load((folder / f"held-out-{sharding}" / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, "output": str(tmp_path / "run")}))
    run_stage(load_stage(str(tmp_path / "recipe.yaml"), ["sharding=none"]))
    shared, alone = (
        [entry for entry in read_log(run) if entry.get("event") in ("validation", "image_ablation")]
        for run in (folder / f"held-out-{sharding}", tmp_path / "run")
    )
    assert [entry["event"] for entry in alone] == ["validation", "validation", "image_ablation"]
    assert alone[-1]["num_pictures"] == alone[-1]["num_shuffled"] > 4
    for found, expected in zip(shared, alone, strict=True):
        assert found.pop("event") == expected.pop("event")
        del found["time"], expected["time"]
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_process_that_cannot_draw_its_next_batch_ends_the_other_with_the_reason(folder):
    assert (folder / "lost-0.txt").read_text() == "told"
    assert (folder / "lost-1.txt").read_text() == "raised 'a column is gone'"
    assert "hovle train: Process 1: KeyError: 'a column is gone'" in (folder / "stderr.txt").read_text()
    assert [entry["step"] for entry in read_log(folder / "lost")] == [0, 1, 2]
    assert (folder / "lost" / "checkpoint-000002").is_dir()  # what both had learnt


@pytest.mark.parametrize("name", ["replicated", "sharded"])
def test_a_stage_on_two_processes_resumes_to_the_same_bits(folder, name):
    straight = load_file(folder / f"{name}-straight" / "model.safetensors")
    resumed = load_file(folder / name / "model" / "model.safetensors")
    assert set(resumed) == set(straight)
    for key, tensor in straight.items():
        assert torch.equal(resumed[key], tensor), key
    starts = [entry for entry in read_log(folder / name) if entry.get("event") == "start"]
    assert [(entry["step"], entry["num_processes"]) for entry in starts] == [(0, 2), (2, 2)]


def test_a_sharded_run_goes_on_with_one_process(folder, tmp_path):
    shutil.copytree(folder / "sharded", tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    values = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, "output": str(tmp_path / "run")}))
    recipe = str(tmp_path / "recipe.yaml")
    with pytest.raises(ValueError, match=r"2 micro-batches in a step, this one has 1 .* so that the product is 2"):
        run_stage(load_stage(recipe), resume=True)
    run_stage(load_stage(recipe, ["gradient_accumulation_steps=2"]), resume=True)
    *_, found, again = [entry for entry in read_log(tmp_path / "run") if "loss" in entry]
    *_, before, last = [entry for entry in read_log(folder / "sharded") if "loss" in entry]
    assert (found["step"], again["step"]) == (before["step"], last["step"]) == (3, 4)
    for one, two in ((found, before), (again, last)):
        assert one["loss"] == pytest.approx(two["loss"], abs=2e-3)  # sums of bfloat16 products in another order
        assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=0.02)


def assert_resumed_as_straight(run: Path, straight: Path, num_processes: tuple[int, int]) -> None:
    """The last two steps, done again from a checkpoint with samples that wait in the window, say the same."""
    shards = load_training_state(run / "checkpoint-000002")["position"]["shards"]
    assert [len(shard["pending"]) > 0 for shard in shards.values()] == [True, True]
    log = read_log(run)
    starts = [entry["num_processes"] for entry in log if entry.get("event") == "start"]
    assert (starts[0], starts[-1]) == num_processes
    *_, third, fourth, third_again, fourth_again = [entry for entry in log if "loss" in entry]
    for found, expected in ((third_again, third), (fourth_again, fourth)):
        for name in ("step", "loss", "gradient_norm", "samples_drawn"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5)
    before = load_file(straight / "model.safetensors")
    for name, tensor in load_file(run / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, before[name], atol=1e-5, rtol=0)


def test_a_run_of_one_process_goes_on_with_two(folder):
    assert_resumed_as_straight(folder / "begun-alone", folder / "begun-alone-straight", (1, 2))


def test_a_run_of_two_processes_goes_on_with_one(folder, tmp_path):
    shutil.copytree(folder / "replicated", tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    changes = ["checkpoint_every=2", "gradient_accumulation_steps=2", f"output={tmp_path / 'run'}"]
    run_stage(load_stage(str(folder / "distillation.yaml"), changes), resume=True)
    assert_resumed_as_straight(tmp_path / "run", folder / "replicated-straight", (2, 1))


def test_a_sharded_stage_leaves_models_that_load(folder, checkpoints):
    start = load_file(Path(checkpoints["tied"]) / "model.safetensors")
    for place in ("sharded/checkpoint-000002", "sharded/best", "sharded/model"):
        model = HoVLEForConditionalGeneration.from_pretrained(folder / place)
        HoVLEProcessor.from_pretrained(folder / place)
        saved = load_file(folder / place / "model.safetensors")
        assert set(saved) == set(start)
        changed = {key.split(".")[3] for key in saved if ".layers." in key and not torch.equal(saved[key], start[key])}
        assert changed == {"2", "3"}  # the language model's; the holistic layers were frozen
        assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in saved.items())
    assert check_handoff(model, folder / "sharded" / "model") == pytest.approx(0, abs=1e-6)


def test_text_perplexity_is_measured_in_pieces_too(folder, language_models):
    entries = [entry for entry in read_log(folder / "sharded") if entry.get("event") == "text_retention"]
    assert [entry["step"] for entry in entries] == [0, 4, 2, 4]
    model = HoVLEForConditionalGeneration.from_pretrained(folder / "sharded" / "model", dtype=torch.float32)
    processor = HoVLEProcessor.from_pretrained(folder / "sharded" / "model")
    retention = TextRetention(RetentionConfig(num_tokens=64, window=32), processor)
    with torch.autocast("cpu", torch.bfloat16):
        expected = retention.perplexity(model, FLOAT32)
    assert entries[1]["text_perplexity"] == entries[3]["text_perplexity"] == pytest.approx(expected, rel=1e-3)
    assert abs(entries[0]["text_perplexity"] / expected - 1) > 3e-3


def test_adapters_that_were_trained_in_pieces_are_saved_alone_and_merged(folder, checkpoints):
    from peft import PeftModel

    start = HoVLEForConditionalGeneration.from_pretrained(checkpoints["tied"], dtype=torch.float32)
    folded = PeftModel.from_pretrained(start, folder / "lora" / "adapter").merge_and_unload().state_dict()
    for name, tensor in load_file(folder / "lora" / "model" / "model.safetensors").items():
        torch.testing.assert_close(folded[name], tensor, atol=1e-6, rtol=0)
    original = load_file(Path(checkpoints["tied"]) / "model.safetensors")
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    assert (folded[name] - original[name]).abs().max() > 1e-5


@pytest.mark.parametrize("learns", HELD)
def test_the_language_is_held_on_two_processes_as_on_one(folder, tmp_path, learns):
    alone = [f"output={tmp_path / 'alone'}", "gradient_accumulation_steps=2"]
    run_stage(load_stage(str(folder / f"held-{learns}.yaml"), alone))
    found, expected = (
        [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        for output in (folder / f"held-{learns}", tmp_path / "alone")
    )
    for entry, reference in zip(found, expected, strict=True):
        for term in ("language_kl", "prompt_kl", "cross_entropy", "gradient_norm", "perplexity_ratio"):
            assert (term in entry) == (term in reference)
            assert entry.get(term, 0) == pytest.approx(reference.get(term, 0), rel=1e-3), term


def test_a_torch_that_cannot_shard_here_says_so(alone, monkeypatch):
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    processes = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"sharding: full does not work on cpu processes with torch .* newer torch"):
        parallel.wrap_data_parallel(alone[0], "full", processes)


def test_a_launcher_that_wants_to_shard_by_itself_is_refused(monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=r"configured for FSDP, but the recipe decides .* `sharding: full`"):
        parallel.make_accelerator()


@pytest.mark.slow
def test_the_module_runs_under_torchrun(next_token_config, tmp_path):
    next_token_config()
    result = torchrun("-m", "hovle.train", str(tmp_path / "next_token.yaml"), "num_steps=2")
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert len(yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())) > 10


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
