"""Training: one loop for distillation, alignment and instruction tuning; the stages differ by YAML."""

from .config import StageConfig, load_stage
from .run.stage import run_stage

__all__ = ["StageConfig", "load_stage", "run_stage"]
