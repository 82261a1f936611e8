"""What a dry run shows."""

from torch import nn

from ...errors import printable
from ...model.processing_hovle import HoVLEProcessor
from ..config import StageConfig
from ..data.batch import PackedBatch
from ..data.mixture import Mixture


def describe(
    objective: nn.Module, batch: PackedBatch, processor: HoVLEProcessor, mixture: Mixture, config: StageConfig
) -> str:
    """What a stage would train on what, in a few lines, with one decoded sample."""
    trained = sum(item.numel() for item in objective.parameters() if item.requires_grad)
    total = sum(item.numel() for item in objective.parameters())
    samples = len(batch.names)
    ends = (batch.position_ids[0, 1:] == 0).nonzero().flatten() + 1
    end = int(ends[0]) if len(ends) else config.row_length
    supervised = int(batch.is_supervised.sum())
    lines = [
        f"objective       {config.objective.name}",
        f"trains          {', '.join(config.trainable) or 'adapters'}: {trained:,} of {total:,} parameters",
        *(f"source          {line}" for line in mixture.describe()),
        f"one batch       {samples} samples in {config.rows_per_batch} rows of {config.row_length} tokens, "
        f"{len(batch.pixel_values)} tiles, {float(batch.is_sample.float().mean()):.1%} filled, "
        f"{supervised} supervised tokens",
        *describe_language(batch, config),
        f"whole run       {config.num_steps:,} steps of {config.gradient_accumulation_steps} batches",
        "first sample    " + printable(processor.tokenizer.decode(batch.input_ids[0, :end])),
    ]
    return "\n".join(lines)


def describe_language(batch: PackedBatch, config: StageConfig) -> list[str]:
    """On how much of which text a stage holds the language; nothing where it does not."""
    if config.language is None:
        return []
    num_tokens = batch.num_language_rows * batch.language_length
    share = num_tokens / batch.is_sample.numel()
    return [f"language        {config.language.source}: {num_tokens} tokens of a batch, {share:.1%} of its places"]
