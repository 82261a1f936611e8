"""HoVLE: a monolithic vision-language model with a holistic embedding, open and trainable.

Importing this package needs torch and transformers only and registers HoVLE with transformers' Auto classes.
"""

from .configuration_hovle import HoVLEConfig
from .modeling_hovle import HoVLEForConditionalGeneration, HoVLEModel

__version__ = "0.1.0"
