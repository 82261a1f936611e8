"""Take the model's code along, so that a saved folder also loads where hovle is not installed.

With `trust_remote_code=True`, transformers finds the classes of a folder through `auto_map` in its config.json. Its
own saving names only the class that is saved, but engines ask for `AutoModel` where generation models are stored.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto import modeling_auto

if TYPE_CHECKING:
    # transformers fetches what a file's text imports, run or not. So all code comes with the first file that is asked
    # for, the config's, and whoever saves has it at hand, even if only the model or the processor was loaded.
    from .modeling_hovle import HoVLEModel  # noqa: F401
    from .processing_hovle import HoVLEProcessor  # noqa: F401

AUTO_MAP = {
    "AutoConfig": "configuration_hovle.HoVLEConfig",
    "AutoModel": "modeling_hovle.HoVLEModel",
    "AutoModelForImageTextToText": "modeling_hovle.HoVLEForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_hovle.HoVLEForConditionalGeneration",
    "AutoImageProcessor": "image_processing_hovle.HoVLEImageProcessor",
    "AutoProcessor": "processing_hovle.HoVLEProcessor",
}
"""Auto class -> file and class in a model folder."""


def copy_code(folder: str | Path) -> None:
    """Copy the files that `AUTO_MAP` names, and those they import, into a model folder."""
    for module in sorted({target.partition(".")[0] for target in AUTO_MAP.values()}):
        file = Path(__file__).with_name(f"{module}.py")
        for needed in [file, *map(Path, get_relative_import_files(file))]:
            shutil.copyfile(needed, Path(folder) / needed.name)


def register_names(model_type: str) -> None:
    """Enter the generation model into transformers' tables of names.

    `transformers serve` looks there, not among registered classes, for how to load a model and what it can read.
    """
    name = AUTO_MAP["AutoModelForImageTextToText"].rpartition(".")[2]
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type] = name
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[model_type] = name
