"""The folder of a run: who may use it, how far it is, and the model that is written into it at the end."""

import copy
import functools
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from ...files.atomic import is_locked, remove_leftovers, rename_durably, write_folder
from ...files.documents import load_yaml
from ...language.text_perplexity import RECORD, BareRecord, write_record
from ...model.configuration_hovle import HoVLEConfig
from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ...model.processing_hovle import HoVLEProcessor
from ..config import StageConfig
from ..data.batch import PackedBatch
from ..data.samples import reply_end_ids
from ..data.tiles import PixelNormalization
from ..parallel import gather
from .checkpoint import check_same_recipe, find_checkpoint
from .handoff import make_probe, write_probe

RECIPE = "recipe.yaml"
UNFINISHED_RECIPE = f".{RECIPE}.writing"
LOG = "log.jsonl"
START_FILES = {RECIPE, UNFINISHED_RECIPE, LOG, RECORD}
"""What a run leaves before its first step."""

SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings of generation that a random choice of tokens alone reads; published ones are often set without it."""


def check_unused(output: Path) -> None:
    """Raise where a run folder is not empty: one run per folder. A start that took no step is no run."""
    if _holds_files(output) and not _holds_failed_start(output):
        raise ValueError(
            f"Output folder {output} already holds a run. Continue it with --resume, or choose another output."
        )


def _holds_files(output: Path) -> bool:
    return output.exists() and any(path.name != UNFINISHED_RECIPE for path in output.iterdir())


def _holds_failed_start(output: Path) -> bool:
    """Whether a folder holds nothing but the recipe and the log of a run that ended before its first logged step.

    One that still goes on has locked it.
    """
    others = {path.name for path in output.iterdir()} - START_FILES
    if others or not (output / RECIPE).is_file() or is_locked(output):
        return False
    log = output / LOG
    return not log.is_file() or not any('"loss":' in line for line in log.read_text(encoding="utf-8").splitlines())


def check_resumable(output: Path, config: StageConfig) -> None:
    """Raise where a run folder holds another recipe's run, or files but no run; an empty or absent one is new."""
    recipe = output / RECIPE
    if recipe.is_file():
        check_same_recipe(config, load_yaml(recipe))
    elif _holds_files(output):
        raise ValueError(f"Cannot resume: {output} holds files but no {RECIPE}, so no run. Choose another output.")


def claim_output(output: Path, config: StageConfig, resume: bool) -> None:
    """Take a run folder once everything is set up; one that is resumed keeps its recipe and loses its leftovers."""
    if not resume:
        check_unused(output)
        for name in START_FILES:  # of a start that took no step
            (output / name).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    if not (output / RECIPE).is_file():
        unfinished = output / UNFINISHED_RECIPE
        unfinished.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
        rename_durably(unfinished, output / RECIPE)


def find_standing(output: Path) -> str | None:
    """Name of the folder that says how far a run is: `model`, its newest checkpoint, or None (all ranks)."""
    newest = find_checkpoint(output)
    own = newest.name if newest else None
    if (output / "model").is_dir():
        own = "model"
    found = gather([own])
    if len(set(found)) > 1:
        raise ValueError(
            f"The processes find different things in {output}: {', '.join(map(str, found))}. The output folder must "
            "lie on a disk that all nodes share."
        )
    return own


def save_weights(
    folder: Path, model: HoVLEForConditionalGeneration, processor: HoVLEProcessor, weights: dict[str, torch.Tensor]
) -> None:
    """Write model files into an existing folder: weights, config, processor."""
    if model.config.tie_word_embeddings:  # the cast may have made a copy of the table
        weights = {name: item for name, item in weights.items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)


def write_adapter(folder: Path, peft_model: Any, trained: dict[str, torch.Tensor]) -> None:
    """Write adapters, named as an objective names them, in peft's layout."""
    state = {f"base_model.{name}": item for name, item in trained.items()}
    write_folder(folder, functools.partial(peft_model.save_pretrained, state_dict=state))


def end_at_taught_replies(model: HoVLEForConditionalGeneration, processor: HoVLEProcessor) -> list[int]:
    """Let generation end where training teaches replies to end; whatever ended it before goes on doing so.

    Returns:
        What ends replies; empty where the chat template has no special token for it.
    """
    taught = reply_end_ids(processor)
    known = model.generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    ends = [*known, *(token for token in taught if token not in known)]
    if ends != known:
        model.generation_config.eos_token_id = ends
        if not model.generation_config.do_sample:  # then they mean nothing, but keep changed settings from being saved
            for name in SAMPLING_ONLY:
                setattr(model.generation_config, name, None)
    return taught


def write_model(
    folder: Path,
    config: HoVLEConfig,
    processor: HoVLEProcessor,
    weights: dict[str, torch.Tensor],
    batch: PackedBatch,
    record: BareRecord | None,
    generation_config: GenerationConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a model and what it says of a batch, computed free of all that training wrapped around it.

    Args:
        folder: Where it goes.
        config: Of the model.
        processor: Goes with it.
        weights: In float32.
        batch: What the probe for the next stage is made of.
        record: Of the bare language model; goes with it, if there is one.
        generation_config: Settings of generation; go with it, too.
        dtype: Number format it is stored in. The probe is made in float32 of the weights as they are stored.
    """
    with no_init_weights():
        model = HoVLEForConditionalGeneration(config)
    if generation_config is not None:
        model.generation_config = copy.deepcopy(generation_config)
    model.load_state_dict({name: item.to(dtype).float() for name, item in weights.items()}, assign=True)
    model.tie_weights()
    probe = make_probe(model, batch, PixelNormalization.of(processor.image_processor))
    stored = {name: item.to(dtype) for name, item in weights.items()}
    model.to(dtype)  # what is saved says which format it has

    def fill(temporary: Path) -> None:
        save_weights(temporary, model, processor, stored)
        write_probe(temporary, probe)
        if record is not None:
            write_record(temporary, record)

    write_folder(folder, fill)
