"""HoVLE: a monolithic vision-language model with a holistic embedding, open and trainable.

Importing this package needs torch and transformers only and registers HoVLE with transformers' Auto classes. Where one
of them is missing, too old or broken, the names below say so when they are used, and `hovle doctor` still runs.
"""

from . import log_filters  # noqa: F401 - works by being imported
from .requirements import unmet
from .version import __version__

__all__ = [
    "HoVLEConfig",
    "HoVLEForConditionalGeneration",
    "HoVLEImageProcessor",
    "HoVLEModel",
    "HoVLEProcessor",
    "__version__",
    "optimize",
    "pretrained",
]

if (_problem := unmet()) is None:
    from .model.configuration_hovle import HoVLEConfig
    from .model.image_processing_hovle import HoVLEImageProcessor
    from .model.modeling_hovle import HoVLEForConditionalGeneration, HoVLEModel
    from .model.processing_hovle import HoVLEProcessor
    from .packaged import pretrained
    from .registration import register_classes

    register_classes()

    def optimize(model: HoVLEForConditionalGeneration, max_length: int | None = None) -> HoVLEForConditionalGeneration:
        """Let `generate` run compiled graphs; see `hovle.inference.optimize`, which is imported only now."""
        from .inference import optimize as in_place

        return in_place(model, max_length)

else:

    def __getattr__(name: str):
        if name in __all__:
            raise ImportError(f"hovle.{name} is not available. {_problem} (`hovle doctor` looks at the rest.)")
        raise AttributeError(f"module 'hovle' has no attribute {name!r}")
