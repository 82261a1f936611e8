"""Make transformers' Auto classes, pipelines and savers know HoVLE."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

# From its own module: without torchvision, transformers 5.16 offers only a stand-in at the top level.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .model.configuration_hovle import HoVLEConfig
from .model.image_processing_hovle import HoVLEImageProcessor
from .model.language_model import READERS
from .model.modeling_hovle import HoVLEForConditionalGeneration, HoVLEModel
from .model.processing_hovle import HoVLEProcessor


def register_classes() -> None:
    """Register all classes under the model type `hovle`; `import hovle` does it."""
    AutoConfig.register("hovle", HoVLEConfig, exist_ok=True)
    AutoModel.register(HoVLEConfig, HoVLEModel, exist_ok=True)
    AutoModelForImageTextToText.register(HoVLEConfig, HoVLEForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(HoVLEConfig, HoVLEForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(
        HoVLEConfig,
        # One class under both names: its pixels do not depend on whether torchvision is installed.
        image_processor_classes={"pil": HoVLEImageProcessor, "torchvision": HoVLEImageProcessor},
        exist_ok=True,
    )
    AutoProcessor.register(HoVLEConfig, HoVLEProcessor, exist_ok=True)
    # Saved processors take their files along, too, as models do with their configuration.
    HoVLEImageProcessor.register_for_auto_class()
    HoVLEProcessor.register_for_auto_class()
    READERS["internlm2"] = "hovle.convert.internlm2"  # by name: only who has such a model needs it
