"""A few real steps of a stage's shapes with random weights and data, measured, to hold a plan against.

`hovle plan CONFIG --check` runs this file in a process of its own, so that its peak memory is the stage's.
"""

import contextlib
import dataclasses
import importlib
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...machine.memory import keep_freed_memory, peak_resident_bytes
from ...model.configuration_hovle import HoVLEConfig
from ...model.modeling_hovle import IGNORE_INDEX, HoVLEForConditionalGeneration
from ..config import ExpectedData, NextTokenConfig, StageConfig, TeacherConfig, WordsConfig, load_stage
from ..data.batch import PackedBatch, TileBatch
from ..data.words import join_targets, no_words
from ..model.bare_language_model import BareLanguageModel
from ..model.parameters import parameter_groups
from ..objectives.base import Objective
from ..objectives.choice import held_language
from ..objectives.distillation import DistillationObjective
from ..objectives.next_token import NextTokenObjective
from ..objectives.teachers import Targets, make_teacher, side_by_side
from ..objectives.words import num_character_classes
from ..parallel import OneProcess
from ..step.assembly import TrainableModel, TrainableStep, number_format, prepare_model
from .cost import FROM_LANGUAGE_MODEL, Workload
from .operations import operation_counter
from .shapes import teacher_shapes


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the steps took."""

    flops: int
    """Operations of one micro-batch, by torch's counter."""
    process_bytes: int
    """Memory of the process before it had a model: Python and the libraries a step loads."""
    peak_bytes: int
    """Most memory it held during the steps."""
    step_seconds: float
    """The last step."""
    workload: Workload
    """What the micro-batch held."""


def random_batch(config: StageConfig, model: HoVLEConfig) -> PackedBatch:
    """A packed micro-batch of random tokens and pixels, its samples as the recipe's `expected` describes them."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.rows_per_batch, config.row_length)
    ids = torch.randint(model.text_config.vocab_size - 1, shape, generator=generator)
    input_ids = ids + (ids >= model.image_token_id)  # any token but the placeholder
    targets = torch.full(shape, IGNORE_INDEX)
    position_ids = torch.zeros(shape, dtype=torch.long)
    is_sample = torch.zeros(shape, dtype=torch.bool)
    samples = random_samples(config, model)
    tiles_of_next, length, num_supervised = next(samples)
    num_tiles = num_samples = 0
    for row in range(config.rows_per_batch):
        end = config.language_length if row >= config.rows_per_batch - config.num_language_rows else 0
        position_ids[row, :end] = torch.arange(end)
        is_sample[row, :end] = True
        while end + length <= config.row_length:
            start, end = end, end + length
            input_ids[row, start : start + tiles_of_next * model.image_seq_length] = model.image_token_id
            targets[row, end - num_supervised : end] = input_ids[row, end - num_supervised : end]
            position_ids[row, start:end] = torch.arange(length)
            is_sample[row, start:end] = True
            num_tiles, num_samples = num_tiles + tiles_of_next, num_samples + 1
            tiles_of_next, length, num_supervised = next(samples)
        position_ids[row, end:] = torch.arange(config.row_length - end)
    tiles = (num_tiles, model.num_channels, model.image_size, model.image_size)
    batch = PackedBatch(
        input_ids=input_ids,
        targets=targets,
        position_ids=position_ids,
        is_sample=is_sample,
        pixel_values=torch.randint(256, tiles, generator=generator, dtype=torch.uint8),
        num_language_rows=config.num_language_rows,
        language_length=config.language_length,
        names=["random"] * num_samples,
    )
    words = config.objective.words if config.objective.name == "distillation" else None
    return batch if words is None else dataclasses.replace(batch, **random_words(config, model, words, batch))


def random_words(config: StageConfig, model: HoVLEConfig, words: WordsConfig, batch: PackedBatch) -> dict[str, Any]:
    """Fields of a batch whose image tokens say as many random words as the recipe's `expected` describes."""
    expected, generator = config.expected or ExpectedData(), torch.Generator().manual_seed(1)
    targets = no_words(len(batch.pixel_values), model.image_seq_length, words)
    num_tokens, num_samples = targets.word_ids.numel(), len(batch.names)
    places = _spread(round(num_samples * expected.word_pieces_per_sample), num_tokens)
    targets.word_ids.view(-1)[places] = torch.randint(
        model.text_config.vocab_size, (len(places),), generator=generator
    )
    if words.characters is not None:
        places = _spread(round(num_samples * expected.read_tokens_per_sample), num_tokens)
        shape = (len(places), words.characters.per_token)
        classes = torch.randint(num_character_classes(words.characters), shape, generator=generator)
        targets.character_ids.view(num_tokens, -1)[places] = classes
    return join_targets([targets])


def _spread(count: int, total: int) -> torch.Tensor:
    """So many of a number of places, at even distances; all where there are not so many."""
    count = min(count, total)
    return torch.arange(count) * total // max(count, 1)


def random_samples(config: StageConfig, model: HoVLEConfig) -> Iterator[tuple[int, int, int]]:
    """Tiles, length and supervised tokens of endless samples whose tiles add up to the expected number."""
    expected = config.expected or ExpectedData()
    num_text = round(expected.text_tokens_per_sample)
    if config.objective.name == "distillation":
        num_text += 2 * config.objective.num_random_tokens
    for index in itertools.count():
        per_sample = expected.tiles_per_sample
        num_tiles = round((index + 1) * per_sample) - round(index * per_sample)
        yield num_tiles, num_tiles * model.image_seq_length + num_text, round(expected.supervised_tokens_per_sample)


def measure_random_step(config: StageConfig, model_config: HoVLEConfig, dtype: torch.dtype, folder: Path) -> Measured:
    """Take three steps, the last under torch's counter of operations; layers run uncompiled.

    Args:
        config: The stage.
        model_config: Its model.
        dtype: Number format of matrix products.
        folder: An empty folder, for the random weights of teachers.
    """
    process = OneProcess(torch.device("cpu"))
    keep_freed_memory(process.device)  # as runs do
    warm_up(config, dtype)
    process_bytes = peak_resident_bytes()
    torch.manual_seed(0)
    config = dataclasses.replace(config, compile="off")
    trainable = prepare_model(random_model(model_config, dtype), config, dtype, process.device)
    objective = random_objective(config, trainable, dtype, folder)
    assembled = TrainableStep(trainable, objective, config, process, dtype).distribute()
    batch = random_batch(config, model_config)
    # Two stand for more: gradients of the first are there while the second runs.
    batches = [batch] * min(2, config.gradient_accumulation_steps)

    def step() -> float:
        started_at = time.perf_counter()
        assembled.step(0, batches)
        return time.perf_counter() - started_at

    step()  # after it the optimizer has its state
    step_seconds = step()
    peak_bytes = peak_resident_bytes()
    with operation_counter() as counter:
        step()
    flops = counter.get_total_flops() // len(batches)
    return Measured(flops, process_bytes, peak_bytes, step_seconds, Workload.of_batch(batch))


def warm_up(config: StageConfig, dtype: torch.dtype) -> None:
    """Import what the stage needs and take a step with a single number: libraries load parts when first used."""
    if config.lora is not None:
        importlib.import_module("peft")
    if config.teacher:
        importlib.import_module("timm")
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with number_format(torch.device("cpu"), dtype):
        loss = model(torch.ones(1, 1)).sum()
    loss.backward()
    optimizer.step()


def random_model(config: HoVLEConfig, dtype: torch.dtype) -> HoVLEForConditionalGeneration:
    """A model with random weights; those of its language model are as if released in `dtype`."""
    model = HoVLEForConditionalGeneration._from_config(config)
    groups = parameter_groups(model)
    for parameter in (item for name in FROM_LANGUAGE_MODEL for item in groups[name]):
        parameter.data = parameter.data.to(dtype).float()
    return model


def random_objective(config: StageConfig, trainable: TrainableModel, dtype: torch.dtype, folder: Path) -> Objective:
    """What `make_objective` builds from files, with random teachers."""
    model, text_table = trainable.model, trainable.text_table
    language = config.language
    if isinstance(config.objective, NextTokenConfig):
        held = None if language is None else held_language(config, BareLanguageModel(model, dtype))
        return NextTokenObjective(model, held=held)
    student_layers = [match.student for match in config.teacher[0].layers]
    targets = side_by_side([random_teacher(item, folder / "teacher.pt") for item in config.teacher])
    weight = None if language is None else language.weight
    return DistillationObjective(model, targets, text_table, config.objective, student_layers, language_weight=weight)


def random_teacher(config: TeacherConfig, weights: Path) -> Targets:
    """A teacher with random weights, written to a file to be loaded as others are, or what its cache would give."""
    if config.cache is not None:
        return RandomTargets(teacher_shapes(config).widths)
    import timm  # an extra: only distillation needs it

    torch.save(timm.create_model(config.name, pretrained=False).state_dict(), weights)
    return make_teacher(dataclasses.replace(config, checkpoint=str(weights)))


class RandomTargets(Targets):
    """What a cache of features would give."""

    def raw_targets(self, batch: TileBatch, grid_size: int) -> torch.Tensor:
        return torch.randn(len(batch.pixel_values), grid_size**2, sum(self.widths))


def main(folder: Path, dtype: str) -> None:
    """Take the steps of the recipe and model config of a folder; print what was measured as JSON."""
    config, model_config = load_stage(str(folder / "recipe.yaml")), HoVLEConfig.from_pretrained(folder)
    with contextlib.redirect_stdout(sys.stderr):
        measured = measure_random_step(config, model_config, getattr(torch, dtype), folder)
    print(json.dumps(dataclasses.asdict(measured)))  # noqa: T201 - this is the process's output


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
