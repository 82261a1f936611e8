"""Where a run starts: from the model the recipe names and, where it is resumed, from its newest checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from ...assets import resolve_asset
from ...errors import printable_name
from ...language.text_perplexity import TextRetention
from ...loading import reading
from ...machine.speed import choose_dtype, dtype_name
from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ...model.processing_hovle import HoVLEProcessor
from ...requirements import installed_version
from ..config import ConversationData, EasyVqaData, StageConfig
from ..data.packing import StreamPosition
from ..model.start import check_checkpoint, start_model, start_processor
from .checkpoint import check_same_run, find_checkpoint, load_training_state
from .handoff import check_handoff
from .random_numbers import seed_everything

Adapt = Callable[[HoVLEForConditionalGeneration], object]
"""What an experiment does to a model, in place."""


def check_start(config: StageConfig, dry_run: bool = False) -> None:
    """Refuse a start that cannot work by what is quickly read, before data are opened and weights loaded.

    A dry run measures no text, so it asks for nothing to compare it with.

    Raises:
        ValueError: For a package that is missing, a model folder that is damaged or whose weights are quantised, and
            for text retention without anything to compare with.
    """
    needed = {"lora": ("peft", "train"), "quantize_frozen": ("bitsandbytes", "quant")}
    wanted = [*(["lora"] if config.lora else []), *(["quantize_frozen"] if config.quantize_frozen != "none" else [])]
    for field in wanted:
        package, extra = needed[field]
        if installed_version(package) is None:
            raise ValueError(f"{field} needs {package}: pip install 'hovle[{extra}]' brings it.")
    named = {
        "model.checkpoint": config.model.checkpoint,
        "model.lower_layers": config.model.lower_layers,
        "model.language_model": config.model.language_model,
    }
    for field, name in named.items():
        if name is not None:
            _check_folder(field, resolve_asset(name))
    if config.retention is None or dry_run or find_checkpoint(Path(config.output)) is not None:
        return  # a run that goes on has its own record
    if config.retention.language_model is not None:
        _check_folder(
            "retention.language_model", resolve_asset(config.retention.language_model), may_be_quantized=True
        )
    TextRetention(config.retention, start_processor(config.model)).find_record(config.model.checkpoint)


def _check_folder(field: str, name: str, may_be_quantized: bool = False) -> None:
    """Raise ValueError for a damaged model folder, and for weights that were stored in few bits."""
    if field in ("model.checkpoint", "model.lower_layers"):
        check_checkpoint(name, field.removeprefix("model."))
    with reading(name):
        content, _ = PreTrainedConfig.get_config_dict(name)
    quantization = content.get("quantization_config") or (content.get("text_config") or {}).get("quantization_config")
    if quantization and not may_be_quantized:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise ValueError(
            f"{field}: the weights of {name} are quantised ({printable_name(method)}), and such weights cannot be "
            "trained, adapted or merged. Name the model they were made of; quantize_frozen holds its language model "
            "in 8 or 4 bits while a stage trains, with lora too."
        )


def load_start(
    config: StageConfig, adapt: Adapt | None = None
) -> tuple[HoVLEForConditionalGeneration, HoVLEProcessor, float | None]:
    """Load the model a stage starts from, in float32, with its processor, and check what it was handed on with.

    Args:
        config: The stage.
        adapt: Changes the model once it is checked, if anything does.

    Returns:
        Model, processor, and how far the model's answers are from those its stage ended with (`check_handoff`).
    """
    seed_everything(config.seed)
    model, processor = start_model(config)
    handoff = None
    if config.model.checkpoint is not None:
        handoff = check_handoff(model, Path(config.model.checkpoint))
    check_hd(config, model)
    if adapt is not None:
        adapt(model)
    return model, processor, handoff


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


def load_state(config: StageConfig, fingerprint: str, accelerator: Any) -> dict | None:
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


def agree_on_dtype(config: StageConfig, state: dict | None, accelerator: Any) -> torch.dtype:
    """Number format of the run, measured at most once: the same on every process and after resuming."""
    from accelerate.utils import broadcast_object_list

    name = state["dtype"] if state else dtype_name(choose_dtype(config.dtype, accelerator.device))
    return getattr(torch, broadcast_object_list([name])[0])
