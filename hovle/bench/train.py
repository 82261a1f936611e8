"""Time training: our packed, compiled loop, each of its parts switched off, and transformers' Trainer beside it.

Every variant sees the same conversations with one question each, in the same order, from the same weights, with a
frozen language model. In the mix `shared` several of them are about one picture: packed rows hold it once for all,
others once for each. The learning rate is 0, so that the optimizer does its work and moves nothing: the loss on the
same samples must then be the same however they are batched, and a variant that differs stops the benchmark. It is
compared in float32, in a pass that is not timed: over so few tokens of an untrained model the rounding of bfloat16
alone moves it by a percent on some processors. Each variant runs in a process of its own: a first pass over the
samples warms up and compiles, the faster of two more counts.

A step of distillation and of alignment is taken apart as well: its matrix products are timed alone at their own
shapes, and the share of a step they explain is the share of this machine's peak that the step reaches.
"""

import argparse
import dataclasses
import io
import json
import math
import multiprocessing
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from ..charts import load_pyplot
from ..machine.memory import keep_freed_memory
from ..machine.processes import end_with_parent
from ..machine.speed import fastest_dtype
from ..model.modeling_hovle import IGNORE_INDEX
from ..model.pictures import load_picture
from ..train.config import EasyVqaData, StageConfig, load_stage
from ..train.data.batch import BatchLayout, PackedBatch
from ..train.data.packing import pack_rows
from ..train.data.readers import load_records
from ..train.data.records import Record, picture_item, picture_sources
from ..train.data.samples import ReplySamples, Sample
from ..train.data.tiles import PixelNormalization
from ..train.data.transforms import limited_processor
from ..train.model.parameters import select_trainable, store_parameters
from ..train.model.start import start_model
from ..train.monitor.run_log import run_environment
from ..train.objectives.base import ObjectiveOutput
from ..train.objectives.distillation import norm_ratio
from ..train.objectives.next_token import NextTokenObjective
from ..train.parallel import OneProcess, make_accelerator
from ..train.run.benchmark_step import BenchmarkStep
from ..train.step.assembly import TrainableStep, prepare_model

MIXES = ("easy_vqa", "skewed", "shared")
"""easy_vqa: short questions of similar length. skewed: the same pictures with passages of long-tailed length. shared:
5 to 10 questions about each picture, which is cut into 6 tiles and a thumbnail."""

LOSS_TOLERANCE = 1e-4
"""Largest relative difference between variants in float32."""

TIMED_LOSS_TOLERANCE = 0.05
"""Largest relative difference between the passes that are timed, in bfloat16, and the one in float32: far more than
rounding does, far less than a fault."""

SHARED_MAX_TILES = 6
"""Most tiles of a picture in the mix `shared`, its thumbnail not counted."""

NUM_TIMED_PASSES = 2

MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")

KINDS = {
    "matrix products": r"^aten::(add|b|badd)?mm$",
    "fused element-wise kernels": "CompiledFxGraph",
    "convolutions, batch norms": "conv|batch_norm|upsample",
    "optimizer": "adamw|norm",
    "copies and casts": "aten::(copy_|_to_copy|fill_|cat|index)",
}
"""Kind of work -> names of its operations in a profile; the first match counts."""

SETTINGS = (
    "model.checkpoint=null",
    "model.language_model=asset:smollm2-135m-instruct",
    "model.num_embedding_layers=8",
    "model.image_size=112",
    "model.max_tiles=1",
    "learning_rate=0.0",
    "compile=on",
    "output=unused",
)
"""What the demo's recipes become here: a new model of 8 holistic layers at learning rate 0."""


@dataclass(frozen=True)
class Variant:
    """A way to train."""

    name: str
    packed: bool = True
    """Several samples in a row; otherwise one, padded to the longest of the batch."""
    compiled: bool = True
    """Decoder layers compiled."""
    sparse_logits: bool = True
    """Logits at supervised positions only."""
    keeps_memory: bool = True
    """Freed memory stays with the process."""
    trainer: bool = False
    """transformers' Trainer instead of our loop."""


VARIANTS = (
    Variant("ours"),
    Variant("not packed", packed=False),
    Variant("not compiled", compiled=False),
    Variant("logits everywhere", sparse_logits=False),
    Variant("memory given back", keeps_memory=False),
    Variant("Trainer", packed=False, compiled=False, sparse_logits=False, keeps_memory=False, trainer=True),
)


@dataclass(frozen=True)
class Shape:
    """Size of the batches a mix is cut into; padded and packed ones hold about as many tokens."""

    rows: int
    row_length: int
    samples_per_padded_batch: int


SHAPES = {"easy_vqa": Shape(16, 58, 32), "skewed": Shape(3, 512, 12), "shared": Shape(16, 212, 24)}


@dataclass
class Measured:
    """What one variant took."""

    name: str
    seconds: float
    supervised_tokens_per_second: float
    tokens_per_second: float
    """Tokens of the conversations; which of them are computed, and how often, is up to the variant."""
    padding_ratio: float
    num_batches: int
    nats_per_token: float
    """Mean loss over the supervised tokens of all samples, in float32."""
    timed_nats_per_token: float
    """The same of the last timed pass, in the number format of the run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle bench train`."""
    parser.add_argument("--mix", choices=MIXES, nargs="+", default=list(MIXES), help="samples to train on")
    parser.add_argument("--samples", type=int, default=128, help="conversations of each mix")
    parser.add_argument("--output", type=Path, default=Path("eval/results/speed"), help="folder of train.json, .png")


def run(args: argparse.Namespace) -> int:
    """Take two steps apart, time every variant on every mix, write `train.json` and `train.png`."""
    config = bench_config("alignment")
    accelerator = make_accelerator()
    dtype = fastest_dtype(accelerator.device)
    result: dict[str, Any] = {"environment": run_environment(dtype, True, accelerator), "mixes": {}, "steps": {}}
    for stage in ("distillation", "alignment"):
        result["steps"][stage] = take_apart(bench_config(stage), accelerator, dtype)
        _say(f"{stage}: MFU {result['steps'][stage]['mfu']:.0%}, of the peak of its own matrix products")
    for mix in args.mix:
        measured = compare(mix, args.samples, config, dtype, accelerator.device)
        result["mixes"][mix] = {
            "num_samples": args.samples,
            **asdict(SHAPES[mix]),
            "variants": [asdict(item) for item in measured],
            "speedup_over_trainer": measured[0].supervised_tokens_per_second
            / measured[-1].supervised_tokens_per_second,
        }
        _say(table(mix, measured))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "train.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result["steps"], args.output / "train.png")
    _say(f"Written: {args.output / 'train.json'}, {args.output / 'train.png'}")
    return 0


def bench_config(stage: str) -> StageConfig:
    """A demo stage with a new model in the demo's short turns, at learning rate 0."""
    config = load_stage(f"demo/{stage}", SETTINGS)
    template = load_stage("demo/distillation").model.chat_template
    return dataclasses.replace(config, model=dataclasses.replace(config.model, chat_template=template))


def compare(
    mix: str,
    num_samples: int,
    config: StageConfig,
    dtype: torch.dtype,
    device: torch.device,
    variants: Sequence[Variant] = VARIANTS,
    run: Callable[..., Measured] | None = None,
) -> list[Measured]:
    """Time variants on the same samples.

    Args:
        mix: One of `MIXES`.
        num_samples: Conversations of it.
        config: Model and optimizer.
        dtype: Number format of matrix products.
        device: Where.
        variants: The first one is what the others' losses are compared with.
        run: Calls a function with arguments; by default in a process of its own.

    Raises:
        ValueError: When a variant's loss differs from the first one's, or from that of its timed passes.
    """
    measured: list[Measured] = []
    for variant in tqdm(variants, desc=mix, unit="variant"):
        arguments = variant, mix, num_samples, SHAPES[mix], config, dtype, device
        measured.append((run or in_own_process)(time_variant, *arguments))
        check_loss(measured[0], measured[-1])
    return measured


def in_own_process(function: Callable[..., Measured], *args) -> Measured:
    """Call a function in a new process: how memory is kept, and what is compiled, stays with a process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=end_with_parent) as pool:
        return pool.submit(function, *args).result()


def time_variant(
    variant: Variant,
    mix: str,
    num_samples: int,
    shape: Shape,
    config: StageConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> Measured:
    """Time one variant on the samples of a mix."""
    if variant.keeps_memory:
        keep_freed_memory(device)
    torch.manual_seed(config.seed)  # the stem is random: the same one for every variant
    model, processor = start_model(config)
    if mix == "shared":
        processor = limited_processor(dataclasses.replace(config, max_tiles_per_picture=SHARED_MAX_TILES), processor)
    maker = ReplySamples(processor)
    records = make_records(mix, num_samples)
    samples = [maker.make(record, index) for index, record in enumerate(records)]
    alone = [record.part([place]) for record in records for place in range(record.num_conversations)]
    conversations = [maker.make(record, index) for index, record in enumerate(alone)]
    if variant.trainer:
        select_trainable(model, config)
        model.to(device).train()
        padded = [pad_batch(part, maker) for part in cut(conversations, shape.samples_per_padded_batch)]
        exact = trainer_nats(model, padded, device)
        seconds, nats = time_trainer(model, padded, dtype)
        masks = [batch["attention_mask"] for batch in padded]
    else:
        config = dataclasses.replace(config, compile="on" if variant.compiled else "off")
        objective = NextTokenObjective(model) if variant.sparse_logits else _LogitsEverywhere(model)
        trainable = prepare_model(model, config, torch.float32, device)
        step = TrainableStep(trainable, objective, config, OneProcess(device), torch.float32).distribute()
        packed = make_batches(samples if variant.packed else conversations, variant.packed, shape, maker)
        packed = [batch.to(device) for batch in packed]
        exact = objective_nats(objective, packed)
        store_parameters(model, dtype)
        step.dtype = dtype
        seconds, nats = time_loop(step, packed)
        masks = [batch.is_sample for batch in packed]
    return summarise(variant.name, conversations, masks, seconds, exact, nats)


@torch.no_grad()
def objective_nats(objective: NextTokenObjective, batches: list[PackedBatch]) -> float:
    """Summed loss of all batches in nats, as the model computes it with the weights it has: in float32."""
    return sum(float(objective(batch).terms["cross_entropy"]) for batch in batches)


@torch.no_grad()
def trainer_nats(model: nn.Module, batches: list[dict], device: torch.device) -> float:
    """The same of padded batches whose labels the model shifts itself."""
    total = 0.0
    for batch in batches:
        inputs = {name: item.to(device) for name, item in batch.items()}
        total += float(model(**inputs).loss) * int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    return total


def check_loss(first: Measured, other: Measured) -> None:
    """Raise where two variants disagree on the loss of the same samples, or the passes of one do."""
    what = other.name, other.nats_per_token
    for tolerance, (name, nats), (other_name, other_nats) in (
        (LOSS_TOLERANCE, (first.name, first.nats_per_token), what),
        (TIMED_LOSS_TOLERANCE, what, (f"{other.name}, while it is timed,", other.timed_nats_per_token)),
    ):
        if not abs(other_nats / nats - 1) <= tolerance:
            raise ValueError(
                f"{other_name} has {other_nats:.4f} nats per token where {name} has {nats:.4f} on the same samples: "
                "they do not compute the same, so no speed is reported."
            )


def summarise(
    name: str,
    conversations: list[Sample],
    masks: list[torch.Tensor],
    seconds: float,
    exact_nats: float,
    nats: float,
) -> Measured:
    """Turn the seconds and summed nats of one pass over all batches, whose masks tell padding, into rates."""
    supervised = sum(int((sample.targets != IGNORE_INDEX).sum()) for sample in conversations)
    return Measured(
        name=name,
        seconds=seconds,
        supervised_tokens_per_second=supervised / seconds,
        tokens_per_second=sum(len(sample.input_ids) for sample in conversations) / seconds,
        padding_ratio=1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks),
        num_batches=len(masks),
        nats_per_token=exact_nats / supervised,
        timed_nats_per_token=nats / supervised,
    )


def make_records(mix: str, count: int) -> list[Record]:
    """So many conversations about easy-VQA pictures with one question each, drawn with a fixed seed."""
    generator = random.Random(0)
    most = 10 if mix == "shared" else 1
    records = load_records(EasyVqaData(questions_per_sample=most))
    assert isinstance(records, list)  # the asset is small
    if mix == "shared":
        return share_out([record for record in records if record.num_conversations == most], count, generator)
    chosen = generator.sample(records, count)
    if mix == "skewed":
        passages = read_passages()
        chosen = [add_passages(record, passages, generator) for record in chosen]
    return chosen


def share_out(records: list[Record], count: int, generator: random.Random) -> list[Record]:
    """So many conversations in records of 5 to 10 about one picture, which is large enough for all tiles."""
    generator.shuffle(records)
    chosen: list[Record] = []
    while count:
        sizes = [size for size in range(5, 11) if count == size or count - size >= 5] or [count]
        record = records[len(chosen)]
        [picture] = picture_sources(record.messages)
        large = picture_item(widen(picture))
        asked = [
            [{**turn, "content": [large, *turn["content"][1:]]}, reply]
            for turn, reply in [record.messages, *record.others][: generator.choice(sizes)]
        ]
        chosen.append(Record(record.name, asked[0], tuple(asked[1:])))
        count -= len(asked)
    return chosen


def widen(picture: str | bytes) -> bytes:
    """A picture in the middle of a canvas of 3 : 2, which is cut into 6 tiles; a PNG file."""
    small = load_picture(picture, kind="path")
    canvas = Image.new("RGB", (small.width * 3 // 2, small.height), small.getpixel((0, 0)))
    canvas.paste(small, (small.width // 4, 0))
    file = io.BytesIO()
    canvas.resize((canvas.width * 4, canvas.height * 4), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def read_passages() -> list[str]:
    """Words of English prose that every Python carries: its language reference."""
    from pydoc_data.topics import topics

    return re.findall(r"\S+", " ".join(topics[name] for name in sorted(topics)))


def add_passages(record: Record, words: list[str], generator: random.Random) -> Record:
    """Put a passage of long-tailed length into the question and another one into the reply of a record."""
    (question, reply), texts = record.messages, []
    for _ in range(2):
        length = min(120, math.ceil(generator.lognormvariate(math.log(15), 1.0)))  # words: median 15, a long tail
        start = generator.randrange(len(words) - length)
        texts.append(" ".join(words[start : start + length]))
    asked = [*question["content"], {"type": "text", "text": " " + texts[0]}]
    said = [{"type": "text", "text": reply["content"][0]["text"] + " " + texts[1]}]
    messages = [{**question, "content": asked}, {**reply, "content": said}]
    return Record(record.name, messages)


def make_batches(samples: list[Sample], packed: bool, shape: Shape, maker: ReplySamples) -> list[PackedBatch]:
    """Cut samples into packed batches, or into batches of one sample a row padded to the longest."""
    groups: list[list[list[Sample]]] = []
    if packed:
        left = samples
        while left:
            rows, left = pack_rows(left, [shape.row_length] * shape.rows)
            groups.append(rows)
        lengths = [shape.row_length] * len(groups)
    else:
        groups = [[[sample] for sample in part] for part in cut(samples, shape.samples_per_padded_batch)]
        lengths = [max(sample.num_inputs for [sample] in rows) for rows in groups]
    return [collate(rows, length, maker) for rows, length in zip(groups, lengths, strict=True)]


def cut(samples: list[Sample], size: int) -> list[list[Sample]]:
    """Parts of so many samples."""
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def collate(rows: list[list[Sample]], row_length: int, maker: ReplySamples) -> PackedBatch:
    """Lay samples out in rows as training does."""
    has_branches = any(sample.subsegment_ids is not None for row in rows for sample in row)
    layout = BatchLayout(maker, row_length, maker.processor.tokenizer.pad_token_id or 0, has_branches)
    return layout.complete(layout.lay_out(rows, lambda _: "bench"))


def time_loop(step: TrainableStep, batches: list[PackedBatch]) -> tuple[float, float]:
    """Seconds of the faster pass over the batches in our loop, once warm, and the last one's summed loss in nats."""
    times = []
    for _ in range(1 + NUM_TIMED_PASSES):
        started_at = time.perf_counter()
        results = [step.step(0, [batch]) for batch in batches]
        times.append(time.perf_counter() - started_at)
    nats = sum(result.loss * int(batch.is_supervised.sum()) for result, batch in zip(results, batches, strict=True))
    return min(times[1:]), nats


class _LogitsEverywhere(NextTokenObjective):
    """The same loss with logits at every position, as most trainers compute it."""

    def forward(self, batch: PackedBatch) -> ObjectiveOutput:
        """Sum of `-log p(token)` in nats over the supervised tokens of a batch."""
        outputs = self.model(
            input_ids=batch.input_ids,
            pixel_values=self.normalize(batch.pixel_values),
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        )
        logits, targets = outputs.logits, batch.targets
        nats = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        hits = (logits.argmax(dim=-1) == targets).sum().float()
        ratio = norm_ratio(outputs.image_hidden_states, self.text_norm)
        terms = {"cross_entropy": nats, "reply_accuracy": hits, "image_norm_ratio": ratio}
        return ObjectiveOutput(terms, self.counts(batch))


def time_trainer(model: nn.Module, batches: list[dict], dtype: torch.dtype) -> tuple[float, float]:
    """The same in transformers' Trainer, whose passes are epochs."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Stopwatch(TrainerCallback):
        """Notes when each epoch begins and ends."""

        epochs: list[list[float]] = []  # noqa: RUF012 - one stopwatch for one run

        def on_epoch_begin(self, *_, **__):
            self.epochs.append([time.perf_counter()])

        def on_epoch_end(self, *_, **__):
            self.epochs[-1].append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,  # one ready-made batch
            num_train_epochs=1 + NUM_TIMED_PASSES,
            learning_rate=0.0,
            weight_decay=0.05,
            bf16=dtype == torch.bfloat16,
            use_cpu=model.device.type == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
        )
        stopwatch = Stopwatch()
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=batches,
            data_collator=lambda items: items[0],
            callbacks=[stopwatch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    means = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-len(batches) :]
    # The model shifts the labels: the first token is predicted by none.
    counts = [int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches]
    nats = sum(mean * count for mean, count in zip(means, counts, strict=True))
    return min(ended_at - started_at for started_at, ended_at in stopwatch.epochs[1:]), nats


def pad_batch(samples: list[Sample], maker: ReplySamples) -> dict:
    """What a padding collator gives: whole samples, their labels, an attention mask instead of positions."""
    pad = maker.processor.tokenizer.pad_token_id or 0
    tiles = [maker.load_pixels(sample.name, sample.pictures, sample.num_tiles) for sample in samples]
    return {
        "input_ids": pad_sequence([sample.input_ids for sample in samples], True, pad),
        "labels": pad_sequence([sample.labels for sample in samples], True, IGNORE_INDEX),
        "pixel_values": PixelNormalization()(torch.cat(tiles)),
        "attention_mask": pad_sequence([torch.ones_like(sample.input_ids) for sample in samples], True),
    }


def take_apart(config: StageConfig, accelerator, dtype: torch.dtype, num_steps: int = 4) -> dict[str, Any]:
    """Seconds of a stage's step by kind of work, and the share of its matrix products' own peak it reaches.

    The peak is what the step's matrix products do when each runs alone, over and over, at its own shape in its fastest
    memory layout. Time in a teacher is not the student's: it is measured apart and taken off the step.

    Raises:
        ValueError: When the products alone take longer than the step they are part of, so something else was running.
    """
    benchmark = BenchmarkStep(config, accelerator, dtype, num_steps)
    benchmark.step_all()  # compiles
    teacher_time = benchmark.step.objective.teacher_time
    teacher_time.read()
    seconds = benchmark.step_all()
    teacher_seconds = teacher_time.read() / num_steps
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        benchmark.step_all()
    events = profiler.key_averages(group_by_input_shape=True)
    products = [
        (event.count, factors(event.key, event.input_shapes)) for event in events if event.key in MATRIX_PRODUCTS
    ]
    alone = sum(count * time_product(*shapes, dtype) for count, shapes in products) / num_steps
    flops = sum(count * count_flops(*shapes) for count, shapes in products) / num_steps
    if alone > seconds - teacher_seconds:
        raise ValueError(
            f"The matrix products of a step take {alone:.2f} s alone, the step with them "
            f"{seconds - teacher_seconds:.2f} s: something else was running. Close other programs and measure again."
        )
    return {
        "seconds": seconds,
        "teacher_seconds": teacher_seconds,
        "matrix_products_alone_seconds": alone,
        "peak_tflops": flops / alone / 1e12,
        "mfu": alone / (seconds - teacher_seconds),
        "tokens_per_second": sum(batch.num_tokens for step in benchmark.steps for batch in step) / num_steps / seconds,
        "seconds_by_kind": seconds_by_kind(profiler.key_averages(), num_steps),
    }


def factors(name: str, shapes: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Shapes of the two factors of a recorded matrix product, whose operands may begin with what it adds to."""
    first = 1 if "add" in name else 0  # `addmm(bias, left, right)`; a product may also name its output, after these
    return list(shapes[first]), list(shapes[first + 1])


def time_product(left: Sequence[int], right: Sequence[int], dtype: torch.dtype, num_runs: int = 8) -> float:
    """Least seconds of one matrix product of two shapes, over the memory layouts it may have."""
    a, b = torch.randn(left, dtype=dtype), torch.randn(right, dtype=dtype)
    layouts = [(a, b), (a, b.mT.contiguous().mT), (a.mT.contiguous().mT, b)]
    times = []
    for first, second in layouts:
        for _ in range(num_runs):
            started_at = time.perf_counter()
            first @ second
            times.append(time.perf_counter() - started_at)
    return min(times)


def count_flops(left: Sequence[int], right: Sequence[int]) -> int:
    """Floating-point operations of one product `(..., m, k) x (..., k, n)`."""
    return 2 * math.prod(left) * right[-1]


def seconds_by_kind(events: Iterable, num_steps: int) -> dict[str, float]:
    """Own seconds of a step's operations, by kind of work."""
    seconds: Counter = Counter()
    for event in events:
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "other")
        seconds[kind] += event.self_cpu_time_total / 1e6 / num_steps
    return dict(seconds.most_common())


def draw(steps: dict[str, dict], path: Path) -> None:
    """Draw where the seconds of each stage's step go, as stacked bars."""
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=(9, 1.2 + 0.9 * len(steps)))
    kinds = list(dict.fromkeys(kind for step in steps.values() for kind in step["seconds_by_kind"]))
    for row, step in enumerate(steps.values()):
        total, left = sum(step["seconds_by_kind"].values()), 0.0
        for color, kind in enumerate(kinds):
            share = step["seconds_by_kind"].get(kind, 0.0) / total
            axis.barh(row, share, left=left, color=f"C{color}", label=kind if row == 0 else None)
            left += share
    labels = [f"{stage}\nMFU {step['mfu']:.0%}" for stage, step in steps.items()]
    axis.set_yticks(range(len(steps)), labels)
    axis.set_xlabel("share of a training step")
    axis.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def table(mix: str, measured: list[Measured]) -> str:
    """Rates of all variants in columns, beside the Trainer's."""
    base = measured[-1].supervised_tokens_per_second
    lines = [f"{mix:<20}{'supervised tokens/s':>20}{'x Trainer':>11}{'padding':>9}{'nats/token':>12}"]
    for item in measured:
        rate = item.supervised_tokens_per_second
        lines.append(
            f"{item.name:<20}{rate:>20.1f}{rate / base:>11.2f}{item.padding_ratio:>9.1%}{item.nats_per_token:>12.4f}"
        )
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - this is the command's output
