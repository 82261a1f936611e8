"""Recipes: one training stage as a frozen value, loaded from YAML; unknown keys are refused."""

from ...language.text_perplexity import RetentionConfig
from .data import (
    ChatData,
    ConversationData,
    DataConfig,
    EasyVqaData,
    ExpectedData,
    HuggingFaceData,
    LlavaData,
    PictureData,
)
from .language import LanguageConfig
from .loading import OVERRIDE, RECIPES, find_recipe, load_stage, with_new_fields
from .model import Architecture, Geometry, LoraConfig, ModelConfig
from .objective import (
    CharactersConfig,
    DistillationConfig,
    LayerMatch,
    NextTokenConfig,
    ObjectiveConfig,
    TeacherConfig,
    WordsConfig,
)
from .stage import PARAMETER_GROUPS, StageConfig

__all__ = [
    "OVERRIDE",
    "PARAMETER_GROUPS",
    "RECIPES",
    "Architecture",
    "CharactersConfig",
    "ChatData",
    "ConversationData",
    "DataConfig",
    "DistillationConfig",
    "EasyVqaData",
    "ExpectedData",
    "Geometry",
    "HuggingFaceData",
    "LanguageConfig",
    "LayerMatch",
    "LlavaData",
    "LoraConfig",
    "ModelConfig",
    "NextTokenConfig",
    "ObjectiveConfig",
    "PictureData",
    "RetentionConfig",
    "StageConfig",
    "TeacherConfig",
    "WordsConfig",
    "find_recipe",
    "load_stage",
    "with_new_fields",
]
