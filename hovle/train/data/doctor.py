"""Look through the data of a recipe before a run: what it will learn from, what it will leave out, and why.

Every source is read as a run would read it, pictures decoded, nothing trained. The report says, source by source, how
many samples, tokens, tiles and supervised tokens there are, what is skipped for which reason and the worst offenders,
and how often the run will go through the source; for the whole mix, how much of the rows is padding. A few samples
follow as the model will see them, with the tokens it learns to say in colour. A histogram of lengths is drawn beside.

examples:
  hovle data doctor my_stage.yaml                       the first 1000 records of every source, in training order
  hovle data doctor my_stage.yaml --samples 0           all records
  hovle data doctor my_stage.yaml row_length=2048       with a field of the recipe replaced
  hovle data doctor demo/alignment model.checkpoint=null model.language_model=asset:smollm2-135m-instruct
                                                        before the stage it starts from has run

Exit code 1 says that the run would stop, because more records are bad than max_skip_fraction allows: the run counts as
this does, each record once, whatever epoch reads it.
"""

import argparse
import itertools
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import printable, printable_name
from ...model.modeling_hovle import IGNORE_INDEX
from ...model.processing_hovle import HoVLEProcessor
from ..config import StageConfig, load_stage
from ..model.start import UNLIMITED, Positions, start_positions, start_processor
from .grouping import sharing_key
from .mixture import Mixture, MixtureReader, describe_size, open_mixture
from .packing import PackedBatches, StreamPosition
from .samples import RandomTextSamples, Sample, SampleMaker, was_split
from .skips import NO_FAULTS, NUM_WORST, UNREAD_KEY, SkipBudgetError, SkipSampleError, most_bad
from .transforms import make_transform

NUM_SHOWN = 5
"""Samples the report decodes."""

LEARNT, PLAIN = "\x1b[32m", "\x1b[0m"
"""Terminal codes around what is learnt: green, and back."""


@dataclass
class SourceReport:
    """What a scan found in one source."""

    label: str
    share: float
    """Of the samples of the mix."""
    size: str
    """How many records it has."""
    num_records: int | None
    """None for a stream."""
    left_aside: list[str] = field(default_factory=list)
    """What of its folder is not read."""
    num_scanned: int = 0
    num_conversations: int = 0
    """In the records that were scanned."""
    num_sharing: int = 0
    """Conversations that share their pictures' tokens with others."""
    shown: Counter = field(default_factory=Counter)
    """What conversations can share (`sharing_key`) -> how many do."""
    num_bad: int = 0
    """Records that were scanned and have a fault."""
    num_split: int = 0
    num_tiles: int = 0
    num_supervised: int = 0
    lengths: list[int] = field(default_factory=list)
    """Tokens of each sample."""
    reasons: Counter = field(default_factory=Counter)
    worst: Counter = field(default_factory=Counter)
    """(name, detail) -> times skipped."""
    unread: Counter = field(default_factory=Counter)
    """Which keys nobody reads -> rows that have them."""
    examples: list[Sample] = field(default_factory=list)


@dataclass
class DataReport:
    """What a scan found in the mix."""

    sources: list[SourceReport]
    padding_ratio: float | None
    """Share of padding in packed rows; None where no batch could be packed."""
    num_draws: float
    """Records the run will draw, estimated."""


def scan_source(mixture: Mixture, number: int, maker: SampleMaker, config: StageConfig, limit: int) -> SourceReport:
    """Read up to `limit` records of a source (0: all) in an order of training, pictures included."""
    size = len(mixture.lists[number]) if number in mixture.lists else None
    if size is None and limit == 0:
        raise ValueError(f"{mixture.labels[number]} is a stream without a known end: bound the scan with --samples.")
    share = float(mixture.weights[number] / sum(mixture.weights))
    left_aside = list(getattr(mixture.sources[number], "left_aside", ()))
    report = SourceReport(mixture.labels[number], share, describe_size(mixture.sources[number]), size, left_aside)
    reader = MixtureReader(Mixture([mixture.sources[number]], mixture.seed), 0, 1, {})
    for index in range(min(limit or size or 0, size or limit)):
        try:
            record = reader.record_at(index)
            made = maker.make_all(record, index, config.longest_sample, config.max_tiles_per_batch)
            report.num_conversations += record.num_conversations
            if not isinstance(maker, RandomTextSamples):  # which has one question per picture at most
                report.shown.update(filter(None, map(sharing_key, (record.messages, *record.others))))
        except SkipSampleError as error:
            made = [error]
            report.num_conversations += 1
        report.num_scanned += 1
        report.num_split += was_split(made)
        report.num_bad += sum(_count(report, item, maker) for item in made) > 0  # all are counted
    return report


def _count(report: SourceReport, item: Sample | SkipSampleError, maker: SampleMaker) -> bool:
    """Count a sample or why there is none; whether that is a fault."""
    if isinstance(item, Sample):
        try:
            maker.load_pixels(item.name, item.pictures, item.num_tiles)
        except SkipSampleError as error:
            item = error
    if isinstance(item, SkipSampleError) and item.reason == UNREAD_KEY:
        report.unread[item.detail] += 1  # of a row that is used
        return False
    if isinstance(item, SkipSampleError):
        report.reasons[item.reason] += 1
        report.worst[item.name, item.detail] += 1
        return item.reason not in NO_FAULTS
    report.lengths.append(item.num_inputs)
    report.num_tiles += sum(item.num_tiles)
    if item.subsegment_ids is not None:
        report.num_sharing += int(item.subsegment_ids.max())
    is_distilled = isinstance(maker, RandomTextSamples)  # every token has a target there
    report.num_supervised += len(item.labels) if is_distilled else int((item.labels != IGNORE_INDEX).sum())
    if len(report.examples) < NUM_SHOWN:
        report.examples.append(item)
    return False


def measure_padding(mixture: Mixture, maker: SampleMaker, config: StageConfig, limit: int) -> float | None:
    """Share of padding in batches packed from about so many conversations of the mix."""
    batches = PackedBatches(mixture, maker, config, StreamPosition(), 0, 1, 0)
    num_drawn = num_places = num_filled = 0
    try:
        for plan in batches.plans():
            is_sample = plan.tokens["document_ids"] >= 0
            num_places += is_sample.numel()
            num_filled += int(is_sample.sum())
            num_drawn += plan.num_drawn
            if num_drawn >= limit:
                break
    except SkipBudgetError:
        return None
    return 1 - num_filled / num_places


def examine(
    config: StageConfig,
    processor: HoVLEProcessor,
    limit: int,
    positions: Positions = UNLIMITED,
    num_processes: int = 1,
) -> DataReport:
    """Look through the sources of a recipe and pack some of the mix.

    Args:
        config: The recipe.
        processor: Of the model it trains.
        limit: Records read of each source; 0 for all.
        positions: Of that model.
        num_processes: Processes of the planned run, for the number of epochs.
    """
    mixture = open_mixture(config.data, config.seed)
    maker = make_transform(config, processor, positions)
    sources = [scan_source(mixture, number, maker, config, limit) for number in range(len(mixture.sources))]
    padding = measure_padding(mixture, maker, config, limit or sum(source.num_conversations for source in sources))
    places = config.num_steps * config.gradient_accumulation_steps * num_processes
    places *= config.rows_per_batch * config.row_length
    tokens_per_draw = sum(source.share * sum(source.lengths) / source.num_scanned for source in sources)
    draws = places * (1 - padding) / tokens_per_draw if padding is not None and tokens_per_draw else 0.0
    return DataReport(sources, padding, draws)


def would_stop(source: SourceReport, config: StageConfig) -> bool:
    """Whether a run that reads all of this source would stop; of a bounded scan, an estimate."""
    size = source.num_records or source.num_scanned
    return source.num_bad * size > source.num_scanned * most_bad(config.max_skip_fraction, size)


def describe_source(source: SourceReport, report: DataReport, config: StageConfig) -> list[str]:
    """Lines about one source."""
    is_bounded = source.num_records != source.num_scanned
    tokens = sum(source.lengths)
    lines = [f"{source.label}: {source.size}, {source.share:.1%} of the samples"]
    if is_bounded:
        lines.append(f"  scanned        {source.num_scanned:,} records only; --samples 0 reads all")
    lines += [f"  {line}" for line in source.left_aside]
    lines.append(
        f"  samples        {len(source.lengths):,}, {tokens:,} tokens, {source.num_tiles:,} tiles"
        + (f"; {source.num_split:,} conversations cut between turns" if source.num_split else "")
    )
    num_alike = sum(count for count in source.shown.values() if count > 1)
    if num_alike:
        lines.append(
            f"  pictures       {num_alike:,} of {source.num_conversations:,} conversations could share theirs, up to "
            f"{max(source.shown.values())} at a time; {source.num_sharing:,} do (questions_per_sample)"
        )
    if tokens:
        ordered = sorted(source.lengths)
        middle = ordered[len(ordered) // 2]
        lines.append(
            f"  length         {ordered[0]} to {ordered[-1]} tokens, median {middle}, row {config.row_length}"
        )
        lines.append(f"  supervised     {source.num_supervised / tokens:.1%} of the tokens")
    if source.num_records and config.num_steps:
        lines.append(f"  run            {report.num_draws * source.share / source.num_records:.2f} epochs (estimated)")
    lines += [
        f"  not read       {count:,} rows: {printable_name(keys)}"
        for keys, count in source.unread.most_common(NUM_WORST)
    ]
    num_made = len(source.lengths) + source.reasons.total()
    for reason, count in source.reasons.most_common():
        lines.append(f"  skipped        {count:,} ({count / num_made:.2%}): {reason}")
    lines += [
        f"    {printable_name(name)}: {printable_name(detail)}"
        for (name, detail), _ in source.worst.most_common(NUM_WORST)
    ]
    if len(source.worst) > NUM_WORST:
        lines.append(f"    ... and {len(source.worst) - NUM_WORST:,} more")
    return lines


def describe_data(report: DataReport, config: StageConfig) -> str:
    """The report without its samples."""
    lines = [line for source in report.sources for line in describe_source(source, report, config)]
    if report.padding_ratio is None:
        lines.append("whole mix: no batch could be packed, because too many samples in a row are skipped")
    else:
        lines.append(f"whole mix: {report.padding_ratio:.1%} of the rows is padding")
    stopping = [source.label for source in report.sources if would_stop(source, config)]
    if stopping:
        lines.append(f"A run would stop: {', '.join(stopping)} skips more than {config.max_skip_fraction:.2%}.")
    return "\n".join(printable(line, kept="") for line in lines)


def show_sample(sample: Sample, processor: HoVLEProcessor, learnt: str, plain: str) -> str:
    """A sample as text, its pictures as counts, what is learnt between `learnt` and `plain`."""
    pieces = []
    tokens = zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True)
    kinds = ((token, token == processor.image_token_id, label != IGNORE_INDEX) for token, label in tokens)
    for (is_image, is_learnt), run in itertools.groupby(kinds, key=lambda item: item[1:]):
        ids = [token for token, _, _ in run]
        text = f"[{len(ids)} image tokens]" if is_image else printable(processor.tokenizer.decode(ids))
        pieces.append(f"{learnt}{text}{plain}" if is_learnt else text)
    return f"--- {printable_name(sample.name)} ({len(sample.input_ids)} tokens)\n" + "".join(pieces).rstrip("\n")


def draw_lengths(report: DataReport, config: StageConfig, path: Path) -> None:
    """Draw a histogram of the sample lengths of every source."""
    from matplotlib.figure import Figure  # an extra: training does without it

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    bins = [config.row_length * place / 60 for place in range(61)]
    for source in report.sources:
        axes.hist(source.lengths, bins=bins, histtype="step", linewidth=1.5, label=source.label)
    axes.axvline(config.row_length, color="grey", linestyle=":", label="row_length")
    scale = "log" if any(source.lengths for source in report.sources) else "linear"
    axes.set(xlabel="tokens of a sample", ylabel="samples", yscale=scale, title="Sample lengths by source")
    axes.legend()
    figure.savefig(path, dpi=120)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hovle data doctor`."""
    parser.add_argument("recipe", help="YAML file, or the name of a shipped recipe such as demo/alignment")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace fields; dots reach nested ones")
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help="records per source; 0: all (1000)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes of the planned run (1)")
    parser.add_argument("--out", type=Path, default=Path("data_doctor.png"), help="histogram (data_doctor.png)")


def run(args: argparse.Namespace) -> int:
    """Print the report and draw the histogram; exit code 1 where a run would stop."""
    if args.samples < 0 or args.processes < 1:
        raise ValueError("--samples must be 0 or more, --processes 1 or more.")
    config = load_stage(args.recipe, args.overrides)
    processor = start_processor(config.model)
    report = examine(config, processor, args.samples, start_positions(config.model), args.processes)
    print(describe_data(report, config))  # noqa: T201 - this is the command's output
    colours = (LEARNT, PLAIN) if sys.stdout.isatty() else (">>", "<<")
    print(f"\nSamples; {colours[0]}this{colours[1]} is what the model learns to say.")  # noqa: T201
    in_turn = itertools.chain(*itertools.zip_longest(*(source.examples for source in report.sources)))
    for sample in itertools.islice(filter(None, in_turn), NUM_SHOWN):
        print(show_sample(sample, processor, *colours))  # noqa: T201
    draw_lengths(report, config, args.out)
    print(f"\nHistogram of lengths: {args.out}")  # noqa: T201
    return int(report.padding_ratio is None or any(would_stop(source, config) for source in report.sources))
