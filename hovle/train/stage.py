"""Run one stage from its config: set up, train, check the hand-off, save."""

import dataclasses
import hashlib
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
import yaml
from torch import nn
from torch.utils.data import DataLoader

from ..modeling_hovle import HoVLEForConditionalGeneration
from ..processing_hovle import HoVLEProcessor
from . import checkpoint as checkpoints
from .adapters import add_lora, merged_state_dict
from .config import StageConfig
from .data import PackedBatches, Record, StreamPosition, load_records, load_tiles
from .loop import train, validate
from .objectives import DistillationObjective
from .setup import (
    choose_dtype,
    compile_layers,
    make_objective,
    make_optimizer,
    make_sampler,
    seed_everything,
    select_trainable,
    start_model,
    store_parameters,
)
from .teachers import ImageTeacher

NUM_STANDARDIZING_RECORDS = 256
"""Records whose pictures tell mean and deviation of teacher features."""


def run_stage(config: StageConfig, *, resume: bool = False, dry_run: bool = False) -> Path:
    """Run one training stage.

    Args:
        config: The stage.
        resume: Continue the newest checkpoint in `config.output`; refused when recipe or data changed.
        dry_run: Set everything up, take no step, write nothing, and print what would be trained on what.

    Returns:
        Folder of the trained model, `config.output/model`.

    Raises:
        ValueError: For a wrong config, an occupied output folder, or a failed hand-off check.
        NonFiniteLossError: When the loss is not a number.
    """
    output = Path(config.output)
    accelerator = make_accelerator()
    if not resume and not dry_run and accelerator.is_main_process:
        check_unused(output)
    records = load_records(config.data)
    fingerprint = fingerprint_records(records)
    state = load_state(config, fingerprint, accelerator.num_processes) if resume else None
    seed_everything(config.seed)
    model, processor = start_model(config)
    handoff = None
    if config.model.checkpoint is not None:
        handoff = checkpoints.check_handoff(model, Path(config.model.checkpoint))
    text_table = model.get_input_embeddings().weight.detach().clone()
    dtype = agree_on_dtype(config, state, accelerator)
    select_trainable(model, config)
    peft_model = add_lora(model, config.lora) if config.lora else None
    store_parameters(model, dtype)
    objective = make_objective(config, model, text_table)
    first_step, position = 0, StreamPosition()
    if state:
        load_trainable(objective, state["trainable"])
        first_step = state["step"]
        position = StreamPosition(**state["positions"][accelerator.process_index])

    def batches_from(source_records, start: StreamPosition) -> PackedBatches:
        return PackedBatches(
            source_records,
            make_sampler(config, processor),
            config,
            start,
            accelerator.process_index,
            accelerator.num_processes,
            processor.tokenizer.pad_token_id or 0,
        )

    if dry_run:
        batch = next(iter(batches_from(records, StreamPosition())))
        print(describe(objective, batch, processor, len(records), config))  # noqa: T201 - the dry run's output
        return output / "model"

    if isinstance(objective, DistillationObjective) and config.teacher is not None and config.teacher.standardize:
        standardize_teacher(objective.teacher, records, processor)
    autocast = torch.autocast(accelerator.device.type, dtype, enabled=dtype != torch.float32)
    objective.to(accelerator.device).train()
    is_compiled = compile_layers(model, config.compile)
    optimizer = make_optimizer(objective, config)
    wrapped = accelerator.prepare_model(objective)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        restore_rng(state["rng"])
    if not resume and accelerator.is_main_process:
        claim_output(output, config)
    log = make_log(output, accelerator)
    log({"event": "start", "step": first_step, **environment(dtype, is_compiled, accelerator), "handoff": handoff})
    held_out = []
    if config.validation is not None:
        stream = iter(batches_from(load_records(config.validation), StreamPosition()))
        held_out = [next(stream) for _ in range(config.num_validation_batches)]
        if not state:
            log({"event": "validation", "step": 0, **validate(wrapped, held_out, autocast, accelerator)})

    def save(step: int, reached: StreamPosition) -> None:
        training_state = {
            "step": step,
            "positions": gather_positions(reached),
            "dtype": dtype_name(dtype),
            "config": config.to_dict(),
            "data_fingerprint": fingerprint,
            "trainable": trainable_state(objective),
            "optimizer": optimizer.state_dict(),
            "rng": rng_state(),
        }
        if accelerator.is_main_process:
            checkpoints.save_checkpoint(
                output, step, lambda folder: save_weights(folder, model, processor), training_state
            )

    loader = DataLoader(
        batches_from(records, position),
        batch_size=None,
        num_workers=config.num_workers,
        generator=torch.Generator(),  # its own: a draw from the global one would make a resumed run differ
    )
    train(
        wrapped,
        optimizer,
        iter(loader),
        config,
        first_step=first_step,
        autocast=autocast,
        accelerator=accelerator,
        log=log,
        save=save,
        name=Path(config.output).name,
    )
    if held_out:
        log({"event": "validation", "step": config.num_steps, **validate(wrapped, held_out, autocast, accelerator)})
    if accelerator.is_main_process:
        finish(output, model, processor, peft_model, next(iter(batches_from(records, StreamPosition()))))
        log({"event": "finish", "step": config.num_steps})
    accelerator.wait_for_everyone()
    return output / "model"


def make_accelerator():
    """Processes and devices as the launcher set them up, on CPU where there is no CUDA device."""
    from accelerate import Accelerator, DistributedDataParallelKwargs  # an extra: inference does without it

    # Buffers hold the text table and the teacher's statistics, which never change.
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=handlers)


def load_state(config: StageConfig, fingerprint: str, num_processes: int) -> dict:
    """Read the newest checkpoint's state; ValueError unless this run continues it exactly."""
    newest = checkpoints.find_checkpoint(Path(config.output))
    if newest is None:
        raise ValueError(f"--resume: {config.output} holds no checkpoint.")
    state = checkpoints.load_training_state(newest)
    checkpoints.check_same_run(config, state, fingerprint)
    if len(state["positions"]) != num_processes:
        raise ValueError(
            f"Cannot resume: the run had {len(state['positions'])} processes, this one has {num_processes}."
        )
    return state


def agree_on_dtype(config: StageConfig, state: dict | None, accelerator) -> torch.dtype:
    """Number format of the run, measured at most once: the same on every process and after resuming."""
    from accelerate.utils import broadcast_object_list

    name = state["dtype"] if state else dtype_name(choose_dtype(config.dtype, accelerator.device))
    return getattr(torch, broadcast_object_list([name])[0])


def gather_positions(reached: StreamPosition) -> list[dict]:
    """Where the data stands on every process."""
    from accelerate.utils import gather_object

    return gather_object([dataclasses.asdict(reached)])


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


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


def trainable_state(objective: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter that learns, the training-only projection and adapters included."""
    return {name: item.detach().cpu() for name, item in objective.named_parameters() if item.requires_grad}


@torch.no_grad()
def load_trainable(objective: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put saved trainable parameters back; names must match one to one."""
    parameters = {name: item for name, item in objective.named_parameters() if item.requires_grad}
    if set(parameters) != set(state):
        difference = sorted(set(parameters) ^ set(state))
        raise ValueError(f"The checkpoint's trainable parameters differ from the recipe's: {difference[:5]}.")
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


def standardize_teacher(teacher: ImageTeacher, records: list[Record], processor: HoVLEProcessor) -> None:
    """Measure the teacher's features on evenly spaced pictures of the source, the same ones whenever a run resumes."""
    chosen = records[:: max(1, len(records) // NUM_STANDARDIZING_RECORDS)]
    pictures = (load_tiles(processor, record.messages)[0] for record in chosen)
    teacher.standardize(pictures, round(processor.image_seq_length**0.5))


def save_weights(folder: Path, model: HoVLEForConditionalGeneration, processor: HoVLEProcessor) -> None:
    """Write model files into an existing folder: float32 weights with adapters merged, config, processor."""
    state = {name: item.float() for name, item in merged_state_dict(model).items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]  # the cast may have made a copy of the table
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)


def fingerprint_records(records) -> str:
    """Short hash of a source's conversations."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr((record.name, record.messages)).encode())
    return digest.hexdigest()[:16]


def check_unused(output: Path) -> None:
    """Raise where a run folder is not empty: one run per folder."""
    if output.exists() and any(output.iterdir()):
        raise ValueError(
            f"Output folder {output} already holds a run. Continue it with --resume, or choose another output."
        )


def claim_output(output: Path, config: StageConfig) -> None:
    """Take a run folder once everything is set up; write the resolved recipe."""
    check_unused(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "recipe.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))


def make_log(output: Path, accelerator) -> Callable[[dict], None]:
    """Write entries to `log.jsonl` on the main process, stamped with the time."""

    def log(entry: dict) -> None:
        if accelerator.is_main_process:
            checkpoints.append_log(output / "log.jsonl", {"time": round(time.time(), 1), **entry})

    return log


def environment(dtype: torch.dtype, is_compiled: bool, accelerator) -> dict:
    """What a reader needs to judge a run's figures."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = ""
    if shutil.which("git"):
        result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
        commit = result.stdout.strip()
    return {
        "device": str(accelerator.device),
        "num_processes": accelerator.num_processes,
        "num_threads": torch.get_num_threads(),
        "dtype": dtype_name(dtype),
        "compiled": is_compiled,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit or None,
    }


def describe(
    objective: nn.Module, batch: dict, processor: HoVLEProcessor, num_records: int, config: StageConfig
) -> str:
    """What a stage would train on what, in a few lines, with one decoded sample."""
    trained = sum(item.numel() for item in objective.parameters() if item.requires_grad)
    total = sum(item.numel() for item in objective.parameters())
    samples = len(batch["names"])
    ends = (batch["position_ids"][0, 1:] == 0).nonzero().flatten() + 1
    end = int(ends[0]) if len(ends) else config.row_length
    supervised = int((batch["labels"] != -100).sum())
    lines = [
        f"objective       {config.objective.name}",
        f"trains          {', '.join(config.trainable) or 'adapters'}: {trained:,} of {total:,} parameters",
        f"source          {config.data.source}: {num_records:,} records",
        f"one batch       {samples} samples in {config.rows_per_batch} rows of {config.row_length} tokens, "
        f"{len(batch['pixel_values'])} tiles, {float(batch['is_sample'].float().mean()):.1%} filled, "
        f"{supervised} supervised tokens",
        f"whole run       {config.num_steps:,} steps of {config.gradient_accumulation_steps} batches",
        "first sample    " + processor.tokenizer.decode(batch["input_ids"][0, :end]),
    ]
    return "\n".join(lines)


def finish(output: Path, model: HoVLEForConditionalGeneration, processor, peft_model, batch: dict) -> None:
    """Write the trained model with a hand-off probe, and the adapters alone when nothing else learned."""
    adapters_only = peft_model is not None and all(
        ".lora_" in name for name, item in model.named_parameters() if item.requires_grad
    )
    if adapters_only:
        checkpoints.write_folder(output / "adapter", peft_model.save_pretrained)
    model.float()  # before merging, which rounds to the format of the weights
    if peft_model is not None:
        model = peft_model.merge_and_unload()
    probe = checkpoints.make_probe(model, batch)

    def fill(folder: Path) -> None:
        save_weights(folder, model, processor)
        checkpoints.write_probe(folder, probe)

    checkpoints.write_folder(output / "model", fill)
