"""What a run writes beside its log: checkpoints to continue from, and the trained model."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch

from ...language.text_perplexity import BareRecord, TextRetention, read_record
from ...machine.speed import dtype_name
from ..data.packing import StreamPosition
from ..monitor.image_ablation import Examiner
from ..parallel import fail_on_all_ranks, gather, optimizer_state
from ..step.assembly import TrainableStep
from .checkpoint import save_checkpoint, trainable_state
from .random_numbers import rng_state
from .run_folder import save_weights, write_adapter, write_model
from .stage_data import StageData


class Writer:
    """Writes a run's checkpoints and its model.

    Args:
        step: What trains, distributed.
        data: What it trains on.
        examiner: Measures the validation loss, where the best checkpoint is kept.
        log: The run's log.
        best: Step and validation loss of the best checkpoint so far, where there is one.
    """

    def __init__(
        self,
        step: TrainableStep,
        data: StageData,
        examiner: Examiner,
        log: Callable[[dict], None],
        best: dict | None,
    ):
        self.step = step
        self.data = data
        self.examiner = examiner
        self.log = log
        self.best = best
        self.config = step.config
        self.output = Path(step.config.output)
        self.is_main_process = step.accelerator.is_main_process

    def save(self, num_steps: int, reached: StreamPosition) -> None:
        """Write a checkpoint from which the run continues exactly (all ranks).

        Args:
            num_steps: Finished steps.
            reached: Where the data of this process continues.

        Raises:
            RuinedWeightsError: Instead of writing weights that hold NaN or infinity.
        """
        self.step.refuse_ruined_weights(num_steps)
        self.data.log_skips(self.log, num_steps)  # so that the counts saved are complete
        if self.config.keep_best:
            loss = self.examiner.held_out_loss(num_steps)
            if math.isfinite(loss) and (self.best is None or loss < self.best["loss"]):
                self.best = {"step": num_steps, "loss": loss}
        weights = self.step.weights()
        position = StreamPosition.join(gather([dataclasses.asdict(reached)]))
        state = {
            "step": num_steps,
            "position": dataclasses.asdict(position),
            "skips": self.data.skips.state_dict(),
            "dtype": dtype_name(self.step.dtype),
            "config": self.config.to_dict(),
            "data_fingerprint": self.data.mixture.fingerprint,
            "language_fingerprint": self.data.language_fingerprint,
            "trainable": trainable_state(self.step.objective, self.is_main_process),
            "optimizer": optimizer_state(self.step.objective, self.step.optimizer),
            "rng": gather([rng_state()]),
            "best": self.best,
            "waiting": dataclasses.asdict(self.examiner.waiting),
        }
        save = functools.partial(save_weights, model=self.step.model, processor=self.data.processor, weights=weights)
        with fail_on_all_ranks():
            if self.is_main_process:
                best_step = self.best["step"] if self.best else None
                save_checkpoint(self.output, num_steps, save, state, self.config.keep_last, best_step)

    def finish(self, retention: TextRetention | None) -> None:
        """Write the trained model, and the adapters alone when nothing else learned (all ranks).

        With the model go a hand-off probe and what later stages compare their text perplexity with.
        """
        weights, trained = self.step.weights(), trainable_state(self.step.objective, self.is_main_process)
        with fail_on_all_ranks():
            if not self.is_main_process:
                return
            peft_model = self.step.trainable.peft_model
            if peft_model is not None and all(".lora_" in name for name in trained):
                write_adapter(self.output / "adapter", peft_model, trained)
            batch = next(iter(self.data.batches()))
            parts = (self.step.model.config, self.data.processor, weights, batch, self._bare_record(retention))
            settings = {
                "generation_config": self.step.model.generation_config,
                "dtype": getattr(torch, self.config.save_dtype),
            }
            write_model(self.output / "model", *parts, **settings)

    def _bare_record(self, retention: TextRetention | None) -> BareRecord | None:
        """The bare language model's perplexity: measured here, or handed on from the start checkpoint."""
        if retention:
            return retention.record
        return read_record(Path(self.config.model.checkpoint)) if self.config.model.checkpoint else None
