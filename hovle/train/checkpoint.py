"""Save and resume: a checkpoint is a `from_pretrained` folder plus the state of the optimizer and the data.

Everything is written to a temporary folder beside its place and renamed, so what exists is complete.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..durable import remove_folder, write_folder
from ..errors import StopRunError
from ..modeling_hovle import HoVLEForConditionalGeneration
from .config import StageConfig, with_new_fields
from .parallel import whole
from .pixels import PixelNormalization

TRAINING_STATE = "training_state.pt"
HANDOFF_PROBE = "handoff_probe.safetensors"

RESUMABLE_CHANGES = (
    "output",
    "num_workers",
    "log_every",
    "checkpoint_every",
    "max_skip_fraction",
    "validate_every",
    "blind_check",
    "min_picture_gap",
    "stop_when_blind",
    "tracking",
    "expected",
    "keep_last",
    "keep_best",
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


@torch.no_grad()
def make_probe(
    model: HoVLEForConditionalGeneration, batch: dict, normalize: PixelNormalization
) -> dict[str, torch.Tensor]:
    """Record what a trained model says of the start of a batch, for the next stage to compare itself with.

    Args:
        model: In float32.
        batch: A packed batch on the CPU.
        normalize: What makes its tiles the model's pixels.

    Returns:
        What the model receives of the batch's first row without its padding, with `logits` in float32 and without a
        compiler: behind the last picture, where pictures show, and at the end.
    """
    length = int(batch["is_sample"][0].sum())
    input_ids = batch["input_ids"][:1, :length].clone()
    tokens_per_tile = model.config.tokens_per_tile(batch["pixel_values"].shape[-1])
    num_tiles = int((input_ids == model.config.image_token_id).sum()) // tokens_per_tile
    probe = {
        "input_ids": input_ids,
        "position_ids": batch["position_ids"][:1, :length].clone(),
        "pixel_values": normalize(batch["pixel_values"][:num_tiles]).contiguous(),
    }
    if "attention_mask" in batch:
        probe["attention_mask"] = batch["attention_mask"][:1, :, :length, :length].clone()
    is_image = input_ids[0] == model.config.image_token_id
    behind_picture = int(is_image.nonzero().max()) + 1 if is_image.any() else 0
    starts = range(behind_picture, min(behind_picture + 4, length))
    probe["logits_to_keep"] = torch.tensor(sorted({*starts, *range(max(0, length - 4), length)}))
    probe["logits"] = probe_logits(model, probe)
    return probe


def write_probe(folder: Path, probe: dict[str, torch.Tensor]) -> None:
    """Save a probe beside the weights it was made with."""
    save_file(probe, folder / HANDOFF_PROBE)


@torch.no_grad()
def probe_logits(model: HoVLEForConditionalGeneration, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a probe's prompt where it says so, shape `(1, up to 8, V)`, float32; older probes keep the last 8."""
    was_training = model.training
    model.eval()
    inputs: dict = {name: tensor.to(model.device) for name, tensor in probe.items() if name != "logits"}
    with torch.compiler.set_stance("force_eager"):
        outputs = model(**{"logits_to_keep": 8, **inputs}, use_cache=False)
    model.train(was_training)
    return outputs.logits.float().cpu()


def check_handoff(model: HoVLEForConditionalGeneration, checkpoint: Path, tolerance: float = 1e-3) -> float | None:
    """Compare a loaded model with what it said when its stage ended.

    Returns:
        Largest difference relative to the largest magnitude, or None when the folder holds no probe.

    Raises:
        ValueError: When the difference exceeds `tolerance`: the stage would start from other weights than it should.
    """
    path = checkpoint / HANDOFF_PROBE
    if not path.is_file():
        return None
    probe = load_file(path)
    expected = probe["logits"]
    found = probe_logits(model, probe)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= tolerance:
        raise ValueError(
            f"Hand-off check failed: the model loaded from {checkpoint} differs from the one its stage ended with by "
            f"{difference:.2e} of the largest output (allowed {tolerance:.0e}). Its files are damaged or changed."
        )
    return difference


def append_log(path: Path, entry: dict) -> None:
    """Append one JSON line."""
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def rng_state() -> dict:
    """States of the random generators training uses, as tensors."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict) -> None:
    """Undo what set-up drew from the generators."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def trainable_state(objective: nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """Every parameter that learns, whole, the training-only projection and adapters included (together).

    All processes of a sharded objective take part; those that do not `keep` the result get none.
    """
    state = {}
    for name, item in objective.named_parameters():
        if item.requires_grad:
            tensor = whole(item.detach())
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
