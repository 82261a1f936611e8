"""The model a stage starts from."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field

from ...model.config_values import MOST_LAYERS
from ...model.image_processing_hovle import MOST_TILES
from .section import Count, Many, Number, Positive, Section, Side, section


@section
class Geometry(Section):
    """Sizes that a new model and its processor share."""

    image_size: Side = 448
    """Side of one picture tile in pixels."""
    patch_size: Side = 14
    """Side of one patch in pixels."""
    pixel_shuffle_loc: Literal["pre", "post", "none"] = "pre"
    """`pre` (HoVLE), `post` (HoVLE-HD) or `none` (plain convolution)."""


@section
class Architecture(Geometry):
    """What shapes a new model around a language model."""

    num_embedding_layers: Annotated[int, Field(ge=0, le=MOST_LAYERS)] = 8
    """New holistic layers below the language model."""
    image_attention: Literal["causal", "bidirectional"] = "causal"
    """`causal` as in the paper, or `bidirectional`: tokens of one picture see each other in the holistic layers."""
    untie_text_embeddings: bool = False
    """Give the holistic layers a text table of their own, as the paper does."""


@section
class ModelConfig(Architecture):
    """Where the stage starts: an existing HoVLE, or a new one around a language model."""

    checkpoint: str | None = None
    """HoVLE folder or Hub id, usually the `model` folder of the previous stage's output."""
    language_model: str | None = None
    """Hub id or folder of a causal language model to build a new HoVLE around; `asset:NAME` is fetched."""
    lower_layers: str | None = None
    """HoVLE whose stem and holistic layers become the lowest of the new model's; those above start as the identity. So
    a shallow one, which costs less to train, grows. `smol-distilled` ships with hovle, to be used
    here or as `checkpoint`."""
    max_tiles: Annotated[int, Field(ge=1, le=MOST_TILES)] = 12
    """Most tiles a picture is cut into."""
    chat_template: str | None = None
    """Jinja source of a chat template instead of the language model's own; a base model has none."""

    def __post_init__(self):
        if (self.checkpoint is None) == (self.language_model is None):
            raise ValueError("needs exactly one of checkpoint (an existing HoVLE) and language_model (a new one).")
        if self.lower_layers is not None and self.language_model is None:
            raise ValueError("lower_layers are put into a new model: name its language_model, and no checkpoint.")

    def part(self, cls: type[Geometry]) -> dict[str, Any]:
        """The fields of `Geometry` or `Architecture`, as arguments of what builds a model or processor."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(cls)}


@section
class LoraConfig(Section):
    """Low-rank adapters on the language model's layers instead of full updates (needs peft)."""

    rank: Count = 16
    """Rank of the update."""
    alpha: Positive = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapter."""
    target_modules: Many[str] = ()
    """Which linear maps get adapters, by the last part of their names, such as q_proj; empty: all of them."""
