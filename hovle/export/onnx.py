"""A flat HoVLE as three ONNX graphs, in the layout that transformers.js reads as a Llava.

  onnx/vision_encoder.onnx          pixel_values -> image_features
  onnx/embed_tokens.onnx            input_ids -> inputs_embeds
  onnx/decoder_model_merged.onnx    inputs_embeds, attention_mask, position_ids, num_logits_to_keep, past_key_values.*
                                    -> logits, present.*

`config.json` and `preprocessor_config.json` are for transformers.js, which has no tiles like ours and shows a model
the whole picture as one. `onnx_runtime.py` runs such a folder with all tiles; it reads `hovle_config.json`.
"""

import contextlib
import io
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from ..files.checkpoint_files import HOVLE_CONFIG
from ..model.backbones import CACHE
from ..model.rotary import depends_on_length
from .flat import FlatModel
from .modules import ImageStem, TokenEmbeddings, sample_decoder_inputs, sample_pixels
from .onnx_runtime import DECODER, STEM, WORDS, Decoder, Graph, past_names, present_names

if TYPE_CHECKING:
    import onnx_ir

NEEDS = ("hovle[onnx]", "onnx", "onnxscript", "onnxruntime", "transformers.exporters")
"""What installs the modules, and the modules."""

SAME_LOGITS = 1e-4
"""By how much, relative to the largest, logits in ONNX Runtime may differ from torch's, both in float32."""

AXES = {"B": "batch_size", "T": "sequence_length", "P": "past_sequence_length", "A": "total_sequence_length"}
"""Names of axes in the graphs. transformers.js makes an empty cache of them: 0 long where it is not the batch."""


def write(flat: FlatModel, folder: Path) -> list[str]:
    """Write the three graphs in float32, and what both readers want beside them.

    Args:
        flat: The model.
        folder: An empty folder.

    Returns:
        What the user should know.

    Raises:
        ValueError: For a rope that depends on the length of the prompt, which a graph holds as it was traced, and for
            graphs that do not give the model's logits.
    """
    if any(depends_on_length(table) for table in flat.model.model.rotary_embs):
        raise ValueError(
            f"The rope of this model ({flat.decoder.config.rope_parameters}) turns with the length of the prompt, and "
            "a graph keeps the one it was traced with. `--to llama` writes a folder of transformers, which knows it."
        )
    flat.model.float()
    (folder / STEM).parent.mkdir()
    _save(_trace_stem(flat), folder / STEM)
    _save(_trace_words(flat), folder / WORDS)
    _save(_trace_decoder(flat), folder / DECODER)
    _check_same_logits(flat, folder)
    _write_documents(flat, folder)
    if flat.processor is not None and flat.image_processor.crop_to_patches and flat.image_processor.max_tiles > 1:
        return [
            "transformers.js shows the model each picture as a single tile; `hovle chat --engine onnx` shows all "
            f"{flat.image_processor.min_tiles} to {flat.image_processor.max_tiles} and the thumbnail."
        ]
    return []


class CachedDecoder(nn.Module):
    """A decoder that computes logits of the last tokens only, as transformers.js asks it to.

    Args:
        decoder: A causal language model of transformers.
    """

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(self, num_logits_to_keep: torch.Tensor, **inputs: Any) -> Any:
        """Run the decoder.

        Args:
            num_logits_to_keep: Of how many last tokens logits are wanted, an integer of shape `()`; 0 for all.
            **inputs: `inputs_embeds`, `attention_mask`, `position_ids` and the cache.
        """
        length = inputs["inputs_embeds"].shape[1]
        first = torch.where(num_logits_to_keep == 0, num_logits_to_keep, length - num_logits_to_keep)
        kept = (torch.arange(length) >= first).nonzero()[:, 0]
        return self.decoder(**inputs, logits_to_keep=kept)


def _trace_stem(flat: FlatModel) -> "onnx_ir.Model":
    graph = _trace(ImageStem(flat), {"pixel_values": sample_pixels(flat)}, {"pixel_values": (0,)})
    side = flat.image_processor.tile_size
    _name(graph.graph.inputs, {"pixel_values": ["B", flat.config.num_channels, side, side]})
    tokens = [flat.config.tokens_per_tile(side), flat.decoder.config.hidden_size]
    _name(graph.graph.outputs, {"image_features": ["B", *tokens]})
    return graph


def _trace_words(flat: FlatModel) -> "onnx_ir.Model":
    ids = torch.zeros(2, 3, dtype=torch.long)
    graph = _trace(TokenEmbeddings(flat.decoder), {"input_ids": ids}, {"input_ids": (0, 1)})
    _name(graph.graph.inputs, {"input_ids": ["B", "T"]})
    _name(graph.graph.outputs, {"inputs_embeds": ["B", "T", flat.decoder.config.hidden_size]})
    return graph


def _trace_decoder(flat: FlatModel) -> "onnx_ir.Model":
    inputs = {**sample_decoder_inputs(flat.decoder.config), "num_logits_to_keep": torch.tensor(1)}
    cache = DynamicCache()  # of keys and values alone: layers with a window keep all, which their masks hide
    for index, layer in enumerate(inputs[CACHE].layers):
        cache.update(layer.keys, layer.values, index)
    inputs[CACHE] = cache
    num_tensors = 2 * len(inputs[CACHE].layers)
    sizes: dict[str, list] = {
        "inputs_embeds": ["B", "T", inputs["inputs_embeds"].shape[-1]],
        "attention_mask": ["B", "A"],
        "position_ids": ["B", "T"],
    }
    axes: dict[str, Any] = dict.fromkeys(sizes, (0, 1))
    graph = _trace(CachedDecoder(flat.decoder), inputs, {**axes, CACHE: [(0, 2)] * num_tensors})
    _, num_heads, _, head_size = inputs[CACHE].layers[0].keys.shape
    past = {name: ["B", num_heads, "P", head_size] for name in past_names(num_tensors)}
    _name(graph.graph.inputs, {**sizes, **past, "num_logits_to_keep": []})
    present = {name: ["B", num_heads, "A", head_size] for name in present_names(num_tensors)}
    _name(graph.graph.outputs, {"logits": ["B", "num_logits", flat.decoder.config.vocab_size], **present})
    return graph


def _trace(module: nn.Module, inputs: dict[str, Any], axes: dict[str, Any]) -> "onnx_ir.Model":
    """The graph of a module.

    Args:
        module: In evaluation mode.
        inputs: What it is called with, by name.
        axes: Axes that may vary of each input; of several tensors in one, a list.
    """
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    def spread(value: Any) -> Any:
        if isinstance(value, list):
            return [spread(item) for item in value]
        return dict.fromkeys(value, torch.export.Dim.AUTO)

    shapes = {name: spread(axes.get(name, ())) for name in inputs}
    with _silence():
        return OnnxExporter().export(module.eval(), inputs, OnnxConfig(dynamic_shapes=shapes)).program


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep torch's report of its stages, and transformers' of versions it was not tried with, from the user.

    What comes out is compared with the model instead.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers.exporters")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name(values: "Iterable[onnx_ir.Value]", shapes: dict[str, list]) -> None:
    """Give the inputs or outputs of a graph their names and the names of their axes, in order."""
    import onnx_ir

    for value, (name, shape) in zip(values, shapes.items(), strict=True):
        value.name = name
        value.shape = onnx_ir.Shape([AXES.get(size, size) if isinstance(size, str) else size for size in shape])


def _save(model: "onnx_ir.Model", path: Path) -> None:
    """Write a graph and, as transformers.js calls it, its weights beside it: a file of protobuf ends at 2 GiB."""
    import onnx_ir

    onnx_ir.save(model, str(path), external_data=f"{path.name}_data")


@torch.no_grad()
def _check_same_logits(flat: FlatModel, folder: Path) -> None:
    """Raise ValueError unless the graphs give the model's logits after a tile and some words, and after one more."""
    config, generator = flat.config, torch.Generator().manual_seed(0)
    side = flat.image_processor.tile_size
    pixels = torch.randn(1, config.num_channels, side, side, generator=generator)
    words = torch.randint(config.text_config.vocab_size, (9,), generator=generator)
    words[words == config.image_token_id] = 0
    image = torch.full((config.tokens_per_tile(side),), config.image_token_id)
    ids = torch.cat([words[:3], image, words[3:]])[None]
    expected = flat.model(ids, pixels, use_cache=False).logits[0, -2:].numpy()
    features = Graph(folder / STEM)({"pixel_values": pixels.numpy()})["image_features"].numpy()[0]
    decoder, sequence = Decoder(folder), ids[0].numpy()
    is_image = sequence == config.image_token_id
    steps = [decoder.logits_after(sequence[:end], is_image[:end], features) for end in (len(sequence) - 1, None)]
    difference, scale = np.abs(np.stack(steps) - expected).max(), np.abs(expected).max()
    if not difference <= SAME_LOGITS * scale:
        raise ValueError(
            f"In ONNX Runtime the model's logits differ by {difference:.3g} from torch's (they reach {scale:.3g}), so "
            "it cannot be exported; please report the model's config.json and the versions of torch and onnx."
        )


def _write_documents(flat: FlatModel, folder: Path) -> None:
    """Write what transformers.js reads of model, pictures and words, and what `onnx_runtime.py` does."""
    flat.config.to_json_file(folder / HOVLE_CONFIG)
    flat.generation_config.save_pretrained(folder)
    (flat.processor or flat.image_processor).save_pretrained(folder)
    side = flat.image_processor.tile_size
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": flat.config.image_token_id,
        "text_config": flat.decoder.config.to_dict(),
        "transformers.js_config": {"use_external_data_format": True, "dtype": "fp32"},
    }
    pictures = {
        **flat.image_processor.to_dict(),
        "image_processor_type": "ViTImageProcessor",
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True),
        "size": {"height": side, "width": side},
    }
    documents = {"config.json": config, "preprocessor_config.json": pictures}
    if flat.processor is not None:
        path = folder / "tokenizer_config.json"
        template = {"chat_template": flat.processor.chat_template}
        documents[path.name] = {**json.loads(path.read_text(encoding="utf-8")), **template}
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
