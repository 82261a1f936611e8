"""Turn a released HoVLE checkpoint into a hovle model, and back; every tensor and the config come back bit for bit.

  hovle convert OpenGVLab/HoVLE models/hovle             released layout (internvl_chat) -> hovle
  hovle convert models/hovle released --to released      hovle -> released layout

Only safetensors and JSON are read: no code of the checkpoint runs and nothing is unpickled. DST appears when it is
complete. What the flat decoder has no place for (the language model's own text table, the class slot of the position
embedding) lies beside the model in released_extra.tensors, the original config.json in released_config.json; no
inference loads them, `--to released` needs them. The other way, hovle_config.json keeps the hovle config.
"""

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.configuration_utils import PreTrainedConfig

from ..errors import foreign_errors, printable, printable_name
from ..files.atomic import appear_when_complete
from ..files.checkpoint_files import (
    CONFIG,
    HOVLE_CONFIG,
    LICENCE,
    Checkpoint,
    Output,
    check_layers,
    copy_json,
    dump_json,
    inside,
    local_folder,
    read_json,
    write_tensors,
    write_weights,
)
from ..model.configuration_hovle import HoVLEConfig
from ..model.image_processing_hovle import MOST_TILES, HoVLEImageProcessor
from ..model.language_model import IMAGE_TOKENS
from ..model.modeling_hovle import HoVLEForConditionalGeneration
from ..model.processing_hovle import HoVLEProcessor
from ..model.remote_code import AUTO_MAP, copy_code
from .released_layout import (
    HEAD,
    OUR_POSITIONS,
    TEXT_TABLE,
    UNUSED_TABLE,
    Row,
    check_same_model,
    hovle_config,
    is_extra,
    read_field,
    read_number,
    released_config,
    tensor_rows,
    tile_size,
)
from .sentencepiece_tokenizer import CHAT_TEMPLATES, END_OF_TURN, fast_tokenizer

RELEASED_CONFIG, RELEASED_EXTRA = "released_config.json", "released_extra.tensors"
"""Beside a converted model; the second is a safetensors file that engines must not take for weights."""

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
)

LAYERS = {"embedding_config": "embedding_model.encoder.", "llm_config": "language_model.model.layers."}
"""Section of the released config -> what the names of its layers' tensors begin with."""

TIED_HEAD = "tied_head"
"""Metadata key of the extra file: the source stored its tied head although the table says it all."""

STAND_IN_REMARK = (
    f"This model has no {RELEASED_EXTRA}: the language model's own text table is a copy of the holistic one and the "
    "class slot is zero; no forward pass reads them. Tile settings and conversation template in config.json are "
    "those of the published models."
)


@dataclass
class Plan:
    """All that goes into the new folder; a tensor is read when it is written."""

    outputs: list[Output]
    documents: dict[str, bytes]
    """Text files by name."""

    extra: list[Output] = field(default_factory=list)
    """Tensors the flat model has no place for."""

    extra_metadata: dict[str, str] = field(default_factory=dict)
    image_processor: HoVLEImageProcessor | None = None
    """How pictures are cut, for a hovle model."""

    remarks: list[str] = field(default_factory=list)
    """What the user should know, one sentence each."""

    def write(self, folder: Path) -> None:
        """Write weights, extra tensors and documents."""
        write_weights(folder, self.outputs)
        if self.extra:
            write_tensors(folder / RELEASED_EXTRA, self.extra, self.extra_metadata)
        for name, content in self.documents.items():
            (folder / name).write_bytes(content)


def convert(src: str | os.PathLike, dst: str | os.PathLike, to: str = "hovle") -> list[str]:
    """Convert a checkpoint between the released layout and ours.

    Memory is needed for one tensor at a time, whatever the size of the model.

    Args:
        src: Folder with config.json and safetensors, or a Hub id to download.
        dst: Folder to create; it may exist if it is empty. It appears when it is complete.
        to: Layout of the result, `"hovle"` or `"released"`.

    Returns:
        What the user should know (stand-ins, a missing tokenizer), one sentence each.

    Raises:
        ValueError: When the source is incomplete, inconsistent or unsafe to read, when `to` cannot express the
            model, or when `dst` exists.
    """
    if to not in PLANS:
        raise ValueError(f"to must be one of {', '.join(PLANS)}, got {to!r}.")
    dst = Path(dst).resolve()
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst} exists already; nothing is overwritten. Choose another DST or remove it first.")
    folder = local_folder(src)
    plan = PLANS[to](folder)
    with appear_when_complete(dst) as new_folder:
        plan.write(new_folder)
        if to == "hovle":
            copy_code(new_folder)
        if (folder / GENERATION_CONFIG).exists():
            copy_json(folder, new_folder, GENERATION_CONFIG)
        if (folder / LICENCE).exists():
            shutil.copyfile(inside(folder, LICENCE), new_folder / LICENCE)
        plan.remarks += filter(None, [_save_tokenizer_files(folder, new_folder, to)])
        if plan.image_processor is not None:
            plan.remarks += filter(None, [_save_processor(new_folder, plan.image_processor)])
    return plan.remarks


def _plan_hovle(src: Path) -> Plan:
    """Prepare the way from the released layout; checks everything but the values."""
    released = read_json(src, CONFIG)
    if released.get("model_type") == HoVLEConfig.model_type:
        raise ValueError(f"{src} is a hovle model already; `--to released` converts it back.")
    config = hovle_config(released)
    source = Checkpoint(src)
    for section, prefix in LAYERS.items():
        count = read_field(released, f"{section}.num_hidden_layers", int)
        check_layers(source.names, prefix, count, f"{section}.num_hidden_layers")
    ties = read_field(released, "llm_config.tie_word_embeddings", bool)
    copies = {HEAD: UNUSED_TABLE} if ties and HEAD in source else {}
    if ties and _same_bits(source, UNUSED_TABLE, TEXT_TABLE):
        config = hovle_config(released, tie_word_embeddings=True)
        copies[UNUSED_TABLE] = TEXT_TABLE
    rows = tensor_rows(config, ties)
    table = next(row.shape for row in rows if row.released == TEXT_TABLE)
    source.claim({row.released: row.shape for row in rows} | dict.fromkeys(copies, table))
    for copy, original in copies.items():
        if not _same_bits(source, copy, original):
            raise ValueError(f"llm_config ties the head, but {copy} differs from {original}.")
    outputs = [output for row in rows for output in _split(row, source)]
    config.architectures = [HoVLEForConditionalGeneration.__name__]
    config.auto_map = dict(AUTO_MAP)
    config.dtype = source.common_dtype()
    content, remarks = config.to_json_string(use_diff=False).encode(), _other_tiles(released)
    if (src / HOVLE_CONFIG).exists():
        content, left_behind = _kept_config(src, config)
        if left_behind:
            names = ", ".join(map(printable_name, left_behind))
            remarks.append(f"{HOVLE_CONFIG} holds what a hovle model has no field for, which stays behind: {names}.")
    plan = Plan(
        outputs=[output for output in outputs if not is_extra(output.name)],
        documents={CONFIG: content, RELEASED_CONFIG: inside(src, CONFIG).read_bytes()},
        extra=[output for output in outputs if is_extra(output.name)],
        extra_metadata={TIED_HEAD: "stored"} if HEAD in copies else {},
        image_processor=_image_processor(released, config),
        remarks=remarks,
    )
    if tile_size(released) != config.image_size:
        plan.remarks.append(
            f"force_image_size asks for tiles of {tile_size(released)} pixels while the position table is for "
            f"{config.image_size}: image_size stays {config.image_size}, and the model interpolates the table."
        )
    return plan


def _kept_config(src: Path, config: HoVLEConfig) -> tuple[bytes, list[str]]:
    """The hovle config that lies beside a released checkpoint, and what of it stays behind.

    It comes from anyone and config.json says what is loaded and run, so only fields that describe a model travel.

    Args:
        src: Folder of the checkpoint.
        config: The same model as the released config describes it; ValueError unless both agree.
    """
    kept = read_json(src, HOVLE_CONFIG)
    known = {name: value for name, value in kept.items() if name in _fields(config)}
    left_behind = kept.keys() - known.keys()
    if isinstance(text := kept.get("text_config"), dict):
        known["text_config"] = {name: value for name, value in text.items() if name in _fields(config.text_config)}
        left_behind |= {f"text_config.{name}" for name in text.keys() - known["text_config"].keys()}
    check_same_model(HOVLE_CONFIG, config, HoVLEConfig.from_dict(dict(known)))
    known |= {"auto_map": config.auto_map, "architectures": config.architectures}
    if known == kept:
        return inside(src, HOVLE_CONFIG).read_bytes(), []
    if kept.get("auto_map") == config.auto_map:
        left_behind -= {"auto_map"}
    return dump_json(known), sorted(left_behind)


def _fields(config: PreTrainedConfig) -> set[str]:
    """Names of the fields that describe a model; others can name code, kernels or files."""
    return {field.name for field in fields(config)} | {"model_type", "output_attentions", "_name_or_path"}


def _plan_released(src: Path) -> Plan:
    """Prepare the way to the released layout; checks everything but the values."""
    content = read_json(src, CONFIG)
    if content.get("model_type") != HoVLEConfig.model_type:
        raise ValueError(f"{src} is no hovle model: model_type is {content.get('model_type')!r:.80}.")
    config = HoVLEConfig.from_dict(content)
    source = Checkpoint(src, RELEASED_EXTRA)
    has_config = (src / RELEASED_CONFIG).exists()
    if has_config != source.has_extra:
        found, lost = sorted((RELEASED_CONFIG, RELEASED_EXTRA), reverse=not has_config)
        raise ValueError(f"{src} has {found} but lacks {lost}: keep both for the way back, or remove both.")
    released = read_json(src, RELEASED_CONFIG) if has_config else released_config(config)
    ties = read_field(released, "llm_config.tie_word_embeddings", bool)
    described = hovle_config(released, tie_word_embeddings=ties and config.tie_word_embeddings)
    check_same_model(RELEASED_CONFIG if has_config else "The released layout", described, config)
    num_layers = config.text_config.num_hidden_layers
    check_layers(source.names, "model.language_model.layers.", num_layers, "text_config.num_hidden_layers")
    copies = {}
    if config.tie_word_embeddings or not source.has_extra:
        copies[UNUSED_TABLE] = TEXT_TABLE
    if TIED_HEAD in source.metadata:
        copies[HEAD] = UNUSED_TABLE
    rows = [row for row in tensor_rows(config, ties) if row.released not in copies]
    parts = {name: shape for row in rows for name, shape in row.parts.items()}
    source.claim({name: shape for name, shape in parts.items() if source.has_extra or not is_extra(name)})
    outputs = {row.released: _join(row, source) for row in rows}
    for copy, original in copies.items():
        outputs[copy] = _copy(outputs[original], copy)
    if has_config:
        document = inside(src, RELEASED_CONFIG).read_bytes()
    else:
        document = dump_json(released | {"torch_dtype": str(source.common_dtype()).removeprefix("torch.")})
    return Plan(
        outputs=list(outputs.values()),
        documents={CONFIG: document, HOVLE_CONFIG: inside(src, CONFIG).read_bytes()},
        remarks=[] if source.has_extra else [STAND_IN_REMARK],
    )


PLANS = {"hovle": _plan_hovle, "released": _plan_released}


def _split(row: Row, source: Checkpoint) -> Iterator[Output]:
    """What one released tensor becomes."""
    for index, (name, shape) in enumerate(row.parts.items()):

        def load(index: int = index) -> torch.Tensor:
            return row.split(source.tensor(row.released))[index]

        yield Output(name, shape, source.dtype(row.released), load)


def _join(row: Row, source: Checkpoint) -> Output:
    """Make one released tensor of its parts; where the class slot is not kept, it is zero."""
    dtypes = {source.dtype(name) for name in row.parts if name in source} or {source.dtype(OUR_POSITIONS)}
    if len(dtypes) > 1:
        raise ValueError(f"{', '.join(row.parts)} form one released tensor and must have one type, not {dtypes}.")
    dtype = dtypes.pop()

    def load() -> torch.Tensor:
        parts = row.parts.items()
        return row.join([source.tensor(n) if n in source else torch.zeros(shape, dtype=dtype) for n, shape in parts])

    return Output(row.released, row.shape, dtype, load)


def _copy(output: Output, name: str) -> Output:
    """The same tensor under another name."""
    return Output(name, output.shape, output.dtype, output.load)


def _same_bits(source: Checkpoint, left: str, right: str) -> bool:
    """Whether two tensors are there and equal to the last bit (0.0 and -0.0 differ)."""
    if left not in source or right not in source or source.dtype(left) != source.dtype(right):
        return False
    return torch.equal(*(source.tensor(name).view(torch.uint8) for name in (left, right)))


def _save_tokenizer_files(src: Path, dst: Path, to: str) -> str | None:
    """Copy the tokenizer; return what the user should know about it, or None when there is nothing to say."""
    present = [name for name in TOKENIZER_FILES if (src / name).exists()]
    try:
        with _whole_or_not(dst), foreign_errors("No tokenizer was copied"):
            for name in present:
                if name.endswith(".json"):
                    copy_json(src, dst, name)
                else:
                    shutil.copyfile(inside(src, name), dst / name)
    except ValueError as error:
        return f"{error} Weights and config are complete."
    if "tokenizer.json" in present:
        return None
    if "tokenizer.model" in present:
        return None if to == "released" else _save_fast_tokenizer(src, dst)
    return "No tokenizer was converted: the source holds none. Weights and config are complete."


def _save_fast_tokenizer(src: Path, dst: Path) -> str | None:
    """Write the fast form of a SentencePiece tokenizer, its chat template and where a turn ends."""
    try:
        with _whole_or_not(dst), foreign_errors("The tokenizer was not converted, only copied"):
            return _convert_tokenizer(src, dst)
    except ImportError:
        return "The tokenizer was not converted, only copied: pip install 'hovle[convert]', then convert again."
    except ValueError as error:
        return str(error)


def _convert_tokenizer(src: Path, dst: Path) -> str | None:
    """Do so; it raises whatever the files make other people's code raise."""
    tokenizer = fast_tokenizer(src)
    template = read_json(src, CONFIG).get("template")
    known = tokenizer.get_vocab()
    chat_template = CHAT_TEMPLATES.get(str(template)) if END_OF_TURN in known else None
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(dst)
    if chat_template is not None:
        _end_turns(dst, known[END_OF_TURN])
    elif template is not None and tokenizer.chat_template is None:
        return f"No chat template was written: the conversation format {template!r:.80} is unknown here."
    return None


@contextlib.contextmanager
def _whole_or_not(folder: Path) -> Iterator[None]:
    """Remove the files a step added to a folder when it fails."""
    before = set(folder.iterdir())
    try:
        yield
    except BaseException:
        for path in set(folder.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _end_turns(folder: Path, end_of_turn_id: int) -> None:
    """Let generation also stop at the end of a turn, as the released code's chat does."""
    if (folder / GENERATION_CONFIG).exists():
        generation = read_json(folder, GENERATION_CONFIG)
    else:
        generation = GenerationConfig.from_model_config(HoVLEConfig.from_pretrained(folder)).to_diff_dict()
    stops = generation.get("eos_token_id")
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    generation["eos_token_id"] = [*stops, *({end_of_turn_id} - set(stops))]
    (folder / GENERATION_CONFIG).write_bytes(dump_json(generation))


def _other_tiles(released: dict) -> list[str]:
    """Remarks on settings under which the released code would cut pictures unlike ours."""
    published = {"dynamic_image_size": True, "use_thumbnail": True, "pad2square": False}
    return [
        f"{name} is {not usual} in the source, but hovle cuts pictures the published way ({name}: {usual})."
        for name, usual in published.items()
        if read_field(released, name, bool) is not usual
    ]


def _image_processor(released: dict, config: HoVLEConfig) -> HoVLEImageProcessor:
    """The image processor with a released checkpoint's tile settings; ValueError for an unknown shuffle order."""
    if read_field(released, "ps_version", str) != "v2":
        raise ValueError(f"ps_version in {CONFIG} is {released['ps_version']!r}; only the order of 'v2' is known.")
    size = tile_size(released)
    config.tokens_per_tile(size)
    most = read_number(released, "max_dynamic_patch", 1, MOST_TILES)
    return HoVLEImageProcessor(
        tile_size=size, min_tiles=read_number(released, "min_dynamic_patch", 1, most), max_tiles=most
    )


def _save_processor(folder: Path, image_processor: HoVLEImageProcessor) -> str | None:
    """Write the image processor, or the whole processor if there is a tokenizer that knows the picture tokens."""
    config = HoVLEConfig.from_pretrained(folder)
    image_processor.save_pretrained(folder)
    if not (folder / "tokenizer.json").exists():
        return None
    try:
        with _whole_or_not(folder), foreign_errors("No processor was written: the tokenizer cannot be loaded"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            missing = [token for token in IMAGE_TOKENS.values() if token not in tokenizer.get_vocab()]
            if missing:
                return f"No processor was written: the tokenizer lacks {', '.join(missing)}."
            processor = HoVLEProcessor(
                image_processor, tokenizer, config.patch_size * config.shuffle_factor, text_after_image="\n"
            )
            if processor.image_token_id == config.image_token_id:
                processor.save_pretrained(folder)
                return None
    except ValueError as error:
        return str(error)
    raise ValueError(
        f"The tokenizer gives {processor.image_token} the id {processor.image_token_id}, {CONFIG} says "
        f"{config.image_token_id}."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hovle convert`."""
    parser.add_argument("src", metavar="SRC", help="folder of the checkpoint, or a Hub id such as OpenGVLab/HoVLE")
    parser.add_argument("dst", metavar="DST", help="folder to create")
    parser.add_argument("--to", choices=list(PLANS), default="hovle", help="layout of the result (default: hovle)")


def run(args: argparse.Namespace) -> int:
    """Convert and tell what the user should know; exit code 0."""
    remarks = convert(args.src, args.dst, to=args.to)
    for line in [*remarks, f"Wrote {args.dst} in the {args.to} layout."]:
        print(printable(line))  # noqa: T201 - this is the command's output
    return 0
