"""The training loop all stages share: draw, step, log, validate, save."""

import contextlib
import functools
from collections.abc import Callable, Iterator

from tqdm.auto import tqdm

from ..data.batch import PackedBatch
from ..data.packing import StreamPosition
from ..monitor.meter import Meter
from ..parallel import fail_on_all_ranks
from ..step.assembly import TrainableStep
from ..step.train_step import StepResult


def train(
    step: TrainableStep,
    batches: Iterator[PackedBatch],
    *,
    first_step: int,
    meter: Meter,
    log: Callable[[dict], None],
    check: Callable[[], None],
    validate: Callable[[int, StreamPosition], bool],
    save: Callable[[int, StreamPosition], None],
    name: str,
) -> int:
    """Run the steps of a stage; how many are finished at its end.

    Args:
        step: What trains, with its config.
        batches: Endless packed batches of this process.
        first_step: 0, or the step a checkpoint was saved at.
        meter: Measures speed.
        log: Takes one entry with units in its keys.
        check: Raises, on all ranks alike, where the data so far must end the run; what is learnt is saved before.
        validate: Takes the number of finished steps and where the data continues; whether the run shall end there.
        save: Takes the same.
        name: Shown on the progress bar.
    """
    config = step.config
    check()
    progress = tqdm(
        total=config.num_steps,
        initial=first_step,
        desc=name,
        unit="step",
        disable=not step.accelerator.is_main_process,
    )
    meter.start()
    num_empty, finished = 0, first_step
    save_last: Callable[[], None] | None = None  # what the last step learnt, unless it is saved
    for number in range(first_step, config.num_steps):
        with saving_before_a_stop(save_last), fail_on_all_ranks(), meter.waiting_for_data():
            micro_batches = [next(batches) for _ in range(config.gradient_accumulation_steps)]
        result = step.step(number, micro_batches)
        meter.add(micro_batches)
        num_empty += result.is_empty
        progress.update()
        finished = number + 1
        reached = micro_batches[-1].position
        assert reached is not None  # a stream's batches know it
        save_last = functools.partial(save, finished, reached)
        is_last = finished == config.num_steps
        if finished % config.log_every == 0 or is_last:
            entry = log_entry(finished, result, step.learning_rate, num_empty, meter)
            num_empty = 0
            log(entry)
            progress.set_postfix_str(f"loss {result.loss:.3f}, {entry['tokens_per_second']:.0f} tokens/s")
            with saving_before_a_stop(save_last):
                check()
        with meter.paused():
            is_due = {
                act: bool(every) and finished % every == 0 and not is_last
                for act, every in (("validate", config.validate_every), ("save", config.checkpoint_every))
            }
            if is_due["validate"] and validate(finished, reached):
                break
            if is_due["save"]:
                save_last()
                save_last = None
    progress.close()
    return finished


@contextlib.contextmanager
def saving_before_a_stop(save: Callable[[], None] | None) -> Iterator[None]:
    """Save what is learnt where an error in this block, on all ranks alike, ends the run; None: nothing new is."""
    try:
        yield
    except Exception:
        if save is not None:
            save()
        raise


def log_entry(step: int, result: StepResult, learning_rate: float, num_empty: int, meter: Meter) -> dict[str, float]:
    """What is logged of a step, and of speed and steps without anything to learn from since the last logged one."""
    return {
        "step": step,
        "loss": round(result.loss, 5),
        **{term: round(value, 5) for term, value in result.terms.items()},
        "gradient_norm": round(result.gradient_norm, 4),
        **{f"gradient_norm_{part}": round(norm, 4) for part, norm in result.part_norms.items()},
        "learning_rate": learning_rate,
        "steps_without_loss": num_empty,
        **meter.read(),
    }
