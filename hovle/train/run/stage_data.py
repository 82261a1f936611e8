"""The data of a run: what it trains on, what is held out, and what of either cannot be used."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from ...model.processing_hovle import HoVLEProcessor
from ..config import StageConfig
from ..data.batch import PackedBatch
from ..data.language import LanguageText, open_language
from ..data.mixture import Mixture, open_held_out
from ..data.packing import PackedBatches, StreamPosition, load_batches
from ..data.skips import NO_FAULTS, SkipLedger, describe_skips
from ..data.transforms import make_transform
from ..data.words import check_has_regions
from ..model.start import UNLIMITED, Positions, start_positions, start_processor
from ..parallel import OneProcess, fail_on_all_ranks, gather


def with_counted_steps(config: StageConfig, mixture: Mixture, accelerator: Any) -> StageConfig:
    """The config with the number of steps that its `num_epochs` takes; one without stays as it is.

    One epoch is packed without its pictures, as a single process with one micro-batch in a step would.

    Raises:
        ValueError: For a stream, whose end nobody knows, and for a num_steps that does not follow from num_epochs.
    """
    if not config.num_epochs:
        return config
    if mixture.num_records is None:
        streams = ", ".join(mixture.labels[number] for number in mixture.streams)
        raise ValueError(f"num_epochs needs sources whose end is known, and {streams} is a stream: set num_steps.")
    alone = dataclasses.replace(config, gradient_accumulation_steps=1)
    processor, positions = start_processor(config.model), start_positions(config.model)
    batches = StageData(alone, mixture, processor, OneProcess(accelerator.device), None, positions).batches()
    count, packed, total = 0.0, 0, mixture.num_records
    for plan in batches.plans():
        assert plan.position is not None  # a stream's plans know it
        [shard] = plan.position.shards.values()
        before, packed = packed, shard.next_index - len({index for index, _ in shard.pending})
        if packed >= total:
            count += (total - before) / (packed - before)  # of the last batch
            break
        count += 1
    in_a_step = config.gradient_accumulation_steps * accelerator.num_processes
    num_steps = math.ceil(config.num_epochs * count / in_a_step)
    accelerator.print(
        f"num_epochs {config.num_epochs:g} x {count:,.1f} batches, {in_a_step} in a step: {num_steps:,} steps."
    )
    if config.num_steps not in (0, num_steps):
        raise ValueError(
            f"num_steps ({config.num_steps}) is not what num_epochs ({config.num_epochs:g}) takes, {num_steps}: leave "
            "one of them out."
        )
    return dataclasses.replace(config, num_steps=num_steps)


class StageData:
    """Batches of one process.

    Args:
        config: The stage.
        mixture: What training reads.
        processor: Of the model.
        accelerator: Knows the processes.
        state: What the checkpoint to resume from holds, or None.
        positions: Of the model.
    """

    def __init__(
        self,
        config: StageConfig,
        mixture: Mixture,
        processor: HoVLEProcessor,
        accelerator: Any,
        state: dict | None = None,
        positions: Positions = UNLIMITED,
    ):
        self.config = config
        self.mixture = mixture
        self.processor = processor
        self.accelerator = accelerator
        self.positions = positions
        self.start = StreamPosition()
        self.skips = SkipLedger(config.max_skip_fraction, mixture.size_of)
        check_has_regions(config, mixture)
        self.language: LanguageText | None
        self.held_out_language: LanguageText | None
        self.language, self.held_out_language = open_language(config, processor) or (None, None)
        self.language_fingerprint = self.language.fingerprint if self.language else None
        if state:
            saved, found = state.get("language_fingerprint"), self.language_fingerprint
            if saved != found:
                raise ValueError(
                    f"Cannot resume: the text of language.source changed (fingerprint {saved} -> {found}). Restore "
                    "it, or start in a new output folder."
                )
            self.start = StreamPosition.join([state["position"]])
            self.skips.load_state_dict(state["skips"])

    def _packed(self, mixture: Mixture, config: StageConfig, start: StreamPosition, **options) -> PackedBatches:
        maker = make_transform(config, self.processor, self.positions)
        pad_token_id = self.processor.tokenizer.pad_token_id or 0
        return PackedBatches(mixture, maker, config, start, pad_token_id=pad_token_id, **options)

    def batches(self, start: StreamPosition | None = None) -> PackedBatches:
        """Training batches of this process, from the beginning or from a position."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        return self._packed(
            self.mixture,
            self.config,
            start or StreamPosition(),
            rank=rank,
            world_size=world_size,
            language=self.language,
        )

    def training_batches(self) -> Iterator[PackedBatch]:
        """What training reads, from where an earlier run left it; skips are noted."""
        for batch in load_batches(self.batches(self.start), self.config.num_workers):
            self.skips.add(batch)
            yield batch

    def held_out_batches(self) -> list[PackedBatch]:
        """The first batches of the validation source, no record twice: the same on every process (all ranks).

        They are packed as one process with one micro-batch in a step would, so that neither number changes them.
        """
        if not self.config.holds_out:
            return []
        with fail_on_all_ranks():
            mixture = open_held_out(self.config)
            config = dataclasses.replace(self.config, gradient_accumulation_steps=1)
            stream = self._packed(
                mixture, config, StreamPosition(), rank=0, world_size=1, once=True, language=self.held_out_language
            )
            batches = list(itertools.islice(stream, self.config.num_validation_batches))
            skips = SkipLedger(self.config.max_skip_fraction, mixture.size_of)
            for batch in batches:
                skips.add(batch)
            skips.share()
            skips.check()
            if not any(batch.names for batch in batches):
                raise ValueError(
                    f"The validation source {', '.join(mixture.labels)} has no sample that can be used.\n"
                    + describe_skips(skips.reasons, skips.worst)
                )
        return batches

    def usable(self, held_out: list[PackedBatch], log: Callable[[dict], None], step: int) -> list[PackedBatch]:
        """Held-out batches that hold a sample; what could not be used of any is logged."""
        for skip in (skip for batch in held_out for skip in batch.skips):
            log({"event": "skip", "step": step, **skip._asdict()})
        return [batch for batch in held_out if batch.names]

    def log_skips(self, log: Callable[[dict], None], step: int) -> dict:
        """Log each new skip of all processes, and give the counts for the step's own entry (all ranks)."""
        for skip in self.skips.share(gather):
            if skip.reason not in NO_FAULTS:  # no fault, and there may be millions: counted is enough
                log({"event": "skip", "step": step, **skip._asdict()})
        return self.skips.summary()
