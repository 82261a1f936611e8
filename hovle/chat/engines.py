"""What runs the model of a conversation."""

import os
from typing import Any

import torch

from ..export.llama_cpp import LlamaCppForConditionalGeneration
from ..export.onnx_runtime import OnnxForConditionalGeneration
from ..export.openvino_runtime import OpenVinoForConditionalGeneration
from ..inference import optimize
from ..loading import load_model

ENGINES = ("torch", "llama.cpp", "openvino", "onnx")
"""What can run the model of a conversation."""


def load_in_engine(model: str | os.PathLike, engine: str, quantization: str, compiled: bool) -> Any:
    """What has `generate`, `config` and `generation_config` of a HoVLE, in the engine that is asked for."""
    if engine != "torch" and compiled:
        raise ValueError(f"{engine} is compiled already: --compile is for --engine torch.")
    if engine == "llama.cpp":
        return LlamaCppForConditionalGeneration.load(model, quantization)
    if engine == "openvino":
        return OpenVinoForConditionalGeneration.load(model)
    if engine == "onnx":
        return OnnxForConditionalGeneration.load(model)
    if engine != "torch":
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r:.40}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(model).to(device).eval()
    return optimize(loaded) if compiled else loaded


def sampling(model: Any, temperature: float) -> dict[str, Any]:
    """How `generate` chooses tokens: by chance from all, unless the model's own settings leave some out."""
    if not temperature:
        return {"do_sample": False}
    num_likeliest = model.generation_config.top_k or 0  # `generate` takes 50 where nothing is said
    return {"do_sample": True, "temperature": temperature, "top_k": num_likeliest}
