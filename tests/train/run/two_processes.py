"""What two processes do; `test_parallel.py` launches this under torchrun and compares it with one process."""

import contextlib
import copy
import itertools
import os
import sys
from pathlib import Path

import torch

from hovle import HoVLEForConditionalGeneration
from hovle.cli import main
from hovle.errors import StopRunError
from hovle.train import parallel
from hovle.train.config import load_stage
from hovle.train.data.packing import Shard
from hovle.train.model.adapters import merged_state_dict
from hovle.train.model.parameters import select_trainable
from hovle.train.objectives.next_token import NextTokenObjective
from hovle.train.run.checkpoint import trainable_state
from hovle.train.step.optimizer import make_optimizer
from hovle.train.step.train_step import NonFiniteLossError, train_step

FLOAT32: contextlib.AbstractContextManager = contextlib.nullcontext()


def step(objective, optimizer, micro_batches, accelerator):
    """One optimizer step as the loop does it."""
    return train_step(
        objective,
        optimizer,
        micro_batches,
        0.5,
        FLOAT32,
        reduce_sum=lambda tensor: accelerator.reduce(tensor, "sum"),
        num_processes=2,
    )


def make(recipe: str, sharding: str, accelerator):
    """An objective spread over both processes, inside and outside its wrapper."""
    config = load_stage(recipe)
    model = HoVLEForConditionalGeneration.from_pretrained(config.model.checkpoint, dtype=torch.float32)
    select_trainable(model, config)
    objective = NextTokenObjective(model).train()
    return objective, parallel.wrap_data_parallel(objective, sharding, accelerator), config


def take_steps(folder: Path, recipe: str, sharding: str, accelerator) -> None:
    """Two steps of two micro-batches each; then Adam's state, and one more step with it."""
    micro_batches = torch.load(folder / "batches.pt", weights_only=False)[2 * accelerator.process_index :][:2]
    objective, wrapped, config = make(recipe, sharding, accelerator)
    sgd = torch.optim.SGD([item for item in objective.parameters() if item.requires_grad], lr=0.1)
    results = [vars(step(wrapped, sgd, micro_batches, accelerator)) for _ in range(2)]
    weights = copy.deepcopy(merged_state_dict(objective.model))  # on a CPU the next steps would change them
    adam = make_optimizer(objective, config)
    step(wrapped, adam, micro_batches, accelerator)
    before, state = copy.deepcopy((trainable_state(objective), parallel.optimizer_state(objective, adam)))
    step(wrapped, adam, micro_batches, accelerator)
    found = {"results": results, "weights": weights, "before": before, "state": state}
    torch.save({**found, "after": trainable_state(objective)}, folder / f"{sharding}-{accelerator.process_index}.pt")


def meet_nan(folder: Path, recipe: str, sharding: str, accelerator) -> None:
    """One process meets a picture that is not a number; both must stop, with their weights untouched."""
    rank = accelerator.process_index
    micro_batches = torch.load(folder / "batches.pt", weights_only=False)[2 * rank :][:2]
    objective, wrapped, config = make(recipe, sharding, accelerator)
    if rank == 1:
        bad = micro_batches[0].pixel_values
        objective.normalize.register_forward_hook(
            lambda module, inputs, pixels: pixels * float("nan") if inputs[0].equal(bad) else pixels
        )
    optimizer = make_optimizer(objective, config)
    before = copy.deepcopy(trainable_state(objective))
    try:
        step(wrapped, optimizer, micro_batches, accelerator)
    except NonFiniteLossError as error:
        same = all(torch.equal(item, before[name]) for name, item in trainable_state(objective).items())
        torch.save((str(error), same), folder / f"nan-{sharding}-{rank}.pt")


def meet_an_error(folder: Path, accelerator) -> None:
    """One process is refused something; the other must not wait for it."""
    rank = accelerator.process_index
    try:
        with parallel.fail_on_all_ranks():
            if rank == 1:
                raise ValueError("the disk is mine")
    except (ValueError, StopRunError) as error:
        (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def lose_data(folder: Path, accelerator) -> None:
    """A stage in which one process cannot draw its third batch; the other must not wait for it."""
    draw, drawn = Shard.next_rows, itertools.count(1)

    def next_rows(shard):
        if accelerator.process_index == 1 and next(drawn) == 3:
            raise KeyError("a column is gone")
        return draw(shard)

    Shard.next_rows = next_rows
    try:
        assert main(["train", str(folder / "next_token.yaml"), f"output={folder / 'lost'}"]) == 1
        told = "told"
    except KeyError as error:
        told = f"raised {error}"
    Shard.next_rows = draw
    (folder / f"lost-{accelerator.process_index}.txt").write_text(told)


def run_stages(folder: Path, accelerator) -> None:
    """Whole stages: distillation on replicas straight and resumed, alignment on shards straight and resumed, LoRA."""
    next_token, distillation = str(folder / "next_token.yaml"), str(folder / "distillation.yaml")
    sharding = "full" if parallel.can_shard(accelerator.device) else "none"
    sharded = [f"sharding={sharding}", "dtype=bfloat16", "activation_checkpointing=true"]
    source = load_stage(next_token).data[0].path
    validation = [
        "validation.source=chat",
        f"validation.path={source}",
        "num_validation_batches=1",
        "validate_every=3",
    ]
    bare = load_stage(distillation).model.language_model
    retention = [f"retention={{num_tokens: 64, window: 32, language_model: {bare}}}"]
    for name, arguments in {
        "replicated": [distillation, "num_workers=1"],
        "sharded": [
            next_token,
            *sharded,
            *validation,
            *retention,
            "trainable=[stem, language_model]",
            "keep_best=true",
        ],
    }.items():
        arguments += [f"output={folder / name}", "checkpoint_every=2"]
        assert main(["train", *arguments]) == 0
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            os.rename(folder / name / "model", folder / f"{name}-straight")
        accelerator.wait_for_everyone()
        assert main(["train", *arguments, "--resume"]) == 0
    # What one process with two micro-batches in a step has begun goes on here.
    begun = ["checkpoint_every=2", f"output={folder / 'begun-alone'}", "--resume"]
    assert main(["train", next_token, *begun]) == 0
    # Three held-out batches: one process has one more than the other. One way only where torch cannot shard.
    for name in dict.fromkeys(("none", sharding)):
        arguments = [*validation, "num_validation_batches=3", "rows_per_batch=1", "validate_every=0"]
        arguments += [
            "num_steps=1",
            "learning_rate=1e-20",
            f"sharding={name}",
            f"output={folder / f'held-out-{name}'}",
        ]
        assert main(["train", next_token, *arguments]) == 0
    # A language model that learns, held to a copy of its start, and one with adapters.
    for recipe in sorted(folder.glob("held-*.yaml")):
        assert main(["train", str(recipe), f"sharding={sharding}", f"output={folder / recipe.stem}"]) == 0
    assert main(["train", next_token, *sharded, "lora.rank=4", "trainable=[]", f"output={folder / 'lora'}"]) == 0
    # The main process refuses an occupied folder; the other hears of it.
    assert main(["train", next_token, f"output={folder / 'lora'}"]) == 1


if __name__ == "__main__":
    place = Path(sys.argv[1])
    processes = parallel.make_accelerator()
    assert processes.num_processes == 2
    for way in ("none", "full") if parallel.can_shard(processes.device) else ("none",):
        take_steps(place, str(place / "next_token.yaml"), way, processes)
        meet_nan(place, str(place / "next_token.yaml"), way, processes)
    meet_an_error(place, processes)
    lose_data(place, processes)
    run_stages(place, processes)
    torch.distributed.destroy_process_group()
