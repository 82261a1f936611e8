"""One stage, from its recipe to a trained model: read `run_stage` from top to bottom."""

import contextlib
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

from ...errors import printable
from ...files.atomic import locked
from ...language.text_perplexity import TextRetention, write_record
from ...machine.memory import keep_freed_memory
from ..config import StageConfig
from ..data.mixture import open_mixture
from ..data.packing import StreamPosition
from ..model.adapters import unadapted
from ..model.start import positions_of, with_shipped_model
from ..monitor.estimate import Estimate
from ..monitor.image_ablation import Examiner, Waiting
from ..monitor.language_check import LanguageCheck
from ..monitor.meter import Meter
from ..monitor.run_log import check_trackers, make_log, run_environment, tracking
from ..objectives.choice import load_teacher, make_objective, prepare_teacher
from ..parallel import fail_on_all_ranks, load_optimizer_state, make_accelerator, unsharded
from ..step.assembly import TrainableStep, prepare_model
from .checkpoint import checkpoint_folder, load_trainable
from .dry_run import describe
from .loop import train
from .random_numbers import continue_random_numbers
from .run_folder import check_resumable, check_unused, claim_output, end_at_taught_replies, find_standing
from .stage_data import StageData, with_counted_steps
from .start import Adapt, agree_on_dtype, check_start, load_start, load_state
from .writer import Writer


def run_stage(config: StageConfig, *, resume: bool = False, dry_run: bool = False, adapt: Adapt | None = None) -> Path:
    """Run one training stage.

    Args:
        config: The stage.
        resume: Continue the newest checkpoint in `config.output`, or start where there is none yet; refused when
            recipe or data changed. A finished run is left as it is.
        dry_run: Set everything up, take no step, write nothing, and print what would be trained on what.
        adapt: Changes the model that training starts from, in place; hooks are not written with it. For experiments.

    Returns:
        Folder of the trained model, `config.output/model`.

    Raises:
        ValueError: For a wrong config, an occupied output folder, or a failed hand-off check.
        NonFiniteLossError: When a loss is not a number, in training or validation, or an update ruined the weights.
        BlindPicturesError: When pictures do not matter and the recipe says `stop_when_images_ignored`.
        ForgettingError: When the language is lost beyond the recipe's `stop_when_forgetting`.
    """
    # The run folder: a new one, or one that holds this recipe's run.
    config = with_shipped_model(config)
    check_trackers(config.tracking)
    accelerator = make_accelerator()
    output = Path(config.output)
    with fail_on_all_ranks():
        if resume:
            check_resumable(output, config)
        elif not dry_run and accelerator.is_main_process:
            check_unused(output)
    if resume and find_standing(output) == "model":
        accelerator.print(f"{output} is finished: nothing to resume.")
        return output / "model"

    # What cannot work is refused before minutes of reading.
    with fail_on_all_ranks():
        check_start(config, dry_run)
        teacher = load_teacher(config)

    # The data, and where an earlier attempt left it.
    mixture = open_mixture(config.data, config.seed)
    config = with_counted_steps(config, mixture, accelerator)
    state = None
    if resume:
        with fail_on_all_ranks():
            state = load_state(config, mixture.fingerprint, accelerator)
    first_step = state["step"] if state else 0

    # The model it starts from, what of it learns, and towards what.
    model, processor, handoff = load_start(config, adapt)
    if config.objective.name == "next_token" and not end_at_taught_replies(model, processor):
        accelerator.print("The chat template ends replies with no special token: generation cannot tell their end.")
    dtype = agree_on_dtype(config, state, accelerator)
    trainable = prepare_model(model, config, dtype, accelerator.device)
    retention = TextRetention(config.retention, processor) if config.retention else None
    objective = make_objective(config, model, processor.image_processor, trainable.text_table, dtype, teacher)
    if state:
        load_trainable(objective, state.pop("trainable"))
    positions = positions_of(model.config)
    data = StageData(config, mixture, processor, accelerator, state, positions)
    if dry_run:
        accelerator.print(describe(objective, next(iter(data.batches())), processor, mixture, config))
        return output / "model"

    # One step of it, on this machine and over all processes.
    held_out = data.held_out_batches()
    objective.to(accelerator.device)
    is_main_process = accelerator.is_main_process
    prepare_teacher(objective, config, mixture, held_out, processor, dtype, is_main_process=is_main_process)
    step = TrainableStep(trainable, objective, config, accelerator, dtype)
    if retention:
        retention.start(model, step.autocast, config.output if first_step else config.model.checkpoint)
    step.distribute()
    with fail_on_all_ranks():
        if is_main_process:
            claim_output(output, config, resume)
    continue_random_numbers(state, config.seed, accelerator.process_index)
    if state:
        load_optimizer_state(objective, step.optimizer, state.pop("optimizer"))

    with locked(output) if is_main_process else contextlib.nullcontext(), tracking(config, accelerator):
        # A look before the first step: what machine and model promise, and what the model knows already.
        log = make_log(output, accelerator)
        batches = data.training_batches()
        with fail_on_all_ranks():
            first_batch = next(batches)
        on_device = first_batch.to(accelerator.device)
        meter = Meter(objective, on_device, step.autocast, dtype, accelerator.num_processes)
        estimate = Estimate(config, model.config, dtype, first_batch, accelerator)
        log({"event": "start", "step": first_step, **start_facts(step, data, meter, estimate), "handoff": handoff})
        warn(step, log, estimate, first_step)
        language = LanguageCheck(step, data.held_out_language) if data.held_out_language else None
        examiner = Examiner(step, data.usable(held_out, log, first_step), log, language)
        if state:
            examiner.waiting = Waiting(**state.get("waiting", {}))
        examiner.warn_where_blind()
        if retention:
            if is_main_process:
                write_record(output, retention.record)
            log(retention.entry(first_step))
        if not state:
            examiner.examine(0)

        # The steps.
        writer = Writer(step, data, examiner, log, state["best"] if state else None)
        finished = train(
            step,
            itertools.chain([first_batch], batches),
            first_step=first_step,
            meter=meter,
            log=functools.partial(log_step, log, data, estimate),
            check=data.skips.check,
            validate=functools.partial(examine_or_stop, examiner, writer),
            save=writer.save,
            name=output.name,
        )

        # A look after the last one, and the model.
        step.refuse_ruined_weights(finished)
        end = examiner.examine(finished)
        if retention:
            with unsharded(objective):
                retention.measure(model, step.autocast)
            log(retention.entry(finished))
        facts = {"predicted": estimate.predicted, "measured": estimate.measured()}
        writer.finish(retention)
        log({"event": "finish", "step": finished, **facts})
        accelerator.wait_for_everyone()
    if end is not None:
        raise type(end)(f"{end} The model is saved in {output / 'model'}.")
    return output / "model"


def examine_or_stop(examiner: Examiner, writer: Writer, num_steps: int, reached: StreamPosition) -> bool:
    """Examine in the middle of a run; save a checkpoint and raise where the recipe wants it to end (all ranks).

    Returns:
        Whether the run shall end here as if it were finished, because validation falls no more.
    """
    end = examiner.examine(num_steps)
    if end is not None:
        writer.save(num_steps, reached)
        folder = checkpoint_folder(writer.output, num_steps)
        raise type(end)(f"{end} The run is saved in {folder} and can be resumed.")
    return examiner.has_waited_enough(num_steps)


def start_facts(step: TrainableStep, data: StageData, meter: Meter, estimate: Estimate) -> dict:
    """What a reader needs to judge a run's figures; what the data leaves aside is also printed."""
    for line in data.mixture.left_aside:
        step.accelerator.print(printable(line))
    return {
        **run_environment(step.dtype, step.is_compiled, step.accelerator),
        **meter.facts(),
        "left_aside": data.mixture.left_aside,
        "keeps_freed_memory": keep_freed_memory(step.accelerator.device),
        "predicted": estimate.predicted,
    }


def warn(step: TrainableStep, log: Callable[[dict], None], estimate: Estimate, first_step: int) -> None:
    """Say, on the terminal and in the log, what a run does without."""
    messages = [estimate.problem] if estimate.problem else []
    if step.trainable.peft_model is not None and (left := unadapted(step.model)):
        shown = ", ".join(f"{name} ({count:,} numbers)" for name, count in left.items())
        messages.append(f"lora leaves out what is no linear map, so it stays as it is: {shown}.")
    for message in messages:
        log({"event": "warning", "step": first_step, "message": message})
        step.accelerator.print(f"WARNING: {message}")


def log_step(log: Callable[[dict], None], data: StageData, estimate: Estimate, entry: dict) -> None:
    """Log a step with the skips so far (all ranks)."""
    estimate.note(entry)
    log({**entry, **data.log_skips(log, entry["step"])})
