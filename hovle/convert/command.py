"""Turn a released HoVLE checkpoint into a hovle model, and back; every tensor and the config come back bit for bit.

  hovle convert OpenGVLab/HoVLE models/hovle             released layout (internvl_chat) -> hovle
  hovle convert models/hovle released --to released      hovle -> released layout

Only safetensors and JSON are read: no code of the checkpoint runs and nothing is unpickled. DST appears when it is
complete. What the flat decoder has no place for (the language model's own text table, the class slot of the position
embedding) lies beside the model in released_extra.safetensors, the original config.json in released_config.json; no
inference loads them, `--to released` needs them. The other way, hovle_config.json keeps the hovle config.
"""

import argparse
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from ..files.checkpoint_files import (
    CONFIG,
    LICENCE,
    Checkpoint,
    Output,
    appear_when_complete,
    copy_json,
    dump_json,
    inside,
    local_folder,
    read_json,
    write_tensors,
    write_weights,
)
from ..model.configuration_hovle import HoVLEConfig
from ..model.image_processing_hovle import HoVLEImageProcessor
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
    load_config,
    read_field,
    released_config,
    tensor_rows,
    tile_size,
)
from .sentencepiece_tokenizer import CHAT_TEMPLATES, END_OF_TURN, fast_tokenizer

RELEASED_CONFIG, RELEASED_EXTRA = "released_config.json", "released_extra.safetensors"
HOVLE_CONFIG, GENERATION_CONFIG = "hovle_config.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
)

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
    content = config.to_json_string(use_diff=False).encode()
    if (src / HOVLE_CONFIG).exists():
        check_same_model(HOVLE_CONFIG, config, load_config(read_json(src, HOVLE_CONFIG)))
        kept = read_json(src, HOVLE_CONFIG)
        if kept.get("auto_map") == AUTO_MAP:
            content = inside(src, HOVLE_CONFIG).read_bytes()
        else:  # pointers to foreign code stay behind
            content = dump_json(kept | {"auto_map": AUTO_MAP})
    plan = Plan(
        outputs=[output for output in outputs if not is_extra(output.name)],
        documents={CONFIG: content, RELEASED_CONFIG: inside(src, CONFIG).read_bytes()},
        extra=[output for output in outputs if is_extra(output.name)],
        extra_metadata={TIED_HEAD: "stored"} if HEAD in copies else {},
        image_processor=_image_processor(released, config),
        remarks=_other_tiles(released),
    )
    if tile_size(released) != config.image_size:
        plan.remarks.append(
            f"force_image_size asks for tiles of {tile_size(released)} pixels while the position table is for "
            f"{config.image_size}: image_size stays {config.image_size}, and the model interpolates the table."
        )
    return plan


def _plan_released(src: Path) -> Plan:
    """Prepare the way to the released layout; checks everything but the values."""
    content = read_json(src, CONFIG)
    if content.get("model_type") != HoVLEConfig.model_type:
        raise ValueError(f"{src} is no hovle model: model_type is {content.get('model_type')!r}.")
    config = load_config(content)
    source = Checkpoint(src, RELEASED_EXTRA)
    has_config = (src / RELEASED_CONFIG).exists()
    if has_config != source.has_extra:
        found, lost = sorted((RELEASED_CONFIG, RELEASED_EXTRA), reverse=not has_config)
        raise ValueError(f"{src} has {found} but lacks {lost}: keep both for the way back, or remove both.")
    released = read_json(src, RELEASED_CONFIG) if has_config else released_config(config)
    ties = read_field(released, "llm_config.tie_word_embeddings", bool)
    described = hovle_config(released, tie_word_embeddings=ties and config.tie_word_embeddings)
    check_same_model(RELEASED_CONFIG if has_config else "The released layout", described, config)
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
        for name in present:
            if name.endswith(".json"):
                copy_json(src, dst, name)
            else:
                shutil.copyfile(inside(src, name), dst / name)
    except ValueError as error:
        for name in present:
            (dst / name).unlink(missing_ok=True)
        return f"No tokenizer was copied: {error} Weights and config are complete."
    if "tokenizer.json" in present:
        return None
    if "tokenizer.model" in present:
        return None if to == "released" else _save_fast_tokenizer(src, dst)
    return "No tokenizer was converted: the source holds none. Weights and config are complete."


def _save_fast_tokenizer(src: Path, dst: Path) -> str | None:
    """Write the fast form of a SentencePiece tokenizer, its chat template and where a turn ends."""
    try:
        tokenizer = fast_tokenizer(src)
    except ImportError:
        return "The tokenizer was not converted, only copied: pip install 'hovle[convert]', then convert again."
    except Exception as error:  # whatever its files hold (tokenizers raises bare ones), weights are kept
        return f"The tokenizer was not converted, only copied: {error}"
    template = read_json(src, CONFIG).get("template")
    known = tokenizer.get_vocab()
    remark = None
    if template in CHAT_TEMPLATES and END_OF_TURN in known:
        tokenizer.chat_template = CHAT_TEMPLATES[template]
        _end_turns(dst, known[END_OF_TURN])
    elif template is not None and tokenizer.chat_template is None:
        remark = f"No chat template was written: the conversation format {template!r} is unknown here."
    tokenizer.save_pretrained(dst)
    return remark


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
    return HoVLEImageProcessor(
        tile_size=size,
        min_tiles=read_field(released, "min_dynamic_patch", int),
        max_tiles=read_field(released, "max_dynamic_patch", int),
    )


def _save_processor(folder: Path, image_processor: HoVLEImageProcessor) -> str | None:
    """Write the image processor, or the whole processor if there is a tokenizer that knows the picture tokens."""
    config = HoVLEConfig.from_pretrained(folder)
    image_processor.save_pretrained(folder)
    if not (folder / "tokenizer.json").exists():
        return None
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare ones for a damaged file
        return f"No processor was written: the tokenizer cannot be loaded ({error})."
    missing = [token for token in IMAGE_TOKENS.values() if token not in tokenizer.get_vocab()]
    if missing:
        return f"No processor was written: the tokenizer lacks {', '.join(missing)}."
    processor = HoVLEProcessor(
        image_processor, tokenizer, config.patch_size * config.shuffle_factor, text_after_image="\n"
    )
    if processor.image_token_id != config.image_token_id:
        raise ValueError(
            f"The tokenizer gives {processor.image_token} the id {processor.image_token_id}, {CONFIG} says "
            f"{config.image_token_id}."
        )
    processor.save_pretrained(folder)
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hovle convert`."""
    parser.add_argument("src", metavar="SRC", help="folder of the checkpoint, or a Hub id such as OpenGVLab/HoVLE")
    parser.add_argument("dst", metavar="DST", help="folder to create")
    parser.add_argument("--to", choices=list(PLANS), default="hovle", help="layout of the result (default: hovle)")


def run(args: argparse.Namespace) -> int:
    """Convert and tell what the user should know; exit code 0."""
    remarks = convert(args.src, args.dst, to=args.to)
    for line in [*remarks, f"Wrote {args.dst} in the {args.to} layout."]:
        print(line)  # noqa: T201 - this is the command's output
    return 0
