"""Run exported graphs in OpenVINO: words as ids, pictures as embeddings, `generate` as transformers has it.

OpenVINO GenAI runs the same folder with more (continuous batching, servers), but cuts pictures in its own way; here
they are cut as in training.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..files.checkpoint_files import HOVLE_CONFIG
from ..model.configuration_hovle import HoVLEConfig
from .engine import EngineForConditionalGeneration, Known, check_exported
from .needs import need

if TYPE_CHECKING:
    import openvino

STEM, WORDS, DECODER = (
    f"openvino_{name}.xml" for name in ("vision_embeddings_model", "text_embeddings_model", "language_model")
)
"""Graphs of tiles, of ids, and of the sequence."""

NUMBER_FORMATS: dict[str, dict[str, str]] = {
    "auto": {},
    "float32": {"INFERENCE_PRECISION_HINT": "f32"},
    "bfloat16": {"INFERENCE_PRECISION_HINT": "bf16"},
}
"""What it can compute in; `auto` is OpenVINO's own choice, bfloat16 where the processor is fast in it."""


class OpenVinoForConditionalGeneration(EngineForConditionalGeneration):
    """A decoder and its stem in OpenVINO, one prompt at a time; made by `load`."""

    engine = "OpenVINO"

    @classmethod
    def load(cls, folder: str | os.PathLike, dtype: str = "auto") -> "OpenVinoForConditionalGeneration":
        """Load what `hovle export --to openvino` wrote.

        Args:
            folder: Its folder.
            dtype: One of `NUMBER_FORMATS`.

        Raises:
            ValueError: Without openvino, for a folder that lacks the files, and for another number format.
        """
        if dtype not in NUMBER_FORMATS:
            raise ValueError(f"OpenVINO computes in {', '.join(NUMBER_FORMATS)} here, not in {dtype!r:.40}.")
        need("The engine openvino", "hovle[openvino]", "openvino")
        folder = Path(folder)
        check_exported(folder, (STEM, WORDS, DECODER, HOVLE_CONFIG), cls.engine, "openvino")
        stem = _compile(folder / STEM, dtype)

        def embed(tiles: np.ndarray) -> np.ndarray:
            # One by one, as the graph of a model of single tiles takes the last one of a picture only.
            return np.concatenate([stem(tile[None])["image_features"] for tile in tiles])

        model = cls(HoVLEConfig.from_json_file(folder / HOVLE_CONFIG), Decoder(folder, dtype), embed)
        return model.with_settings_of(folder)


class Decoder:
    """Graphs of ids and of the sequence; the latter keeps what it has read.

    Args:
        folder: What `hovle export --to openvino` wrote.
        dtype: One of `NUMBER_FORMATS`.
    """

    def __init__(self, folder: Path, dtype: str = "auto"):
        self.words = _compile(folder / WORDS, dtype)
        self.layers = _compile(folder / DECODER, dtype, last_logits=True).create_infer_request()
        self.hidden_size = int(self.words.output(0).partial_shape[-1].get_length())
        self.forget()

    def forget(self) -> None:
        """Start with an empty cache."""
        self.layers.reset_state()
        self.known = Known(self.hidden_size)

    def logits_after(self, ids: np.ndarray, is_image: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Logits of the token after a sequence, as `EngineDecoder` has it."""
        num_known = self.known.count(ids, is_image, features)
        if num_known < len(self.known.ids):  # OpenVINO keeps the cache in a form of its own, which is not cut
            self.forget()
            num_known = 0
        embeds = self.words(ids[None, num_known:].astype(np.int64))["inputs_embeds"].copy()
        num_before = int(is_image[:num_known].sum())
        is_new_image = is_image[num_known:]
        embeds[0, is_new_image] = features[num_before : num_before + int(is_new_image.sum())]
        outputs = self.layers.infer(
            {
                "inputs_embeds": embeds,
                "attention_mask": np.ones((1, len(ids)), np.int64),
                "position_ids": np.arange(num_known, len(ids))[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        self.known.keep(ids, is_image, features)
        return outputs["logits"][0, -1].copy()


def _compile(path: Path, dtype: str, last_logits: bool = False) -> "openvino.CompiledModel":
    """A graph, ready to run in a number format on as many threads as torch uses."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    if last_logits:
        _keep_last_logits(model)
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    return core.compile_model(model, "CPU", {**threads, **NUMBER_FORMATS[dtype]})


def _keep_last_logits(model: "openvino.Model") -> None:
    """Let the head see the last token only, as GenAI does: logits of all would take most of a prompt's memory."""
    from openvino import opset13

    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    last = opset13.slice(node.input_value(0), [-1], [np.iinfo(np.int32).max], [1], [1])
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
