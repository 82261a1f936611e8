"""What runs the model of a conversation."""

import os
from typing import Any

import torch

from ..export.engines import ENGINES as OTHERS
from ..export.engines import check_quantization, load_exported
from ..inference import optimize
from ..loading import load_model

ENGINES = ("torch", *OTHERS)
"""What can run the model of a conversation."""


def load_in_engine(model: str | os.PathLike, engine: str, quantization: str | None, compiled: bool) -> Any:
    """What has `generate`, `config` and `generation_config` of a HoVLE, in the engine that is asked for."""
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r:.40}.")
    if engine != "torch" and compiled:
        raise ValueError(f"{engine} is compiled already: --compile is for --engine torch.")
    if engine != "torch":
        return load_exported(model, engine, quantization)
    check_quantization(engine, quantization)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(model).to(device).eval()
    return optimize(loaded) if compiled else loaded


def sampling(model: Any, temperature: float) -> dict[str, Any]:
    """How `generate` chooses tokens: by chance from all, unless the model's own settings leave some out."""
    if not temperature:
        return {"do_sample": False}
    num_likeliest = model.generation_config.top_k or 0  # `generate` takes 50 where nothing is said
    return {"do_sample": True, "temperature": temperature, "top_k": num_likeliest}
