"""The released layout and back: golden parity, other configurations, bit-equal round trips, refusals, memory."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from places import GOLDEN
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from hovle import HoVLEForConditionalGeneration, HoVLEImageProcessor, HoVLEProcessor, cli
from hovle.convert import command as conversion
from hovle.convert.command import convert
from hovle.files import checkpoint_files
from hovle.model.remote_code import AUTO_MAP

NAMES = ("hovle-tiny", "hovle-hd-tiny")
INDEX = "model.safetensors.index.json"
PLACEHOLDER = 253
TOK = "language_model.model.tok_embeddings.weight"
TEXT = "embedding_model.llm_text_embeddings.weight"
HEAD = "language_model.output.weight"


def read_released(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and tensors of a checkpoint in any number of shards."""
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    return json.loads((folder / "config.json").read_text()), tensors


def write_checkpoint(folder: Path, config: dict, tensors: dict[str, torch.Tensor], num_shards: int = 1) -> Path:
    """Save a checkpoint, its tensors dealt out over the shards so that every layer is torn apart."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(num_shards):
        file = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        shard = {name: tensors[name] for name in sorted(tensors)[number::num_shards]}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert tensor.shape == right[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


def load(folder: Path) -> HoVLEForConditionalGeneration:
    model, info = HoVLEForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.fixture
def released() -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and tensors of the golden base checkpoint, to be changed at will."""
    return read_released(GOLDEN / "hovle-tiny")


@pytest.fixture(scope="module", params=NAMES)
def golden(request, tmp_path_factory):
    """A golden checkpoint: its folder, its recorded outputs, and the converted folder."""
    source = GOLDEN / request.param
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(source, folder)
    return source, load_file(source / "golden.safetensors"), folder


# ---- The released forward pass, written from its description ----------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotary_angles(section: dict, length: int) -> torch.Tensor:
    """Angles of positions 0..length-1, shape (length, head size)."""
    size = section["hidden_size"] // section["num_attention_heads"]
    theta, positions = section["rope_theta"], torch.arange(length).float()
    scaling, limit = section["rope_scaling"] or {"type": None}, section["max_position_embeddings"]
    if scaling["type"] == "linear":
        positions = positions / scaling["factor"]
    if scaling["type"] == "dynamic" and length > limit:
        theta = theta * (scaling["factor"] * length / limit - (scaling["factor"] - 1)) ** (size / (size - 2))
    frequencies = theta ** -(torch.arange(0, size, 2).float() / size)
    return torch.outer(positions, frequencies).repeat(1, 2)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + half) of (length, heads, head size)."""
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos()[:, None] + torch.cat([-second, first], dim=-1) * angles.sin()[:, None]


def attend(x: torch.Tensor, weights: dict, section: dict) -> torch.Tensor:
    length, groups = len(x), section["num_key_value_heads"]
    queries = section["num_attention_heads"] // groups
    qkv = functional.linear(x, weights["attention.wqkv.weight"], weights.get("attention.wqkv.bias"))
    qkv = qkv.view(length, groups, queries + 2, -1)
    angles = rotary_angles(section, length)
    q = rotate(qkv[:, :, :queries].flatten(1, 2), angles)
    k = rotate(qkv[:, :, queries], angles).repeat_interleave(queries, dim=1)
    v = qkv[:, :, queries + 1].repeat_interleave(queries, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    return functional.linear(mixed, weights["attention.wo.weight"], weights.get("attention.wo.bias"))


def run_layers(x: torch.Tensor, tensors: dict, prefix: str, section: dict) -> torch.Tensor:
    act = {"silu": functional.silu, "gelu": functional.gelu}[section["hidden_act"]]
    for index in range(section["num_hidden_layers"]):
        start = f"{prefix}{index}."
        weights = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
        x = x + attend(rms_norm(x, weights["attention_norm.weight"], section["rms_norm_eps"]), weights, section)
        h = rms_norm(x, weights["ffn_norm.weight"], section["rms_norm_eps"])
        h = act(h @ weights["feed_forward.w1.weight"].T) * (h @ weights["feed_forward.w3.weight"].T)
        x = x + h @ weights["feed_forward.w2.weight"].T
    return x


def embed_patches(pixels: torch.Tensor, tensors: dict, section: dict) -> torch.Tensor:
    """Tiles (N, C, s, s) to patches (N, grid, grid, D) with positions."""
    vision = "embedding_model.vision_embeddings."
    weight, bias = (tensors[f"{vision}patch_embedding.{kind}"] for kind in ("weight", "bias"))
    patches = functional.conv2d(pixels, weight, bias, stride=section["patch_size"])
    side = section["image_size"] // section["patch_size"]
    table = tensors[f"{vision}position_embedding"][0, 1:].T.view(1, -1, side, side)
    table = functional.interpolate(table, size=patches.shape[-2:], mode="bicubic", align_corners=False)
    return (patches + table).permute(0, 2, 3, 1)


def shuffle_and_project(patches: torch.Tensor, tensors: dict, factor: int) -> torch.Tensor:
    """Patches (N, grid, grid, D) to tokens (N, S, D); channels of a block in row-major order."""
    rows = [
        torch.cat([patches[:, factor * i + a, b::factor] for a in range(factor) for b in range(factor)], dim=-1)
        for i in range(patches.shape[1] // factor)
    ]
    first, second = (f"embedding_model.pixel_shuffle_proj.{i}." for i in (0, 2))
    hidden = functional.linear(torch.cat(rows, dim=1), tensors[first + "weight"], tensors[first + "bias"])
    return functional.linear(functional.gelu(hidden), tensors[second + "weight"], tensors[second + "bias"])


def spread(ids: torch.Tensor, count: int) -> torch.Tensor:
    """Repeat each placeholder, as HD's long sequence has it."""
    return ids.repeat_interleave(torch.where(ids == PLACEHOLDER, count, 1))


@torch.no_grad()
def reference(config: dict, tensors: dict, ids: torch.Tensor, pixels: torch.Tensor | None = None) -> dict:
    """Run the released model on one prompt, shape (T,); outputs as in the golden files, without batch dimension."""
    section = config["embedding_config"]
    location = section["pixel_shuffle_loc"] if section["use_pixel_shuffle_proj"] else "none"
    factor = 1 if location == "none" else round(1 / section["downsample_ratio"])
    long_ids = spread(ids, factor**2) if location == "post" else ids
    x = tensors[TEXT][long_ids]
    if pixels is not None:
        patches = embed_patches(pixels, tensors, section)
        grid = patches.shape[1]
        tokens = shuffle_and_project(patches, tensors, factor) if location == "pre" else patches
        x[long_ids == PLACEHOLDER] = tokens.reshape(-1, x.shape[-1])
    x = hidden_states = run_layers(x, tensors, "embedding_model.encoder.", section)
    outputs = {"embedding_hidden_states": hidden_states}
    if pixels is not None:
        outputs["image_features"] = features = hidden_states[long_ids == PLACEHOLDER]
        if location == "post":
            features = shuffle_and_project(features.view(len(pixels), grid, grid, -1), tensors, factor).flatten(0, 1)
            outputs["image_features"] = features
            x = x.new_zeros(len(ids), x.shape[-1])
            x[ids != PLACEHOLDER] = hidden_states[long_ids != PLACEHOLDER]
            x[ids == PLACEHOLDER] = features
    if config["normalize_encoder_output"]:
        x = x / x.norm(dim=-1, keepdim=True)
    llm = config["llm_config"]
    x = run_layers(x, tensors, "language_model.model.layers.", llm)
    x = rms_norm(x, tensors["language_model.model.norm.weight"], llm["rms_norm_eps"])
    head = tensors[TOK if llm["tie_word_embeddings"] else HEAD]
    return outputs | {"logits": x @ head.T}


@torch.no_grad()
def converted_outputs(model: HoVLEForConditionalGeneration, ids: torch.Tensor, pixels: torch.Tensor | None) -> dict:
    """The same from our model."""
    holistic = model.get_holistic_embeddings(ids[None], pixels)
    outputs = {"embedding_hidden_states": holistic.last_hidden_state[0], "logits": model(ids[None], pixels).logits[0]}
    if pixels is not None:
        outputs["image_features"] = holistic.image_hidden_states.flatten(0, 1)
    return outputs


def assert_parity(ours: dict, theirs: dict) -> None:
    """Logits within 1e-4, embeddings within 1e-5 of their largest magnitude."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        tolerance = 1e-4 if name == "logits" else 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(ours[name], expected, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


# ---- Parity ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_converted_golden_checkpoints_give_the_recorded_outputs(golden):
    _, recorded, folder = golden
    model = load(folder)
    ids, pixels = recorded["input_ids"], recorded["pixel_values"]
    ours = converted_outputs(model, ids[0], pixels)
    expected = {name: recorded[name][0] for name in ("embedding_hidden_states", "logits")}
    # Measured worst cases: 0.0 for all of them, torch 2.14 on x86.
    assert_parity(ours, expected | {"image_features": recorded["image_features"]})
    loss = model(ids, pixels, labels=ids).loss
    torch.testing.assert_close(loss, recorded["loss"][0], atol=1e-4, rtol=0)
    text = model(recorded["text_input_ids"]).logits
    torch.testing.assert_close(text, recorded["text_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_converted_golden_checkpoints_continue_as_recorded(golden, use_cache):
    _, recorded, folder = golden
    ids = recorded["input_ids"]
    generated = load(folder).generate(
        input_ids=ids,
        pixel_values=recorded["pixel_values"],
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        use_cache=use_cache,
    )
    assert generated[0, ids.shape[1] :].tolist() == recorded["greedy_continuation"].tolist()


def test_the_reference_of_this_file_gives_the_recorded_outputs(golden):
    source, recorded, _ = golden
    config, tensors = read_released(source)
    theirs = reference(config, tensors, recorded["input_ids"][0], recorded["pixel_values"])
    expected = {name: recorded[name][0] for name in ("embedding_hidden_states", "logits")}
    assert_parity(theirs, expected | {"image_features": recorded["image_features"]})
    text = reference(config, tensors, recorded["text_input_ids"][0])["logits"]
    torch.testing.assert_close(text, recorded["text_logits"][0], atol=1e-4, rtol=0)


def change_config(config: dict, options: dict) -> dict:
    """Copy a config; options go to the top level, `llm__...` to llm_config, `emb__...` to embedding_config."""
    config = copy.deepcopy(config)
    targets = {"": [config], "llm": [config.get("llm_config")], "emb": [config.get("embedding_config")]}
    targets["both"] = targets["llm"] + targets["emb"]
    for name, value in options.items():
        where, _, field = name.rpartition("__")
        for section in targets[where]:
            section[field] = value
    return config


def released_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the released layout, written from its description."""
    llm, emb = config["llm_config"], config["embedding_config"]
    width, inner, vocab, patch = llm["hidden_size"], llm["intermediate_size"], llm["vocab_size"], emb["patch_size"]
    shapes = {
        TEXT: (vocab, width),
        TOK: (vocab, width),
        HEAD: (vocab, width),
        "language_model.model.norm.weight": (width,),
        "embedding_model.vision_embeddings.class_embedding": (1, 1, width),
        "embedding_model.vision_embeddings.position_embedding": (1, (emb["image_size"] // patch) ** 2 + 1, width),
        "embedding_model.vision_embeddings.patch_embedding.weight": (width, emb["num_channels"], patch, patch),
        "embedding_model.vision_embeddings.patch_embedding.bias": (width,),
    }
    if emb["use_pixel_shuffle_proj"]:
        for index, columns in ((0, int(width / emb["downsample_ratio"] ** 2)), (2, width)):
            shapes[f"embedding_model.pixel_shuffle_proj.{index}.weight"] = (width, columns)
            shapes[f"embedding_model.pixel_shuffle_proj.{index}.bias"] = (width,)
    rows = width + 2 * width // llm["num_attention_heads"] * llm["num_key_value_heads"]
    for prefix, section in (("embedding_model.encoder", emb), ("language_model.model.layers", llm)):
        for index in range(section["num_hidden_layers"]):
            layer = {"attention.wqkv.weight": (rows, width), "attention.wo.weight": (width, width)}
            layer |= {"attention_norm.weight": (width,), "ffn_norm.weight": (width,)}
            layer |= {f"feed_forward.w{n}.weight": (inner, width) for n in (1, 3)}
            layer |= {"feed_forward.w2.weight": (width, inner)}
            if llm["bias"]:
                layer |= {"attention.wqkv.bias": (rows,), "attention.wo.bias": (width,)}
            shapes |= {f"{prefix}.{index}.{name}": shape for name, shape in layer.items()}
    if llm["tie_word_embeddings"]:
        del shapes[HEAD]
    return shapes


def random_released(base: dict, **options) -> tuple[dict, dict[str, torch.Tensor]]:
    """A released checkpoint with random weights; options as in `change_config`."""
    config = change_config(base, options)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in released_shapes(config).items()}
    return config, {name: tensor + 1 if "norm" in name else tensor for name, tensor in tensors.items()}


LINEAR, DYNAMIC = ({"type": kind, "factor": factor} for kind, factor in (("linear", 4.0), ("dynamic", 2.0)))
CONFIGURATIONS = {
    "pre": {},
    "post": {"emb__pixel_shuffle_loc": "post"},
    "one key-value head": {"both__num_key_value_heads": 1},
    "as many key-value heads as heads": {"both__num_key_value_heads": 4},
    "eight small heads": {"both__num_attention_heads": 8, "both__num_key_value_heads": 4},
    "larger tile": {"emb__image_size": 84, "force_image_size": 84},
    "tile smaller than the table": {"emb__image_size": 112},
    "tile larger than the table": {"force_image_size": 112},
    "tile size of the table": {"force_image_size": None},
    "plain convolution": {"emb__use_pixel_shuffle_proj": False, "emb__patch_size": 28, "downsample_ratio": 1.0},
    "no projector but a leftover post": {"emb__use_pixel_shuffle_proj": False, "emb__pixel_shuffle_loc": "post"},
    "sixteen patches per token": {"emb__downsample_ratio": 0.25, "downsample_ratio": 0.25},
    "projector without shuffle": {"emb__downsample_ratio": 1.0, "downsample_ratio": 1.0},
    "post without shuffle": {
        "emb__pixel_shuffle_loc": "post",
        "emb__downsample_ratio": 1.0,
        "downsample_ratio": 1.0,
    },
    "normalised": {"normalize_encoder_output": True},
    "normalised post": {"normalize_encoder_output": True, "emb__pixel_shuffle_loc": "post"},
    "two thetas": {"emb__rope_theta": 10000.0},
    "two thetas post": {"emb__rope_theta": 500, "llm__rope_theta": 20000, "emb__pixel_shuffle_loc": "post"},
    "dynamic, in reach": {"both__rope_scaling": DYNAMIC},
    "dynamic, beyond reach": {"both__rope_scaling": DYNAMIC, "both__max_position_embeddings": 8},
    "dynamic, tables of two lengths": {
        "both__rope_scaling": DYNAMIC,
        "emb__max_position_embeddings": 8,
        "llm__max_position_embeddings": 13,
        "emb__pixel_shuffle_loc": "post",
    },
    "dynamic in the holistic layers": {"emb__rope_scaling": DYNAMIC, "emb__max_position_embeddings": 8},
    "dynamic in the language model": {"llm__rope_scaling": DYNAMIC, "llm__max_position_embeddings": 8},
    "linear": {"both__rope_scaling": LINEAR},
    "linear in the holistic layers": {"emb__rope_scaling": LINEAR, "emb__max_position_embeddings": 16},
    "biases": {"llm__bias": True, "emb__attention_bias": True},
    "other activation and epsilon": {"both__hidden_act": "gelu", "both__rms_norm_eps": 0.01},
    "one holistic layer, grey tiles": {"emb__num_hidden_layers": 1, "emb__num_channels": 1},
    "tied head": {"llm__tie_word_embeddings": True},
}


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_other_configurations_agree_with_the_reference_and_come_back(released, tmp_path, options):
    config, tensors = random_released(released[0], **options)
    source = write_checkpoint(tmp_path / "released", config, tensors)
    convert(source, tmp_path / "hovle")
    model = load(tmp_path / "hovle")
    fresh_model = copy.deepcopy(model)  # dynamic scaling remembers the longest sequence, as in the released code
    generator = torch.Generator().manual_seed(1)
    tile = config["force_image_size"] or config["embedding_config"]["image_size"]
    text = torch.randint(0, PLACEHOLDER, (9,), generator=generator)
    pictures = torch.full((2 * model.config.tokens_per_tile(tile),), PLACEHOLDER)
    ids = torch.cat([text[:4], pictures, text[4:]])
    pixels = torch.randn(2, config["embedding_config"]["num_channels"], tile, tile, generator=generator)
    # Measured worst cases over all configurations: logits 5e-6, embeddings 2e-6 of their largest magnitude.
    assert_parity(converted_outputs(model, ids, pixels), reference(config, tensors, ids, pixels))
    longer_text = torch.cat([text, text])
    assert_parity(converted_outputs(fresh_model, longer_text, None), reference(config, tensors, longer_text))
    convert(tmp_path / "hovle", tmp_path / "back", to="released")
    back_config, back_tensors = read_released(tmp_path / "back")
    assert back_config == config
    assert_same_bits(back_tensors, tensors)


# ---- Round trips -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_released_to_hovle_to_released_is_bit_equal(tmp_path, monkeypatch, name, num_shards):
    config, tensors = read_released(GOLDEN / name)
    config |= {"auto_map": {"AutoModel": "modeling.Model"}, "a_later_field": {"nested": [1, 2.5, None]}}
    source = write_checkpoint(tmp_path / "source", config, tensors, num_shards)
    if num_shards > 1:
        monkeypatch.setattr(checkpoint_files, "MAX_FILE_BYTES", 600_000)
    convert(source, tmp_path / "hovle")
    convert(tmp_path / "hovle", tmp_path / "back", to="released")
    assert (tmp_path / "hovle" / INDEX).exists() == (num_shards > 1)
    back_config, back_tensors = read_released(tmp_path / "back")
    assert back_config == config
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert_same_bits(back_tensors, tensors)
    load(tmp_path / "hovle")


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"pixel_shuffle_loc": "post", "normalize_encoder_output": True}, torch.float32),
        ({"pixel_shuffle_loc": "none", "downsample_ratio": 1.0, "patch_size": 28}, torch.float32),
        ({"embedding_rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}}, torch.float32),
        ({"text_config": {"tie_word_embeddings": True, "attention_bias": True}}, torch.float32),
    ],
    ids=["pre", "bfloat16", "post", "none", "rope", "tied"],
)
def test_a_model_of_ours_goes_to_the_released_layout_and_back_bit_equal(tmp_path, tiny_config, fields, dtype):
    torch.manual_seed(0)
    model = HoVLEForConditionalGeneration(tiny_config(**fields)).to(dtype)
    model.save_pretrained(tmp_path / "hovle")
    remarks = convert(tmp_path / "hovle", tmp_path / "released", to="released")
    assert any("copy of the holistic one" in remark for remark in remarks)
    convert(tmp_path / "released", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "hovle" / "config.json").read_bytes()
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads(
            (tmp_path / "hovle" / file).read_text()
        )
    tensors = load_file(tmp_path / "hovle" / "model.safetensors")
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    if dtype == torch.float32:  # the released layout alone, without our config beside it, says the same
        (tmp_path / "released" / "hovle_config.json").unlink()
        convert(tmp_path / "released", tmp_path / "plain")
        assert_same_bits(load_file(tmp_path / "plain" / "model.safetensors"), tensors)
        ids = torch.arange(1, 9)
        config, released = read_released(tmp_path / "released")
        torch.testing.assert_close(
            load(tmp_path / "plain")(ids[None]).logits[0],
            reference(config, released, ids)["logits"],
            atol=1e-4,
            rtol=0,
        )


def test_the_two_tables_and_the_class_slot_are_kept_beside_the_model(golden):
    source, _, folder = golden
    _, tensors = read_released(source)
    extra = load_file(folder / "released_extra.tensors")
    table = "embedding_model.vision_embeddings.position_embedding"
    assert_same_bits(
        extra,
        {
            TOK: tensors[TOK],
            "embedding_model.vision_embeddings.class_embedding": tensors[table.replace("position", "class")],
            table: tensors[table][:, :1].contiguous(),
        },
    )
    assert not torch.equal(tensors[TOK], tensors[TEXT])
    assert torch.equal(load(folder).get_input_embeddings().weight, tensors[TEXT])


@pytest.mark.parametrize("head_stored", [True, False])
@pytest.mark.parametrize("same_tables", [True, False])
def test_a_tied_head_stays_the_table_the_released_code_ties_it_to(released, tmp_path, same_tables, head_stored):
    config, tensors = random_released(released[0], llm__tie_word_embeddings=True)
    if same_tables:
        tensors[TEXT] = tensors[TOK].clone()
    if head_stored:
        tensors[HEAD] = tensors[TOK].clone()
    convert(write_checkpoint(tmp_path / "released", config, tensors), tmp_path / "hovle")
    model = load(tmp_path / "hovle")
    assert model.config.tie_word_embeddings is same_tables
    assert torch.equal(model.lm_head.weight, tensors[TOK])
    assert torch.equal(model.get_input_embeddings().weight, tensors[TEXT])
    convert(tmp_path / "hovle", tmp_path / "back", to="released")
    assert_same_bits(read_released(tmp_path / "back")[1], tensors)


def test_each_tensor_keeps_its_type(released, tmp_path):
    config, tensors = released
    tensors = {name: t.to(torch.float16 if "norm" in name else torch.bfloat16) for name, t in tensors.items()}
    convert(write_checkpoint(tmp_path / "released", config, tensors), tmp_path / "hovle")
    convert(tmp_path / "hovle", tmp_path / "back", to="released")
    assert_same_bits(read_released(tmp_path / "back")[1], tensors)


# ---- What is converted beside the weights ----------------------------------------------------------------------


def test_without_a_tokenizer_the_command_says_so_and_succeeds(tmp_path, capsys):
    assert cli.main(["convert", str(GOLDEN / "hovle-tiny"), str(tmp_path / "hovle")]) == 0
    assert "No tokenizer was converted" in capsys.readouterr().out
    assert load(tmp_path / "hovle").config.num_embedding_layers == 3
    assert cli.main(["convert", str(tmp_path / "hovle"), str(tmp_path / "back"), "--to", "released"]) == 0


def test_a_tokenizer_that_cannot_be_converted_does_not_stop_the_weights(released, tmp_path):
    source = write_checkpoint(tmp_path / "released", *released)
    (source / "tokenizer.model").write_bytes(b"pieces")
    remarks = convert(source, tmp_path / "hovle")
    assert any("not converted, only copied" in remark and "no SentencePiece model" in remark for remark in remarks)
    assert load(tmp_path / "hovle").config.num_embedding_layers == 3


def test_weights_stay_whatever_error_a_tokenizer_ends_in(released, tmp_path, monkeypatch):
    def fail(folder):
        raise RuntimeError("INTERNAL: piece must not include null character.")

    monkeypatch.setattr(conversion, "fast_tokenizer", fail)
    source = write_checkpoint(tmp_path / "released", *released)
    (source / "tokenizer.model").write_bytes(b"pieces")
    remarks = convert(source, tmp_path / "hovle")
    assert any("not converted, only copied: INTERNAL" in remark for remark in remarks)
    assert load(tmp_path / "hovle").config.num_embedding_layers == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "tokenizer_config.json",
            "[]",
            "No tokenizer was copied: tokenizer_config.json in .* must hold a JSON object",
        ),
        ("added_tokens.json", "{", r"No tokenizer was copied: added_tokens.json in .* cannot be read"),
        ("tokenizer.json", '{"model": 1}', "No processor was written: the tokenizer cannot be loaded"),
    ],
)
def test_weights_stay_whatever_a_tokenizer_s_files_hold(released, tmp_path, name, content, message):
    source = write_checkpoint(tmp_path / "released", *released)
    (source / "tokenizer.model").write_bytes(b"pieces")
    (source / name).write_text(content)
    assert re.search(message, "\n".join(convert(source, tmp_path / "hovle")))
    assert load(tmp_path / "hovle").config.num_embedding_layers == 3


def test_pointers_to_foreign_code_in_a_kept_config_stay_behind(released, tmp_path):
    source = write_checkpoint(tmp_path / "released", *released)
    convert(source, tmp_path / "hovle")
    convert(tmp_path / "hovle", tmp_path / "back", to="released")
    kept = tmp_path / "back" / "hovle_config.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"auto_map": {"AutoModel": "foreign/code--m.C"}}))
    convert(tmp_path / "back", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_models_the_released_layout_cannot_express_are_refused(released, tmp_path):
    convert(write_checkpoint(tmp_path / "released", *released), tmp_path / "hovle")
    config = json.loads((tmp_path / "hovle" / "config.json").read_text())
    (tmp_path / "hovle" / "config.json").write_text(json.dumps(config | {"image_attention": "bidirectional"}))
    with pytest.raises(ValueError, match="image_attention"):
        convert(tmp_path / "hovle", tmp_path / "back", to="released")


def test_without_sentencepiece_its_tokenizer_is_kept_for_later(released, tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "released", *released)
    (source / "tokenizer.model").write_bytes(b"pieces")
    monkeypatch.setitem(sys.modules, "google.protobuf.message", None)
    assert any("pip install 'hovle[convert]'" in remark for remark in convert(source, tmp_path / "hovle"))
    assert (tmp_path / "hovle" / "tokenizer.model").read_bytes() == b"pieces"


def test_code_stays_behind_and_so_do_pointers_to_it(released, tmp_path, tokenizer):
    source = write_checkpoint(tmp_path / "released", *released)
    tokenizer.save_pretrained(source)
    (source / "modeling_internvl_chat.py").write_text("raise SystemExit('code of the checkpoint ran')")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["tokenization.Tokenizer", None]}, "tokenizer_class": "RemoteTokenizer"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    [remark] = convert(source, tmp_path / "hovle")
    assert "No processor was written" in remark  # this tokenizer knows no picture tokens
    assert not (tmp_path / "hovle" / "modeling_internvl_chat.py").exists()
    copied = json.loads((tmp_path / "hovle" / "tokenizer_config.json").read_text())
    assert "auto_map" not in copied
    assert type(tokenizer).from_pretrained(tmp_path / "hovle").encode("a cat") == tokenizer.encode("a cat")
    assert load(tmp_path / "hovle").generation_config.eos_token_id == [2, 5]


def test_a_tile_size_that_differs_from_the_table_is_reported(released, tmp_path):
    source = write_checkpoint(tmp_path / "released", released[0] | {"force_image_size": 112}, released[1])
    remarks = convert(source, tmp_path / "hovle")
    assert any("112 pixels" in remark and "56" in remark for remark in remarks)
    assert load(tmp_path / "hovle").config.image_size == 56


# ---- Refusals --------------------------------------------------------------------------------------------------


def assert_refused(source: Path, message: str, to: str = "hovle") -> None:
    """Conversion raises with this text and leaves nothing behind."""
    folder = source.parent / "result"
    folder.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message):
        convert(source, folder / "model", to=to)
    assert list(folder.iterdir()) == []


def change_index(source: Path, change) -> None:
    index = json.loads((source / INDEX).read_text())
    change(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "nested"])
def test_shards_outside_the_folder_are_refused(released, tmp_path, kind):
    source = write_checkpoint(tmp_path / "a" / "released", *released, num_shards=3)
    shard = "model-00001-of-00003.safetensors"
    outside = tmp_path / "a" / shard
    shutil.move(source / shard, outside)
    name = {"parent": f"../{shard}", "absolute": str(outside), "link": shard, "nested": f"./sub/{shard}"}[kind]
    if kind == "link":
        (source / shard).symlink_to(outside)
    elif kind == "nested":
        (source / "sub").mkdir()
        shutil.copy(outside, source / "sub" / shard)
    change_index(source, lambda weights: weights.update({k: name for k, v in weights.items() if v == shard}))
    assert_refused(source, "lies outside")


def test_the_links_of_the_hubs_cache_are_followed(released, tmp_path):
    whole = write_checkpoint(tmp_path / "whole", *released)
    cache = tmp_path / "models--OpenGVLab--HoVLE"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for file in whole.iterdir():
        shutil.copy(file, cache / "blobs" / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"hash-of-{file.name}")
    convert(snapshot, tmp_path / "hovle")
    assert not any(path.is_symlink() for path in (tmp_path / "hovle").iterdir())


def test_tensors_must_be_exactly_those_of_the_layout(released, tmp_path):
    config, tensors = released
    norm = "language_model.model.norm.weight"
    cases = {
        "missing": ({k: v for k, v in tensors.items() if k != norm}, f"missing {norm}"),
        "unexpected": (
            tensors | {"language_model.lora.weight": torch.ones(2)},
            "unexpected tensors: language_model.lora",
        ),
        "bias": (
            tensors | {"language_model.model.layers.0.attention.wqkv.bias": torch.ones(128)},
            "unexpected.*wqkv.b",
        ),
        "shape": (tensors | {norm: torch.ones(65)}, rf"{norm} has shape \(65,\), but config.json asks for \(64,\)"),
        "grid": (
            tensors | {"embedding_model.vision_embeddings.position_embedding": torch.ones(1, 26, 64)},
            r"position_embedding has shape \(1, 26, 64\), but config.json asks for \(1, 17, 64\)",
        ),
        "integers": (tensors | {norm: torch.ones(64, dtype=torch.int32)}, f"{norm} has type I32"),
    }
    for name, (changed, message) in cases.items():
        assert_refused(write_checkpoint(tmp_path / name / "released", config, changed), message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", [TOK, "language_model.model.layers.3.attention.wqkv.weight", "embedding_model.pixel_shuffle_proj.2.bias"]
)
def test_values_that_are_not_finite_are_refused_and_nothing_is_left(released, tmp_path, name, value):
    config, tensors = released
    tensors[name].view(-1)[-1] = value
    assert_refused(write_checkpoint(tmp_path / "released", config, tensors), rf"{name} holds non-finite values")


def test_shards_and_index_must_agree(released, tmp_path):
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    source = write_checkpoint(tmp_path / "duplicate" / "released", *released, num_shards=3)
    tensors = load_file(source / shards[0])
    save_file(load_file(source / shards[1]) | {HEAD: released[1][HEAD]}, source / shards[1])
    assert_refused(source, f"{HEAD} is a duplicate: both")

    source = write_checkpoint(tmp_path / "wrong" / "released", *released, num_shards=3)
    name = next(iter(tensors))
    change_index(source, lambda weights: weights.update({name: shards[2]}))
    assert_refused(source, f"disagree about {name}")

    source = write_checkpoint(tmp_path / "forgotten" / "released", *released, num_shards=3)
    change_index(source, lambda weights: weights.pop(name))
    assert_refused(source, f"disagree about {name}")

    source = write_checkpoint(tmp_path / "lost" / "released", *released, num_shards=3)
    (source / shards[2]).unlink()
    assert_refused(source, f"{shards[2]}.*missing")

    source = write_checkpoint(tmp_path / "cut" / "released", *released, num_shards=3)
    (source / shards[1]).write_bytes((source / shards[1]).read_bytes()[:-8])
    assert_refused(source, f"{shards[1]}.*no safetensors file")

    source = write_checkpoint(tmp_path / "twice" / "released", *released, num_shards=3)
    text = (source / INDEX).read_text()
    (source / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{name}": "{shards[2]}", '))
    assert_refused(source, f"duplicate key '{name}'")

    source = write_checkpoint(tmp_path / "both" / "released", *released, num_shards=3)
    save_file(released[1], source / "model.safetensors")
    assert_refused(source, "holds both")


def test_pickled_weights_are_refused_with_advice(released, tmp_path):
    source = write_checkpoint(tmp_path / "released", *released)
    (source / "model.safetensors").unlink()
    (source / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x04.")
    assert_refused(source, r"pytorch_model-00001-of-00002.bin.*can run code.*safetensors")
    (source / "pytorch_model-00001-of-00002.bin").unlink()
    assert_refused(source, "neither model.safetensors nor")


REQUIRED = [
    "model_type",
    "normalize_encoder_output",
    "downsample_ratio",
    "force_image_size",
    "llm_config",
    "embedding_config",
    *(f"llm_config.{name}" for name in ("hidden_size", "bias", "rope_scaling", "rope_theta", "tie_word_embeddings")),
    *(f"llm_config.{name}" for name in ("rms_norm_eps", "eos_token_id", "max_position_embeddings", "hidden_act")),
    *(f"embedding_config.{name}" for name in ("image_size", "patch_size", "rope_theta", "use_pixel_shuffle_proj")),
    *(f"embedding_config.{name}" for name in ("img_context_token_id", "llm_vocab_size", "num_hidden_layers")),
]


@pytest.mark.parametrize("path", REQUIRED)
def test_a_missing_config_field_is_named(released, tmp_path, path):
    config, tensors = released
    *sections, name = path.split(".")
    del (config[sections[0]] if sections else config)[name]
    assert_refused(write_checkpoint(tmp_path / "released", config, tensors), f"config.json lacks {path}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"emb__num_key_value_heads": 4}, "llm_config.num_key_value_heads = 2 but embedding_config.* = 4"),
        ({"emb__rms_norm_eps": 1e-6}, "rms_norm_eps = 1e-05 but embedding_config.rms_norm_eps = 1e-06"),
        ({"emb__hidden_act": "gelu"}, "llm_config.hidden_act = 'silu' but"),
        ({"emb__llm_hidden_size": 32}, "llm_config.hidden_size = 64 but embedding_config.llm_hidden_size = 32"),
        ({"emb__attention_bias": True}, "llm_config.bias = False but embedding_config.attention_bias = True"),
        (
            {"both__num_key_value_heads": 3},
            r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)",
        ),
        ({"both__hidden_size": "64"}, "llm_config.hidden_size in config.json must be int, got '64'"),
        ({"both__rope_scaling": {"type": "yarn", "factor": 2.0}}, "must be 'dynamic' or 'linear', got 'yarn'"),
        ({"both__rope_scaling": {"factor": 2.0}}, "lacks embedding_config.rope_scaling.type"),
        ({"downsample_ratio": 0.25}, r"downsample_ratio \(0.25\) and embedding_config.downsample_ratio \(0.5\)"),
        ({"emb__pixel_shuffle_loc": "middle"}, "'pre' or 'post', got 'middle'"),
        ({"emb__image_size": 60}, r"image_size \(60\) must be a positive multiple of 28"),
        ({"force_image_size": 60}, r"image_size \(60\) must be a positive multiple of 28"),
        ({"emb__img_context_token_id": 260}, r"img_context_token_id \(260\) must lie below vocab_size \(260\)"),
        ({"emb__use_ls": True}, "embedding_config.use_ls = True"),
        ({"emb__special_token_maps": {"<img>": 260}}, "special_token_maps"),
        ({"llm__model_type": "qwen2"}, "llm_config.model_type in config.json is 'qwen2'"),
        ({"model_type": "llava"}, "model_type in config.json is 'llava'"),
        ({"model_type": "hovle"}, "is a hovle model already"),
    ],
)
def test_a_model_that_is_not_one_decoder_is_refused_with_names_and_values(released, tmp_path, options, message):
    config, tensors = released
    config = change_config(config, options)
    assert_refused(write_checkpoint(tmp_path / "released", config, tensors), message)


def test_a_tied_head_that_differs_is_refused(released, tmp_path):
    config, tensors = released
    config["llm_config"]["tie_word_embeddings"] = True
    assert_refused(write_checkpoint(tmp_path / "released", config, tensors), f"{HEAD} differs from {TOK}")


def test_nothing_is_overwritten_but_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "model").mkdir()
    convert(GOLDEN / "hovle-tiny", tmp_path / "model")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "model").iterdir())
    with pytest.raises(ValueError, match="exists already"):
        convert(GOLDEN / "hovle-tiny", tmp_path / "model")
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "model").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        assert any(path.suffix == ".safetensors" for path in next(tmp_path.iterdir()).iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("hovle.convert.command._save_tokenizer_files", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(GOLDEN / "hovle-tiny", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_new_files_have_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    convert(GOLDEN / "hovle-tiny", tmp_path / "model")
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_a_source_that_is_no_folder_is_named(tmp_path, capsys):
    assert cli.main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "model")]) == 1
    assert "as there is no such folder: expected a folder with config.json, or a Hub id" in capsys.readouterr().err
    with pytest.raises(ValueError, match="must be one of hovle, released"):
        convert(GOLDEN / "hovle-tiny", tmp_path / "model", to="gguf")


def test_a_hub_id_downloads_no_code_and_no_pickles(tmp_path, monkeypatch):
    asked = {}

    def download(repo_id, allow_patterns):
        asked.update(repo_id=repo_id, patterns=allow_patterns)
        return GOLDEN / "hovle-tiny"

    monkeypatch.setattr(checkpoint_files, "snapshot_download", download)
    convert("OpenGVLab/HoVLE", tmp_path / "model")
    assert asked["repo_id"] == "OpenGVLab/HoVLE"
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["patterns"])


# ---- The way to the released layout ----------------------------------------------------------------------------


def test_what_the_released_layout_cannot_express_is_refused(tmp_path, tiny_config):
    cases = {
        "mlp_bias": ({"mlp_bias": True}, r"text_config.mlp_bias \(False against True\)"),
        "head_dim": ({"head_dim": 32}, "text_config.head_dim"),
        "rope": (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "knows dynamic and linear rotary scaling, not 'yarn'",
        ),
    }
    for name, (text_config, message) in cases.items():
        model = HoVLEForConditionalGeneration(tiny_config(text_config=text_config))
        model.save_pretrained(tmp_path / name / "hovle")
        assert_refused(tmp_path / name / "hovle", message, to="released")
    config = tiny_config().to_dict()
    config["text_config"] = {"model_type": "qwen2", "num_hidden_layers": 4}
    source = write_checkpoint(tmp_path / "qwen" / "hovle", config, {"a": torch.ones(1)})
    assert_refused(source, "this one is 'qwen2'", to="released")
    golden = Path(shutil.copytree(GOLDEN / "hovle-tiny", tmp_path / "golden" / "released"))
    assert_refused(golden, "is no hovle model: model_type is 'internvl_chat'", to="released")


def test_documents_of_another_model_are_refused(golden, tmp_path):
    _, _, folder = golden
    changed = Path(shutil.copytree(folder, tmp_path / "theta" / "hovle"))
    config = json.loads((changed / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 5.0
    (changed / "config.json").write_text(json.dumps(config))
    assert_refused(changed, "released_config.json describes .* another model .*rope_parameters", to="released")

    changed = Path(shutil.copytree(folder, tmp_path / "extra" / "hovle"))
    (changed / "released_extra.tensors").unlink()
    assert_refused(changed, "has released_config.json but lacks released_extra.tensors", to="released")

    convert(folder, tmp_path / "back" / "released", to="released")
    config = json.loads((tmp_path / "back" / "released" / "config.json").read_text())
    config["normalize_encoder_output"] = True
    (tmp_path / "back" / "released" / "config.json").write_text(json.dumps(config))
    assert_refused(tmp_path / "back" / "released", "hovle_config.json describes .*normalize_encoder_output")


def test_a_retrained_model_takes_its_new_weights_back(golden, tmp_path):
    _, _, folder = golden
    shutil.copytree(folder, tmp_path / "hovle")
    tensors = load_file(tmp_path / "hovle" / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "hovle" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "hovle", tmp_path / "released", to="released")
    assert torch.equal(read_released(tmp_path / "released")[1][HEAD], tensors["lm_head.weight"])


def test_shards_are_readable_by_the_library_whatever_their_types(tmp_path):
    outputs = [
        checkpoint_files.Output(name, tuple(t.shape), t.dtype, lambda t=t: t)
        for name, t in {
            "odd": torch.randn(3, 5).to(torch.bfloat16),
            "wide": torch.randn(7, dtype=torch.float64),
            "transposed": torch.randn(4, 6).T,
        }.items()
    ]
    checkpoint_files.write_tensors(tmp_path / "file.safetensors", outputs, {"note": "é"})
    assert_same_bits(load_file(tmp_path / "file.safetensors"), {o.name: o.load().contiguous() for o in outputs})
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}


# ---- Memory ----------------------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
from hovle.convert import command as conversion

def anonymous():
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def sample():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

folders = sys.argv[1:]
for source, destination, to in zip(folders, folders[1:], ("hovle", "released")):
    done, peak, before = threading.Event(), 0, anonymous()
    sampler = threading.Thread(target=sample)
    sampler.start()
    conversion.convert(source, destination, to=to)
    done.set()
    sampler.join()
    print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_stays_below_1_3_times_the_largest_shard(released, tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2560, "num_attention_heads": 8, "num_key_value_heads": 8}
    options = {f"both__{name}": size for name, size in (sizes | {"num_hidden_layers": 1}).items()}
    options |= {"emb__llm_hidden_size": 1024, "llm__vocab_size": 14_000, "emb__llm_vocab_size": 14_000}
    config = change_config(released[0], options)
    shapes = released_shapes(config)
    groups = {"tables": [], "head": [], "encoder": [], "layers": [], "text": []}
    for name in shapes:
        key = {TOK: "tables", HEAD: "head", TEXT: "text"}.get(name)
        groups[key or ("encoder" if name.startswith("embedding_model") else "layers")].append(name)
    source = tmp_path / "released"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for key, names in groups.items():
        save_file({name: torch.full(shapes[name], 0.5) for name in names}, source / f"{key}.safetensors")
        weight_map |= dict.fromkeys(names, f"{key}.safetensors")
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    assert largest > 50e6
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    folders = [str(tmp_path / name) for name in ("released", "hovle", "back")]
    result = subprocess.run([sys.executable, "-c", MEASURE, *folders], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    # Measured: 0.14 times; most tensors are written straight from the mapped file.
    assert all(int(peak) < 1.3 * largest for peak in result.stdout.split())


def test_the_result_knows_how_its_pictures_are_tiled(released, tmp_path):
    config, tensors = released
    source = write_checkpoint(tmp_path / "source", {**config, "max_dynamic_patch": 6}, tensors)
    convert(source, tmp_path / "ours")
    processor = HoVLEImageProcessor.from_pretrained(tmp_path / "ours")
    assert (processor.size["height"], processor.min_patches, processor.max_patches) == (56, 1, 6)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 251 words whose picture tokens have the ids of the golden checkpoints, 251 to 253."""
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(250)} | {"?": 250}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<img>", "</img>", "<IMG_CONTEXT>"]})
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return tokenizer


def test_with_a_fast_tokenizer_the_result_takes_chats(released, tmp_path):
    source = write_checkpoint(tmp_path / "source", *released)
    small_tokenizer().save_pretrained(source)
    convert(source, tmp_path / "ours")
    processor = HoVLEProcessor.from_pretrained(tmp_path / "ours")
    picture = {"type": "image", "image": Image.new("RGB", (56, 56))}
    chat = [{"role": "user", "content": [picture, {"type": "text", "text": "hello"}]}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 4
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)


@pytest.mark.parametrize(
    ("name", "value"), [("use_thumbnail", False), ("dynamic_image_size", False), ("pad2square", True)]
)
def test_tile_settings_that_ours_do_not_follow_are_told(released, tmp_path, name, value):
    config, tensors = released
    source = write_checkpoint(tmp_path / "source", {**config, name: value}, tensors)
    assert any(name in remark for remark in convert(source, tmp_path / "ours"))


def test_an_unknown_shuffle_order_is_refused(released, tmp_path):
    config, tensors = released
    assert_refused(write_checkpoint(tmp_path / "source", {**config, "ps_version": "v1"}, tensors), "ps_version")


def test_a_tokenizer_with_another_placeholder_is_refused(released, tmp_path, make_tokenizer):
    config, tensors = released
    source = write_checkpoint(tmp_path / "source", config, tensors)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<img>", "</img>", "<IMG_CONTEXT>"]})
    tokenizer.save_pretrained(source)
    assert_refused(source, "IMG_CONTEXT")


# ---- Strangers' values, keys and names -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        *(({f"both__{field}": 0}, f"llm_config.{field}") for field in ("num_attention_heads", "num_key_value_heads")),
        *(({f"both__{field}": -64}, f"llm_config.{field}") for field in ("hidden_size", "intermediate_size")),
        *(({"llm__vocab_size": size, "emb__llm_vocab_size": size}, "llm_config.vocab_size") for size in (0, -4)),
        *(({"both__rms_norm_eps": eps}, "llm_config.rms_norm_eps") for eps in (-1.0, 0.0, float("nan"))),
        ({"both__hidden_act": "evil"}, "llm_config.hidden_act"),
        ({"llm__num_hidden_layers": 10**6}, "llm_config.num_hidden_layers"),
        ({"llm__num_hidden_layers": 1000}, "llm_config.num_hidden_layers .*1000, but the tensors are those of"),
        ({"llm__num_hidden_layers": 0}, "llm_config.num_hidden_layers"),
        ({"emb__num_hidden_layers": 10**6}, "embedding_config.num_hidden_layers"),
        ({"emb__num_hidden_layers": -1}, "embedding_config.num_hidden_layers"),
        ({"emb__num_hidden_layers": 500}, "embedding_config.num_hidden_layers .*500, but the tensors are those of"),
        *(
            ({f"{section}__rope_scaling": {"type": kind, "factor": factor}}, f"{where}.rope_scaling.factor")
            for section, where in (("emb", "embedding_config"), ("llm", "llm_config"))
            for kind, factor in (("dynamic", 0), ("linear", 0.0), ("dynamic", float("nan")), ("linear", -2))
        ),
        *(({"emb__rope_theta": theta}, "embedding_config.rope_theta") for theta in (0, -1, float("nan"))),
        *(({"llm__max_position_embeddings": size}, "llm_config.max_position_embeddings") for size in (0, -1)),
        *(({f"emb__{name}": 0}, f"embedding_config.{name}") for name in ("patch_size", "num_channels", "image_size")),
        *(({f"emb__{name}": 10**9}, name) for name in ("patch_size", "num_channels", "image_size")),
        *(({"force_image_size": size}, "force_image_size") for size in (0, -56)),
        ({"force_image_size": 56 * 10**6}, "force_image_size"),
        *(({"max_dynamic_patch": most}, "max_dynamic_patch") for most in (0, -1, 10**6)),
        *(({"min_dynamic_patch": fewest}, "min_dynamic_patch") for fewest in (0, -1, 13)),
        ({"llm__initializer_range": -1.0}, "llm_config.initializer_range"),
        ({"llm__pad_token_id": 10**6}, "llm_config.pad_token_id"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_values_that_cannot_work_are_refused_by_the_field_s_name_at_once(released, tmp_path, options, name):
    config, tensors = released
    source = write_checkpoint(tmp_path / "released", change_config(config, options), tensors)
    started = time.monotonic()
    assert_refused(source, name)
    assert time.monotonic() - started < 5


def test_a_hovle_config_of_more_layers_than_tensors_is_refused_before_a_model_is_built(golden, tmp_path, monkeypatch):
    _, _, folder = golden
    changed = Path(shutil.copytree(folder, tmp_path / "hovle"))
    for name in ("released_config.json", "released_extra.tensors"):
        (changed / name).unlink()
    config = json.loads((changed / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 700
    (changed / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(conversion, "tensor_rows", None)
    assert_refused(changed, "num_hidden_layers in config.json is 700, but the tensors are those of", to="released")


class PanicException(BaseException):
    """As a panic of a library in Rust arrives: no `Exception`."""


PANIC = PanicException("called `Option::unwrap()` on a `None` value")


@pytest.mark.parametrize("error", [PANIC, RecursionError(), MemoryError(), KeyError("x"), OSError("x")])
@pytest.mark.parametrize(
    "step",
    ["fast_tokenizer", "copy_json", "PreTrainedTokenizerFast.from_pretrained", "HoVLEProcessor.save_pretrained"],
)
def test_weights_are_written_whatever_a_tokenizer_step_raises(released, tmp_path, monkeypatch, step, error):
    def fail(*args, **kwargs):
        raise error

    source = write_checkpoint(tmp_path / "released", *released)
    if step == "fast_tokenizer":
        (source / "tokenizer.model").write_bytes(b"pieces")
    else:
        small_tokenizer().save_pretrained(source)
    monkeypatch.setattr(f"hovle.convert.command.{step}", fail)
    remarks = convert(source, tmp_path / "hovle")
    assert any(re.search("tokenizer (was|cannot)|No tokenizer", remark) for remark in remarks)
    assert load(tmp_path / "hovle").config.num_embedding_layers == 3
    assert not (tmp_path / "hovle" / "processor_config.json").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_tokenizer_step_still_ends_the_conversion(released, tmp_path, monkeypatch, error):
    def interrupt(folder):
        raise error

    source = write_checkpoint(tmp_path / "released", *released)
    (source / "tokenizer.model").write_bytes(b"pieces")
    monkeypatch.setattr(conversion, "fast_tokenizer", interrupt)
    with pytest.raises(error):
        convert(source, tmp_path / "out" / "hovle")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_template_of_another_type_does_not_stop_the_weights(released, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "fast_tokenizer", lambda folder: small_tokenizer())
    config, tensors = released
    source = write_checkpoint(tmp_path / "released", config | {"template": ["internlm2-chat"]}, tensors)
    (source / "tokenizer.model").write_bytes(b"pieces")
    convert(source, tmp_path / "hovle")
    assert load(tmp_path / "hovle").config.num_embedding_layers == 3


STRANGE = {"attn_implementation": "evil/kernel", "configuration_files": ["config.evil.json"], "a\x1b[2Jb": 1}


def test_unknown_keys_of_a_kept_config_stay_behind_and_are_told(golden, tmp_path, capsys):
    _, _, folder = golden
    convert(folder, tmp_path / "back", to="released")
    kept = tmp_path / "back" / "hovle_config.json"
    content = json.loads(kept.read_text())
    content |= STRANGE | {"architectures": ["EvilModel"]}
    content["text_config"] |= STRANGE | {"auto_map": {"AutoModel": "evil/code--m.C"}}
    kept.write_text(json.dumps(content))
    assert cli.main(["convert", str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert r"stays behind: a\x1b[2Jb, attn_implementation, configuration_files, text_config.a\x1b[2Jb" in told
    written = (tmp_path / "again" / "config.json").read_text()
    assert "evil" not in written.lower()
    before, after = json.loads((folder / "config.json").read_text()), json.loads(written)
    assert after == before
    assert load(tmp_path / "again").config._attn_implementation == "sdpa"


def test_a_header_that_names_a_tensor_twice_is_refused(released, tmp_path):
    source = write_checkpoint(tmp_path / "released", *released)
    path = source / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, name = content[8 : 8 + length].rstrip(), "language_model.model.norm.weight"
    entry = json.dumps({name: json.loads(header)[name]}).encode()[1:-1]
    for twice in (header[:-1] + b"," + entry + b"}", b"{" + entry + b"," + header[1:]):
        twice += b" " * (-len(twice) % 8)
        path.write_bytes(len(twice).to_bytes(8, "little") + twice + content[8 + length :])
        assert_refused(source, f"header of model.safetensors.*duplicate (key|field).*{name}|no safetensors file")


@pytest.mark.parametrize("kind", ["unexpected", "type", "not finite", "shard", "duplicate", "index"])
def test_names_of_a_stranger_s_file_are_told_without_control_characters(released, tmp_path, kind, capsys):
    config, tensors = released
    evil = "language_model.\x1b[31m\r\nevil\u202e"
    num_shards = 2 if kind in ("shard", "duplicate", "index") else 1
    changed = tensors | {evil: torch.ones(2, dtype=torch.int32 if kind == "type" else torch.float32)}
    source = write_checkpoint(tmp_path / "released", config, changed, num_shards)
    if kind == "shard":
        change_index(source, lambda weights: weights.update({evil: "model-\x1b[2J.safetensors"}))
    if kind == "index":
        change_index(source, lambda weights: weights.pop(evil))
    if kind == "duplicate":
        for file in source.glob("*.safetensors"):
            save_file(load_file(file) | {evil: torch.ones(2)}, file)
    if kind == "not finite":
        with pytest.raises(ValueError, match="non-finite") as caught:
            checkpoint_files.check_finite(evil, torch.tensor([float("nan")]))
    else:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the names in it are looked at below
            convert(source, tmp_path / "hovle")
        assert cli.main(["convert", str(source), str(tmp_path / "hovle")]) == 1
        assert not re.search("[\x1b\r\u202e]", capsys.readouterr().err)
    assert r"\x1b" in str(caught.value)
    assert not re.search("[\x1b\r\n\u202e]", str(caught.value))


@pytest.mark.parametrize(
    "name",
    ["config.json", "hovle_config.json", "generation_config.json", INDEX, "tokenizer.json", "added_tokens.json"],
)
def test_documents_nested_without_end_are_named(released, tmp_path, name):
    source = write_checkpoint(tmp_path / "released", *released, num_shards=2)
    (source / name).write_text('{"a":' + "[" * 3000 + "]" * 3000 + "}")
    if "token" in name:
        assert any(f"{name} in {source} nests lists" in remark for remark in convert(source, tmp_path / "hovle"))
        assert load(tmp_path / "hovle").config.num_embedding_layers == 3
    else:
        assert_refused(source, f"{name} in {source} nests lists and objects more than 100 levels deep")


def test_what_a_killed_conversion_left_is_cleaned_by_the_next(tmp_path):
    program = "import sys\nfrom hovle.convert import command\nimport os, signal\n"
    program += "command.copy_code = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n"
    program += "command.convert(sys.argv[1], sys.argv[2])"
    folders = [str(GOLDEN / "hovle-tiny"), str(tmp_path / "model")]
    assert subprocess.run([sys.executable, "-c", program, *folders], check=False).returncode < 0
    assert len(list(tmp_path.glob(".model-*"))) == 1
    convert(*folders)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
