"""Save and resume: a checkpoint is a `from_pretrained` folder plus the state of the optimizer and the data."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from ...errors import StopRunError
from ...files.atomic import remove_folder, write_folder
from ..config import StageConfig, with_new_fields
from ..parallel import full_tensor

TRAINING_STATE = "training_state.pt"


RESUMABLE_CHANGES = (
    "output",
    "num_workers",
    "log_every",
    "checkpoint_every",
    "max_skip_fraction",
    "validate_every",
    "image_ablation",
    "min_picture_gap",
    "stop_when_images_ignored",
    "stop_when_forgetting",
    "tracking",
    "expected",
    "keep_last",
    "keep_best",
    "save_dtype",
    "patience",
    "sharding",
    "activation_checkpointing",
    "gradient_accumulation_steps",
)
"""Fields a resumed run may change: they move no number, or rounding only (sharding). The last one goes with the number
of processes; their product must stay (`stage.load_state`)."""


class SaveError(StopRunError):
    """A checkpoint could not be written; the message names the one to continue from."""


def save_checkpoint(
    output: Path,
    step: int,
    save: Callable[[Path], None],
    state: dict,
    keep_last: int = 1,
    best_step: int | None = None,
) -> None:
    """Write `checkpoint-STEP`, and drop all but the newest and the best once it is complete.

    Args:
        output: Run folder.
        step: Finished steps.
        save: Writes the model's files into a folder.
        state: What `load_training_state` shall give back.
        keep_last: Newest checkpoints that stay.
        best_step: Step of the checkpoint that the link `best` names, and that stays too.

    Raises:
        SaveError: When it cannot be written, for instance on a full disk, or older ones cannot be dropped.
    """

    def fill(temporary: Path) -> None:
        save(temporary)
        torch.save(state, temporary / TRAINING_STATE)

    try:
        write_folder(checkpoint_folder(output, step), fill)
    except (OSError, RuntimeError, SafetensorError) as error:  # safetensors and torch have errors of their own
        newest = find_checkpoint(output)
        advice = "There is no earlier one." if newest is None else f"{newest} is complete: continue it with --resume."
        raise SaveError(f"Checkpoint of step {step} could not be written ({error}). {advice}") from error
    try:
        _drop_older(output, keep_last, best_step)
    except OSError as error:
        raise SaveError(
            f"Checkpoint of step {step} is complete, but the link to the best one or the removal of older ones failed "
            f"({error}). Put {output} right and continue with --resume."
        ) from error


def _drop_older(output: Path, keep_last: int, best_step: int | None) -> None:
    kept = sorted_checkpoints(output)[-keep_last:]
    if best_step is not None:
        link_best(output, best_step)
        kept.append(checkpoint_folder(output, best_step))
    for folder in sorted_checkpoints(output):
        if folder not in kept:
            remove_folder(folder)


def checkpoint_folder(output: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return output / f"checkpoint-{step:06d}"


def link_best(output: Path, step: int) -> None:
    """Let the link `best` name a checkpoint, without a moment at which it names none."""
    link = output / ".best.writing"
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint_folder(output, step).name, target_is_directory=True)
    os.replace(link, output / "best")


def sorted_checkpoints(output: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))


def find_checkpoint(output: Path) -> Path | None:
    """Newest checkpoint of a run, or None."""
    return next(reversed(sorted_checkpoints(output)), None)


def load_training_state(checkpoint: Path) -> dict:
    """Read optimizer, random and data state; tensors and plain values only, no object of any other class.

    Tensors are mapped, not read: processes that all do so share the pages they look at, and none holds a copy.
    """
    return torch.load(checkpoint / TRAINING_STATE, map_location="cpu", weights_only=True, mmap=True)


def changed_fields(old: dict, new: dict) -> list[str]:
    """Fields in which two recipes would train differently; a field that the old one lacks had its default."""
    old, new = _without_revisions(with_new_fields(old)), _without_revisions(new)
    if new["num_epochs"] and not new["num_steps"]:  # not counted yet; they follow from what else is compared
        new = {**new, "num_steps": old.get("num_steps")}
    return [key for key in new if key not in RESUMABLE_CHANGES and old.get(key) != new[key]]


def _without_revisions(recipe: dict) -> dict:
    """A recipe without the commits of its data, which the fingerprint of the data holds."""
    given = recipe.get("data") or []
    sources = [given] if isinstance(given, dict) else given
    return {
        **recipe,
        "data": [{key: value for key, value in source.items() if key != "revision"} for source in sources],
    }


def check_same_recipe(config: StageConfig, old: dict) -> None:
    """Refuse to resume a run whose recipe changed, naming what differs."""
    new = config.to_dict()
    changed = changed_fields(old, new)
    if changed:
        details = "; ".join(f"{key}: {old.get(key)!r} -> {new[key]!r}" for key in changed)
        raise ValueError(
            f"Cannot resume: the recipe changed ({details}). Restore it, or start in a new output folder."
        )


def check_same_run(config: StageConfig, state: dict, data_fingerprint: str) -> None:
    """Refuse to resume a run whose recipe or data changed."""
    check_same_recipe(config, state["config"])
    if state["data_fingerprint"] != data_fingerprint:
        raise ValueError(
            f"Cannot resume: the data changed (fingerprint {state['data_fingerprint']} -> {data_fingerprint}). "
            "Restore names and contents of its files (their place and times do not matter); for a Hub id, set its "
            "`revision` to the commit after the @."
        )


def trainable_state(objective: nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """Every parameter that learns, whole, the training-only projection and adapters included (all ranks).

    All processes of a sharded objective take part; those that do not `keep` the result get none.
    """
    state = {}
    for name, item in objective.named_parameters():
        if item.requires_grad:
            tensor = full_tensor(item.detach())
            if keep:
                state[name] = tensor.cpu()
    return state


@torch.no_grad()
def load_trainable(objective: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put saved trainable parameters back; names must match one to one."""
    parameters = {name: item for name, item in objective.named_parameters() if item.requires_grad}
    if set(parameters) != set(state):
        difference = sorted(set(parameters) ^ set(state))
        raise ValueError(f"The checkpoint's trainable parameters differ from the recipe's: {difference[:5]}.")
    for name, parameter in parameters.items():
        parameter.copy_(state[name])
