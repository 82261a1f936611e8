"""Engines that run in this process what `hovle export` wrote."""

import os

from .engine import EngineForConditionalGeneration
from .gguf import QUANTIZATIONS
from .llama_cpp import LlamaCppForConditionalGeneration
from .onnx_runtime import OnnxForConditionalGeneration
from .openvino_runtime import OpenVinoForConditionalGeneration

ENGINES: dict[str, type[EngineForConditionalGeneration]] = {
    "llama.cpp": LlamaCppForConditionalGeneration,
    "openvino": OpenVinoForConditionalGeneration,
    "onnx": OnnxForConditionalGeneration,
}
"""Name -> the model it makes of an exported folder."""


def check_quantization(engine: str, quantization: str | None) -> None:
    """Raise ValueError where a file of several is chosen for an engine that has one."""
    if engine != "llama.cpp" and quantization is not None:
        raise ValueError(f"--quantization is for --engine llama.cpp, not for {engine}; leave it out.")


def check_number_format(engine: str, dtype: str) -> None:
    """Raise ValueError where a number format is chosen for an engine that takes the one of its files."""
    if engine != "openvino" and dtype != "auto":
        raise ValueError(f"--dtype is of no use with --engine {engine}; leave it out.")


def load_exported(folder: str | os.PathLike, engine: str, quantization: str | None = None, dtype: str = "auto"):
    """Load an exported model in an engine.

    Args:
        folder: What `hovle export` wrote for this engine.
        engine: One of `ENGINES`.
        quantization: Which file llama.cpp reads, one of `QUANTIZATIONS`; None: the first of them, f16.
        dtype: What OpenVINO computes in: auto (its own choice), float32 or bfloat16.

    Raises:
        ValueError: Without the engine's package, for a folder that lacks its files, and for a quantization or number
            format elsewhere.
    """
    check_quantization(engine, quantization)
    check_number_format(engine, dtype)
    if engine == "llama.cpp":
        return LlamaCppForConditionalGeneration.load(folder, quantization or QUANTIZATIONS[0])
    if engine == "openvino":
        return OpenVinoForConditionalGeneration.load(folder, dtype)
    return ENGINES[engine].load(folder)
