"""Run one stage from its config: set up, train, check the hand-off, save."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...language.text_perplexity import BareRecord, TextRetention, read_record, write_record
from ...machine.memory import keep_freed_memory
from ...machine.speed import choose_dtype, dtype_name
from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ...model.processing_hovle import HoVLEProcessor
from ..config import ConversationData, EasyVqaData, StageConfig
from ..data.mixture import Mixture, open_mixture
from ..data.packing import PackedBatches, StreamPosition, load_batches
from ..data.records import picture_sources
from ..data.samplers import limited_processor, make_sampler
from ..data.skips import NO_FAULTS, SkipLedger, describe_skips
from ..data.tiles import picture_key, read_tiles
from ..model.adapters import add_lora, merged_state_dict
from ..model.layers import checkpoint_activations, compile_layers
from ..model.parameters import select_trainable, store_parameters
from ..model.quantization import in_full_precision, quantize_language_model
from ..model.start import start_model
from ..monitor.forecast import Forecast
from ..monitor.image_ablation import BlindPicturesError, Examiner
from ..monitor.meter import Meter
from ..monitor.run_log import check_trackers, make_log, run_environment, tracking
from ..objectives.base import Objective
from ..objectives.choice import make_objective
from ..objectives.distillation import DistillationObjective
from ..objectives.feature_cache import cached_targets
from ..objectives.teachers import ImageTeacher, Targets
from ..parallel import (
    gather,
    load_optimizer_state,
    make_accelerator,
    optimizer_state,
    outside_gathered,
    reshard,
    spread,
    together,
)
from ..step.optimizer import make_optimizer
from ..step.train_step import to_device
from .checkpoint import (
    check_same_run,
    find_checkpoint,
    load_trainable,
    load_training_state,
    save_checkpoint,
    trainable_state,
)
from .dry_run import describe
from .handoff import check_handoff
from .loop import train
from .random_numbers import restore_rng, rng_state, seed_everything
from .run_folder import (
    check_resumable,
    check_unused,
    claim_output,
    find_standing,
    save_weights,
    write_adapter,
    write_model,
)

NUM_STANDARDIZING_RECORDS = 256
"""Records whose pictures tell mean and deviation of teacher features."""


@dataclass
class Stage:
    """A stage that is set up: all that training and saving need."""

    config: StageConfig
    accelerator: Any
    mixture: Mixture
    """What training reads."""
    skips: SkipLedger
    """What of it could not be used."""
    state: dict | None
    """What the checkpoint to resume from holds, or None."""
    model: HoVLEForConditionalGeneration
    processor: HoVLEProcessor
    objective: Objective
    peft_model: nn.Module | None
    dtype: torch.dtype
    handoff: float | None
    """Difference from what the previous stage ended with, relative to its largest output."""
    retention: TextRetention | None
    """Measures text perplexity where the recipe wants it."""
    originals: dict[str, nn.Linear]
    """Exact maps of the language model that quantised ones stand in for, by name."""

    @property
    def output(self) -> Path:
        """The run folder."""
        return Path(self.config.output)

    @property
    def first_step(self) -> int:
        """Steps an earlier run has done."""
        return self.state["step"] if self.state else 0

    @property
    def autocast(self) -> torch.autocast:
        """Context in which matrix products run in the run's number format."""
        return torch.autocast(self.accelerator.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def batches(self, mixture: Mixture, start: StreamPosition | None = None) -> PackedBatches:
        """Packed batches of this process from the beginning of a mixture or from a position."""
        return PackedBatches(
            mixture,
            make_sampler(self.config, self.processor),
            self.config,
            start or StreamPosition(),
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.processor.tokenizer.pad_token_id or 0,
        )

    def training_batches(self) -> Iterator[dict]:
        """The stream training reads, from where an earlier run left it."""
        start = StreamPosition.join([self.state["position"]]) if self.state else None
        for batch in load_batches(self.batches(self.mixture, start), self.config.num_workers):
            self.skips.add(batch)
            yield batch

    @functools.cached_property
    def held_out(self) -> list[dict]:
        """The first batches of the validation source, no record twice: the same on every process (together).

        They are packed as one process with one micro-batch in a step would, so that neither number changes them.
        """
        if self.config.validation is None:
            return []
        with together():
            mixture = open_mixture([self.config.validation], self.config.seed)
            stream = PackedBatches(
                mixture,
                make_sampler(self.config, self.processor),
                dataclasses.replace(self.config, gradient_accumulation_steps=1),
                StreamPosition(),
                rank=0,
                world_size=1,
                pad_token_id=self.processor.tokenizer.pad_token_id or 0,
                once=True,
            )
            batches = list(itertools.islice(stream, self.config.num_validation_batches))
            skips = SkipLedger(self.config.max_skip_fraction)
            for batch in batches:
                skips.add(batch)
            skips.share()
            skips.check()
            if not any(batch["names"] for batch in batches):
                raise ValueError(
                    f"The validation source {self.config.validation.label} has no sample that can be used.\n"
                    + describe_skips(skips.reasons, skips.worst)
                )
        return batches

    def examiner(self, wrapped: nn.Module, log: Callable[[dict], None]) -> Examiner:
        """What looks at held-out data during the run; what of that was skipped is logged."""
        for skip in (skip for batch in self.held_out for skip in batch["skips"]):
            log({"event": "skip", "step": self.first_step, **skip._asdict()})
        usable = [batch for batch in self.held_out if batch["names"]]
        parts = (self.model.config, usable, self.config)
        return Examiner(wrapped, *parts, self.autocast, self.accelerator, log)

    def log_skips(self, log: Callable[[dict], None], step: int) -> dict:
        """Count the skips of all processes, log each new one, and give the counts for the step's own entry."""
        for skip in self.skips.share(gather):
            if skip.reason not in NO_FAULTS:  # no fault, and there may be millions: counted is enough
                log({"event": "skip", "step": step, **skip._asdict()})
        self.skips.check()
        return self.skips.summary()

    def weights(self) -> dict[str, torch.Tensor]:
        """Plain float32 weights of the model on the main process, nothing on the others (together)."""
        reshard(self.objective)
        with in_full_precision(self.model, self.originals):
            return merged_state_dict(self.model, keep=self.accelerator.is_main_process)

    def save(self, optimizer: torch.optim.Optimizer, step: int, reached: StreamPosition, best: dict | None) -> None:
        """Write a checkpoint from which the run continues exactly (together).

        Args:
            optimizer: Over the trainable parameters.
            step: Finished steps.
            reached: Where the data continues.
            best: Step and validation loss of the best checkpoint, this one included, where the run keeps it.
        """
        weights = self.weights()
        training_state = {
            "step": step,
            "position": dataclasses.asdict(gather_position(reached)),
            "skips": self.skips.state_dict(),
            "dtype": dtype_name(self.dtype),
            "config": self.config.to_dict(),
            "data_fingerprint": self.mixture.fingerprint,
            "trainable": trainable_state(self.objective, self.accelerator.is_main_process),
            "optimizer": optimizer_state(self.objective, optimizer),
            "rng": gather([rng_state()]),
            "best": best,
        }
        with together():
            if self.accelerator.is_main_process:
                save_checkpoint(
                    self.output,
                    step,
                    lambda folder: save_weights(folder, self.model, self.processor, weights),
                    training_state,
                    self.config.keep_last,
                    best["step"] if best else None,
                )


def run_stage(config: StageConfig, *, resume: bool = False, dry_run: bool = False) -> Path:
    """Run one training stage.

    Args:
        config: The stage.
        resume: Continue the newest checkpoint in `config.output`, or start where there is none yet; refused when
            recipe or data changed. A finished run is left as it is.
        dry_run: Set everything up, take no step, write nothing, and print what would be trained on what.

    Returns:
        Folder of the trained model, `config.output/model`.

    Raises:
        ValueError: For a wrong config, an occupied output folder, or a failed hand-off check.
        NonFiniteLossError: When the loss is not a number.
        BlindPicturesError: When pictures do not matter and the recipe says `stop_when_images_ignored`.
    """
    check_trackers(config.tracking)
    accelerator = make_accelerator()
    output = Path(config.output)
    with together():
        if resume:
            check_resumable(output, config)
        elif not dry_run:
            check_unused(output)
    if resume and find_standing(output) == "model":
        accelerator.print(f"{output} is finished: nothing to resume.")
        return output / "model"
    stage = set_up(config, accelerator, resume)
    if dry_run:
        batch = next(iter(stage.batches(stage.mixture)))
        lines = describe(stage.objective, batch, stage.processor, stage.mixture, config)
        accelerator.print(lines)
    else:
        train_and_save(stage, resume)
    return stage.output / "model"


def set_up(config: StageConfig, accelerator, resume: bool) -> Stage:
    """Load data and model, check the hand-off, freeze, and build the objective; nothing is written."""
    mixture = open_mixture(config.data, config.seed)
    skips = SkipLedger(config.max_skip_fraction)
    state = None
    if resume:
        with together():
            state = load_state(config, mixture.fingerprint, accelerator)
    if state:
        skips.load_state_dict(state["skips"])
    seed_everything(config.seed)
    model, processor = start_model(config)
    handoff = None
    if config.model.checkpoint is not None:
        handoff = check_handoff(model, Path(config.model.checkpoint))
    check_hd(config, model)
    text_table = model.model.input_embedding_matrix()
    dtype = agree_on_dtype(config, state, accelerator)
    select_trainable(model, config)
    peft_model = add_lora(model, config.lora) if config.lora else None
    store_parameters(model, dtype)
    originals = {}
    if config.quantize_frozen != "none":
        originals = quantize_language_model(model, config.quantize_frozen, dtype, accelerator.device)
    retention = TextRetention(config.retention, processor) if config.retention else None
    objective = make_objective(config, model, processor.image_processor, text_table)
    if state:
        load_trainable(objective, state.pop("trainable"))
    return Stage(
        config=config,
        accelerator=accelerator,
        mixture=mixture,
        skips=skips,
        state=state,
        model=model,
        processor=processor,
        objective=objective,
        peft_model=peft_model,
        dtype=dtype,
        handoff=handoff,
        retention=retention,
        originals=originals,
    )


def train_and_save(stage: Stage, resume: bool) -> None:
    """Train from the stage's first step to its last and write the model."""
    config, accelerator, objective = stage.config, stage.accelerator, stage.objective
    objective.to(accelerator.device).train()
    if isinstance(objective, DistillationObjective):
        prepare_teacher(stage, objective)
    if config.activation_checkpointing:
        checkpoint_activations(stage.model)
    is_compiled = compile_layers(stage.model, config.compile, accelerator.print)
    if stage.retention:
        earlier = config.output if stage.first_step else config.model.checkpoint
        stage.retention.start(stage.model, stage.autocast, earlier)
    wrapped = spread(objective, config.sharding, accelerator)
    optimizer = make_optimizer(objective, config)
    with together():
        if accelerator.is_main_process:
            claim_output(stage.output, config, resume)
    continue_random_numbers(stage)
    if stage.state:
        load_optimizer_state(objective, optimizer, stage.state.pop("optimizer"))
    with tracking(config, accelerator):
        log = make_log(stage.output, accelerator)
        alarm, forecast = train_and_examine(stage, wrapped, optimizer, is_compiled, log)
        measured = forecast.measured()
        finish(stage)
        log({"event": "finish", "step": config.num_steps, "predicted": forecast.predicted, "measured": measured})
        accelerator.wait_for_everyone()
    if alarm and config.stop_when_images_ignored:
        raise BlindPicturesError(f"{alarm} The model is saved in {stage.output / 'model'}.")


def train_and_examine(
    stage: Stage, wrapped: nn.Module, optimizer: torch.optim.Optimizer, is_compiled: bool, log: Callable[[dict], None]
) -> tuple[str | None, Forecast]:
    """Do the steps, look at the model before, between and after them; return the last alarm and what was foreseen."""
    config, accelerator, retention = stage.config, stage.accelerator, stage.retention

    def log_step(entry: dict) -> None:
        forecast.note(entry)
        log({**entry, **stage.log_skips(log, entry["step"])})

    batches = stage.training_batches()
    with together():
        first_batch = next(batches)
    on_device = to_device(first_batch, accelerator.device)
    meter = Meter(stage.objective, on_device, stage.autocast, stage.dtype, accelerator.num_processes)
    forecast = Forecast(config, stage.model.config, stage.dtype, first_batch, accelerator)
    facts = {**run_environment(stage.dtype, is_compiled, accelerator), **meter.facts(), "handoff": stage.handoff}
    for line in stage.mixture.left_aside:
        accelerator.print(line)
    facts["left_aside"] = stage.mixture.left_aside
    facts["keeps_freed_memory"] = keep_freed_memory(accelerator.device)
    log({"event": "start", "step": stage.first_step, **facts, "predicted": forecast.predicted})
    examiner = stage.examiner(wrapped, log)
    examiner.warn_where_blind()
    if retention:
        if accelerator.is_main_process:
            write_record(stage.output, retention.record)
        log(retention.entry(stage.first_step))
    best = stage.state["best"] if stage.state else None

    def save(step: int, reached: StreamPosition) -> None:
        nonlocal best
        stage.log_skips(log, step)  # so that the counts saved are complete
        if config.keep_best:
            loss = examiner.held_out_loss(step)
            if math.isfinite(loss) and (best is None or loss < best["loss"]):
                best = {"step": step, "loss": loss}
        stage.save(optimizer, step, reached, best)

    if not stage.state:
        examiner.examine(0)
    train(
        wrapped,
        optimizer,
        itertools.chain([first_batch], batches),
        config,
        first_step=stage.first_step,
        autocast=stage.autocast,
        accelerator=accelerator,
        meter=meter,
        log=log_step,
        validate=examiner.examine_or_stop,
        save=save,
        name=stage.output.name,
    )
    alarm = examiner.examine(config.num_steps)
    if retention:
        with outside_gathered(stage.objective):
            retention.measure(stage.model, stage.autocast)
        log(retention.entry(config.num_steps))
    return alarm, forecast


def bare_record(stage: Stage) -> BareRecord | None:
    """What later stages compare their text perplexity with: measured here, or handed on from the start checkpoint."""
    if stage.retention:
        return stage.retention.record
    return read_record(Path(stage.config.model.checkpoint)) if stage.config.model.checkpoint else None


def check_hd(config: StageConfig, model: HoVLEForConditionalGeneration) -> None:
    """Refuse at once what HoVLE-HD, which builds its own masks, would refuse somewhere in the run."""
    if not model.model.is_hd:
        return
    if config.rows_per_batch > 1:
        raise ValueError(
            "HoVLE-HD trains on one packed row at a time, because rows differ in their long sequences: set "
            "rows_per_batch to 1 and row_length or gradient_accumulation_steps higher."
        )
    sources = [("data", data) for data in config.data]
    sources += [("validation", config.validation)] if config.validation else []
    for name, data in sources:
        shares = isinstance(data, EasyVqaData | ConversationData) and data.questions_per_sample > 1
        if config.objective.name == "next_token" and shares:
            raise ValueError(
                f"HoVLE-HD cannot share a picture between questions: set {name}.questions_per_sample to 1."
            )


def load_state(config: StageConfig, fingerprint: str, accelerator) -> dict | None:
    """Read the newest checkpoint's state, None where there is none; ValueError unless this run continues it."""
    newest = find_checkpoint(Path(config.output))
    if newest is None:
        accelerator.print(f"{config.output} holds no checkpoint yet: starting at step 0.")
        return None
    state = load_training_state(newest)
    # Kept for the whole run, and a mapped tensor would keep the whole file on the disk, even once it is deleted.
    state["rng"] = [{name: item.clone() for name, item in saved.items()} for saved in state["rng"]]
    check_same_run(config, state, fingerprint)
    num_processes = accelerator.num_processes
    num_shards = config.gradient_accumulation_steps * num_processes
    found = len(StreamPosition.join([state["position"]]).shards)
    if num_shards != found:
        raise ValueError(
            f"Cannot resume: the run had {found} micro-batches in a step, this one has {num_shards} ({num_processes} "
            f"processes x gradient_accumulation_steps {config.gradient_accumulation_steps}). Set "
            f"gradient_accumulation_steps so that the product is {found}."
        )
    return state


def continue_random_numbers(stage: Stage) -> None:
    """Undo what set-up drew from the generators, or give each process numbers of its own in a new run."""
    rank = stage.accelerator.process_index
    saved = stage.state["rng"] if stage.state else []
    if rank < len(saved):
        restore_rng(saved[rank])
    else:
        seed_everything(stage.config.seed + rank)


def agree_on_dtype(config: StageConfig, state: dict | None, accelerator) -> torch.dtype:
    """Number format of the run, measured at most once: the same on every process and after resuming."""
    from accelerate.utils import broadcast_object_list

    name = state["dtype"] if state else dtype_name(choose_dtype(config.dtype, accelerator.device))
    return getattr(torch, broadcast_object_list([name])[0])


def gather_position(reached: StreamPosition) -> StreamPosition:
    """Where the data stands on all processes together."""
    return StreamPosition.join(gather([dataclasses.asdict(reached)]))


def prepare_teacher(stage: Stage, objective: DistillationObjective) -> None:
    """Put a feature cache in the teacher's place and standardise features, where the recipe says so."""
    config = stage.config.teacher
    assert config is not None  # StageConfig wants one with this objective
    processor = limited_processor(stage.config, stage.processor)
    if config.cache is not None:
        assert isinstance(objective.teacher, ImageTeacher)
        with stage.autocast:
            objective.teacher = cached_targets(
                objective.teacher,
                stage.config,
                stage.mixture,
                stage.held_out,
                processor,
                stage.dtype,
                is_main_process=stage.accelerator.is_main_process,
            )
    if config.standardize:
        with stage.autocast:
            standardize_teacher(objective.teacher, stage.mixture, processor)


def standardize_teacher(teacher: Targets, mixture: Mixture, processor: HoVLEProcessor) -> None:
    """Measure the teacher's features on the first pictures of the stream, the same ones whenever a run resumes."""
    grid_size = round(processor.image_seq_length**0.5)
    device = teacher.feature_mean.device

    def raw_features() -> Iterator[torch.Tensor]:
        for record in mixture.first_records(NUM_STANDARDIZING_RECORDS):
            for picture in picture_sources(record.messages)[:1]:
                try:
                    key, tiles = picture_key(picture), read_tiles(picture, processor.image_processor)
                except (ValueError, OSError):  # what is damaged counts as skipped when training draws it
                    continue
                batch = {"pixel_values": tiles.to(device), "picture_keys": [key], "names": [record.name]}
                yield teacher.raw_targets(batch, grid_size)

    teacher.standardize(raw_features())


def finish(stage: Stage) -> None:
    """Write the trained model with a hand-off probe, and the adapters alone when nothing else learned (together)."""
    weights, trained = stage.weights(), trainable_state(stage.objective, stage.accelerator.is_main_process)
    with together():
        if stage.accelerator.is_main_process:
            if stage.peft_model is not None and all(".lora_" in name for name in trained):
                write_adapter(stage.output / "adapter", stage.peft_model, trained)
            first_batch = next(iter(stage.batches(stage.mixture)))
            parts = (stage.model.config, stage.processor, weights, first_batch, bare_record(stage))
            write_model(stage.output / "model", *parts)
