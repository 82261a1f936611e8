"""Load what a model folder holds; whatever is wrong with its files is one line that names folder and file.

Commands, analyses and training all load here. Weight files are opened before a model is built, so that a truncated or
missing one is named at once instead of after minutes.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from safetensors.torch import load_file

from .errors import foreign_errors
from .files.checkpoint_files import CONFIG, HOVLE_CONFIG, refuse_damaged_weights
from .files.model_folder import refuse_missing_folder, refuse_missing_processor, refuse_unreadable_documents
from .model.configuration_hovle import HoVLEConfig
from .model.image_processing_hovle import HoVLEImageProcessor
from .model.language_model import load_language_model
from .model.modeling_hovle import HoVLEForConditionalGeneration
from .model.processing_hovle import HoVLEProcessor
from .packaged import resolve_model


@contextlib.contextmanager
def reading(model: str | os.PathLike, weights: bool = True, processor_alone: bool = False) -> Iterator[None]:
    """Read files of a model folder within; a Hub id is left to whoever reads it.

    Args:
        model: Model folder or Hub id.
        weights: Whether its weights are read, too.
        processor_alone: Whether a folder with a processor and no model will do.

    Raises:
        ValueError: For a folder without a model, for damaged JSON, and for weights that are truncated, missing or a
            Git LFS pointer, before anything is read; and for whatever the reading raises. The message is one line.
    """
    if processor_alone and (Path(model) / "processor_config.json").is_file():
        refuse_unreadable_documents(model)
    else:
        refuse_missing_folder(model)
    with foreign_errors(f"{os.fspath(model)} cannot be loaded"):
        if weights:
            refuse_damaged_weights(model)
        yield


def load_config(model: str | os.PathLike) -> HoVLEConfig:
    """Load the config of a saved HoVLE; errors as in `reading`. Here as below, `smol` names a shipped one."""
    model = resolve_model(model)
    with reading(model, weights=False):
        return HoVLEConfig.from_pretrained(model)


def load_model(model: str | os.PathLike, **options: Any) -> HoVLEForConditionalGeneration:
    """Load a saved HoVLE with options of `from_pretrained`; errors as in `reading`."""
    model = resolve_model(model)
    with reading(model):
        return HoVLEForConditionalGeneration.from_pretrained(model, **options)


def load_processor(model: str | os.PathLike) -> HoVLEProcessor:
    """Load the processor of a saved HoVLE; errors as in `reading`.

    ValueError also for a chat template that is no Jinja, and for an image processor that leaves it to the model to
    normalise with other numbers than its own.
    """
    model = resolve_model(model)
    with reading(model, weights=False, processor_alone=True):
        refuse_missing_processor(model)
        processor = HoVLEProcessor.from_pretrained(model)
        check_chat_template(processor)
        if processor.image_processor.gives_bytes() and (config := _config_beside(model)) is not None:
            check_statistics_agree(processor.image_processor, config)
    return processor


def _config_beside(model: str | os.PathLike) -> HoVLEConfig | None:
    """Config of the model a processor is for, exported or not; None where a folder holds a processor alone."""
    folder = Path(model)
    if (folder / HOVLE_CONFIG).is_file():
        return HoVLEConfig.from_json_file(folder / HOVLE_CONFIG)
    if folder.is_dir() and not (folder / CONFIG).is_file():
        return None
    return HoVLEConfig.from_pretrained(model)


def load_bare_model(name: str | os.PathLike, dtype: torch.dtype | None = None) -> Any:
    """Load a causal language model, from a folder or the Hub; errors as in `reading`."""
    with reading(name):
        return load_language_model(name, **({} if dtype is None else {"dtype": dtype}))


def check_statistics_agree(image_processor: HoVLEImageProcessor, config: HoVLEConfig) -> None:
    """Raise ValueError where tiles of bytes would be normalised otherwise than the image processor says."""
    statistics = [*np.broadcast_to(image_processor.image_mean, 3), *np.broadcast_to(image_processor.image_std, 3)]
    said = [float(number) for number in (*statistics, image_processor.rescale_factor)]
    done = [*config.image_mean, *config.image_std, 1 / 255]
    if len(said) != len(done) or not np.allclose(said, done, rtol=1e-6, atol=0):
        raise ValueError(
            "its image processor gives bytes (do_rescale, do_normalize: false) and says image_mean, image_std and "
            f"rescale_factor {said}, but the model would normalise with {done}: make its config.json say the same, or "
            "let the image processor normalise (do_rescale, do_normalize: true)."
        )


def load_in_order(model: Any, weights: Path) -> None:
    """Load a state dict whose tensors match those of a timm model one to one in order, whatever their names.

    One that lacks the classifier takes it from the model, too.
    """
    if not weights.is_file():
        raise ValueError(f"teacher.checkpoint: no file {weights}.")
    if weights.suffix == ".safetensors":
        source = load_file(weights)
    else:
        source = torch.load(weights, map_location="cpu", weights_only=True)
    target = model.state_dict()
    if set(source) == set(target):
        model.load_state_dict(source)
        return
    if len(source) < len(target):
        model.reset_classifier(0)
    if [tensor.shape for tensor in source.values()] != [tensor.shape for tensor in model.state_dict().values()]:
        raise ValueError(
            f"{weights.name} holds {len(source)} tensors that do not match the {len(target)} of the teacher in order "
            "and shape: are weights and teacher.name of the same model?"
        )
    model.load_state_dict(dict(zip(model.state_dict(), source.values(), strict=True)))


def check_chat_template(processor: Any) -> None:
    """Raise ValueError where a processor's chat template cannot be compiled; what it says is not looked at."""
    found = processor.chat_template
    templates = found if isinstance(found, dict) else {"chat template": found}
    for name, template in templates.items():
        if template is None:
            continue
        try:
            processor.tokenizer.apply_chat_template(
                [{"role": "user", "content": "?"}], chat_template=template, tokenize=False
            )
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"its {name} is no Jinja template: line {error.lineno}: {error.message}") from error
        except Exception:  # whether it takes this message is asked where it counts
            continue
