"""Run exported graphs in ONNX Runtime: words as ids, pictures as embeddings, `generate` as transformers has it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files.checkpoint_files import HOVLE_CONFIG
from ..model.configuration_hovle import HoVLEConfig
from .engine import EngineForConditionalGeneration, Known, check_exported
from .needs import need

STEM, WORDS, DECODER = (
    Path("onnx", f"{name}.onnx") for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
)
"""Graphs of tiles, of ids, and of the sequence."""


def past_names(count: int) -> list[str]:
    """Names of so many keys and values that the decoder goes on from."""
    return [f"past_key_values.{index // 2}.{'value' if index % 2 else 'key'}" for index in range(count)]


def present_names(count: int) -> list[str]:
    """Names of so many keys and values that the decoder leaves."""
    return [name.replace("past_key_values", "present") for name in past_names(count)]


class OnnxForConditionalGeneration(EngineForConditionalGeneration):
    """A decoder and its stem in ONNX Runtime, one prompt at a time; made by `load`."""

    engine = "ONNX Runtime"

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "OnnxForConditionalGeneration":
        """Load what `hovle export --to onnx` wrote.

        Args:
            folder: Its folder.

        Raises:
            ValueError: Without onnxruntime, and for a folder that lacks the files.
        """
        need("The engine onnx", "hovle[onnx]", "onnxruntime")
        folder = Path(folder)
        check_exported(folder, (STEM, WORDS, DECODER, HOVLE_CONFIG), cls.engine, "onnx")
        stem = Graph(folder / STEM)
        model = cls(
            HoVLEConfig.from_json_file(folder / HOVLE_CONFIG),
            Decoder(folder),
            lambda tiles: stem({"pixel_values": tiles})["image_features"].numpy(),
        )
        return model.with_settings_of(folder)


class Graph:
    """One file in ONNX Runtime, on as many threads as torch uses.

    Args:
        path: The file.

    Raises:
        ValueError: When ONNX Runtime cannot load it.
    """

    def __init__(self, path: Path):
        import onnxruntime

        self.make_value = onnxruntime.OrtValue.ortvalue_from_numpy
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors; they are raised as well
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # it has a class for each kind, below no common one
            raise ValueError(f"ONNX Runtime cannot load {path}: {str(error).strip().splitlines()[-1]}") from error
        self.shapes = {value.name: value.shape for value in self.session.get_inputs()}
        """Of each input; axes that vary are names."""
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run it; inputs are arrays or values of ONNX Runtime, outputs are such values, which have `numpy()`."""
        feeds = {
            name: self.make_value(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
            for name, value in inputs.items()
        }
        return dict(zip(self.outputs, self.session.run_with_ort_values(self.outputs, feeds), strict=True))


class Decoder:
    """Graphs of ids and of the sequence, and the keys and values of what they have read.

    Args:
        folder: What `hovle export --to onnx` wrote.
    """

    def __init__(self, folder: Path):
        self.words, self.layers = Graph(folder / WORDS), Graph(folder / DECODER)
        self.past_names = past_names(len(self.layers.outputs) - 1)
        self.forget()

    def forget(self) -> None:
        """Start with an empty cache."""
        self.known = Known(self.layers.shapes["inputs_embeds"][-1])
        _, num_heads, _, head_size = self.layers.shapes[self.past_names[0]]
        self.past: list[Any] = [np.empty((1, num_heads, 0, head_size), np.float32) for _ in self.past_names]

    def logits_after(self, ids: np.ndarray, is_image: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Logits of the token after a sequence, as `EngineDecoder` has it."""
        num_known = self.known.count(ids, is_image, features)
        if num_known < len(self.known.ids):
            self.past = [value.numpy()[:, :, :num_known] for value in self.past]
        self.known.keep(ids[:num_known], is_image[:num_known], features)
        new, is_new_image = ids[None, num_known:].astype(np.int64), is_image[num_known:]
        embeds = self.words({"input_ids": new})["inputs_embeds"].numpy().copy()
        num_before = int(is_image[:num_known].sum())
        embeds[0, is_new_image] = features[num_before : num_before + int(is_new_image.sum())]
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(num_known, len(ids))[None],
            "num_logits_to_keep": np.array(1),
            **dict(zip(self.past_names, self.past, strict=True)),
        }
        outputs = self.layers(inputs)
        self.past = [outputs[name] for name in present_names(len(self.past))]
        self.known.keep(ids, is_image, features)
        return outputs["logits"].numpy()[0, -1].copy()
