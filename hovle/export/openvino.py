"""A flat HoVLE in the layout that OpenVINO GenAI's VLMPipeline reads as `internvl_chat`.

Three graphs (stem, table of words, decoder that keeps its cache) and the tokenizer as graphs, so that stock GenAI
answers, batches and serves without a line of ours. GenAI cuts every picture into 1 to 12 tiles with a bicubic filter
of its own and writes a line break after it; `write` says where a model was trained otherwise.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..files.checkpoint_files import HOVLE_CONFIG
from .flat import FlatModel
from .modules import ImageStem, TokenEmbeddings, sample_decoder_inputs, sample_pixels
from .openvino_runtime import DECODER, STEM, WORDS
from .write_stem import write_stem

if TYPE_CHECKING:
    import openvino

NEEDS = ("hovle[openvino]", "openvino", "openvino_tokenizers", "transformers.exporters")
"""What installs the modules, and the modules."""

MOST_TILES = 12
"""Of a picture, the thumbnail not counted, in GenAI."""


def write(flat: FlatModel, folder: Path) -> list[str]:
    """Write graphs, tokenizer and the documents that GenAI reads.

    Args:
        flat: The model; its weights become float32.
        folder: An empty folder.

    Returns:
        What the user should know.

    Raises:
        ValueError: For a model without tokenizer, which GenAI needs, or with picture tokens of other names.
    """
    if flat.processor is None:
        raise ValueError(
            "OpenVINO GenAI makes prompts of words, but this model has no tokenizer beside it: save its processor "
            "there, or take --to onnx."
        )
    flat.model.float()
    stem = ImageStem(flat, whole_picture_only=_num_tiles(flat) == 1)
    write_stem_graph(stem, sample_pixels(flat), folder)
    write_decoder(flat.decoder, folder)
    _write_documents(flat, folder)
    _write_tokenizer(flat, folder)
    write_stem(flat, folder)
    return _differences(flat)


def write_stem_graph(stem: nn.Module, pixel_values: torch.Tensor, folder: Path) -> None:
    """Write what makes image tokens of tiles, traced with these `(N, C, s, s)`; any number of them goes."""
    shapes = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    _save(_trace(stem, {"pixel_values": pixel_values}, shapes), folder / STEM, ["image_features"])


def write_decoder(decoder: PreTrainedModel, folder: Path) -> None:
    """Write the table of words and the decoder that keeps its cache."""
    axis = torch.export.Dim.DYNAMIC
    ids = {"input_ids": torch.zeros(2, 3, dtype=torch.long)}
    graph = _trace(TokenEmbeddings(decoder), ids, {"input_ids": {0: axis, 1: axis}})
    _save(graph, folder / WORDS, ["inputs_embeds"])
    _save(_trace(decoder, sample_decoder_inputs(decoder.config), None), folder / DECODER, ["logits"])


def _num_tiles(flat: FlatModel) -> int:
    images = flat.image_processor
    return images.max_tiles if images.crop_to_patches else 1


def _differences(flat: FlatModel) -> list[str]:
    """Where GenAI shows a model pictures otherwise than it was trained."""
    assert flat.processor is not None
    images, found = flat.image_processor, []
    if (images.min_tiles, _num_tiles(flat)) not in ((1, MOST_TILES), (1, 1)):
        found.append(
            f"The model sees {images.min_tiles} to {_num_tiles(flat)} tiles of a picture, GenAI shows it 1 to "
            f"{MOST_TILES}: answers about pictures that are neither small nor square may differ."
        )
    if flat.processor.text_after_image != "\n":
        found.append(
            f"The model reads {flat.processor.text_after_image!r} after a picture, GenAI writes a line break: answers "
            "may differ."
        )
    return found


def _trace(module: nn.Module, inputs: dict[str, Any], shapes: dict | None) -> "openvino.Model":
    """The graph of a module, its cache kept inside; without `shapes`, every axis may vary that does."""
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    config = OpenVINOConfig(dynamic=shapes is None, dynamic_shapes=shapes)
    return OpenVINOExporter().export(module, inputs, config).program


def _save(graph: "openvino.Model", path: Path, names: list[str]) -> None:
    import openvino

    for port, name in zip(graph.outputs, names, strict=True):
        port.get_tensor().set_names({name})
    if graph.has_rt_info(["runtime_options"]):
        # The exporter asks for float32 in all, which paged attention refuses where its cache would be bfloat16.
        del graph.rt_info["runtime_options"]
    openvino.save_model(graph, str(path), compress_to_fp16=False)


def _write_documents(flat: FlatModel, folder: Path) -> None:
    """Write what GenAI reads of the model, of pictures and of generation, and what `openvino_runtime.py` does."""
    assert flat.processor is not None
    config = {
        "model_type": "internvl_chat",
        "hidden_size": flat.decoder.config.hidden_size,
        "image_token_id": flat.config.image_token_id,
        "llm_config": flat.decoder.config.to_diff_dict(),
    }
    side = flat.image_processor.tile_size
    pictures = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": list(flat.image_processor.image_mean),
        "image_std": list(flat.image_processor.image_std),
        "patch_size": flat.config.patch_size,
    }
    flat.processor.save_pretrained(folder)
    flat.config.to_json_file(folder / HOVLE_CONFIG)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures, indent=1), encoding="utf-8")
    flat.generation_config.save_pretrained(folder)


def _write_tokenizer(flat: FlatModel, folder: Path) -> None:
    """Write the tokenizer, as transformers reads it and as graphs."""
    import openvino
    from openvino_tokenizers import convert_tokenizer

    tokenizer = flat.save_tokenizer(folder)
    graphs = convert_tokenizer(tokenizer, with_detokenizer=True)
    for graph, name in zip(graphs, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(graph, str(folder / f"openvino_{name}.xml"))
