"""Turn the SentencePiece tokenizer of the released checkpoints (InternLM2) into a fast tokenizer.

The library parts (vocabulary, merges, byte fallback) are transformers' and tokenizers'; here are the rules of the
model file, the tokens a tokenizer_config.json adds or renames, and a check against sentencepiece on odd strings.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from ..files.checkpoint_files import read_json
from ..model.chat_rendering import unused_characters

SETTINGS, ADDED_TOKENS = "tokenizer_config.json", "added_tokens.json"

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of pieces: text becomes normal ones by merges, user-defined ones as it stands; unknown is 2, byte 6."""

BPE_MODEL = 2
"""`model_type` of a byte-pair model."""

SYSTEM_MESSAGE = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
)
"""What InternVL's `internlm2-chat` conversation says where no system message is given."""

CHAT_TEMPLATES = {
    "internlm2-chat": (
        "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
        + SYSTEM_MESSAGE
        + "<|im_end|>' }}"
        "{% endif %}{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
}
"""Conversation formats by the name `template` in a released config.json."""

END_OF_TURN = "<|im_end|>"
"""Ends a message in these formats."""

PROBES = (
    "Hello world",
    "  two  spaces and a tab\tand\n\nlines ",
    "It's 3.14159, isn't it? (yes/no) [a] {b} <c> @d #e $5 50% ^ & * _ ~ `",
    "def f(x):\n    return x ** 2  # squared\n",
    "上海人工智能实验室，书生。一只猫坐在垫子上？",  # noqa: RUF001
    "Ünïcödé déjà vu naïve façade Straße",
    "Привет мир, שלום עולם, مرحبا بالعالم, こんにちは世界, 안녕하세요",
    "🙂🚀 👩‍👩‍👧 \u200b zero width \ufeff mark \x00 null \x7f",
    "<s> </s> <unk> <0x41> ▁ [UNUSED_TOKEN_1]",
)
"""Strings whose ids must agree before a tokenizer is handed out."""


def fast_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Build the fast tokenizer of a folder with `tokenizer.model` and, if there is one, `tokenizer_config.json`.

    Raises:
        ValueError: When the file is no byte-pair SentencePiece model, when added tokens contradict it, or when the
            result encodes a probe unlike sentencepiece.
        ModuleNotFoundError: Without the packages sentencepiece and protobuf.
    """
    file = folder / "tokenizer.model"
    proto = _read_model(file)
    settings = _read_settings(folder)
    added = _added_tokens(folder, settings)
    _name_pieces(proto, added)
    vocabulary = _vocabulary(proto, added, folder)
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=generate_merges({piece.piece: -piece.score for piece in proto.pieces if piece.type == NORMAL}),
            unk_token=proto.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    tokenizer.normalizer, tokenizer.decoder = _white_space_rules(proto.normalizer_spec)
    special = _special_tokens(proto, settings)
    names = {key: token.content for key, token in special.items()}
    unknown = sorted(set(names.values()) - vocabulary.keys())
    if unknown:
        raise ValueError(f"{folder}: tokenizer_config.json names {', '.join(unknown)}, which the model does not know.")
    described = {token.content for token in added.values()}
    tokenizer.add_tokens([token for token in special.values() if token.content not in described])
    tokenizer.add_tokens(list(added.values()))
    # sentencepiece takes user-defined pieces whole, the longest first, from the text in which `▁` stands for a space.
    whole = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=True, special=False) for piece in whole])
    tokenizer.post_processor = _text_borders(settings, names, vocabulary)
    kept = {key: settings[key] for key in ("model_max_length", "padding_side", "chat_template") if settings.get(key)}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names, **kept)
    _check_probes(fast, proto, file, [text for piece in whole for text in (piece, f"a{piece}b", piece + piece[:-1])])
    return fast


def _read_model(file: Path):
    """Parse the model file's protocol buffer."""
    from google.protobuf.message import DecodeError  # an extra: only this conversion needs it
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    try:
        proto = SentencePieceExtractor(str(file)).proto
    except DecodeError as error:
        raise ValueError(f"{file} is no SentencePiece model ({error}).") from error
    if proto.trainer_spec.model_type != BPE_MODEL or not proto.pieces:
        raise ValueError(f"{file}: only byte-pair SentencePiece models are converted, as InternLM2's.")
    if proto.normalizer_spec.precompiled_charsmap:
        raise ValueError(f"{file}: its normalizer {proto.normalizer_spec.name!r} changes characters; not supported.")
    return proto


def _read_settings(folder: Path) -> dict:
    return read_json(folder, SETTINGS) if (folder / SETTINGS).exists() else {}


def _added_tokens(folder: Path, settings: dict) -> dict[int, AddedToken]:
    """Tokens added to the model's pieces or put in their place, by id."""
    added: dict[int, AddedToken] = {}
    if (folder / ADDED_TOKENS).exists():
        for content, number in read_json(folder, ADDED_TOKENS).items():
            if type(number) is not int or number < 0:
                raise ValueError(f"{folder}: {ADDED_TOKENS} gives {content!r} the id {number!r}; ids are 0, 1, 2, ...")
            added[number] = AddedToken(content, normalized=False, special=True)
    entries = settings.get("added_tokens_decoder", {})
    if not isinstance(entries, dict) or not all(number.isdecimal() for number in entries):
        raise ValueError(f"{folder}: added_tokens_decoder in {SETTINGS} must give tokens by id, got {entries!r}.")
    return added | {int(number): _token(entry, f"token {number}") for number, entry in entries.items()}


def _token(entry: Any, name: str) -> AddedToken:
    """The token an object of tokenizer_config.json describes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise ValueError(f'{name} in {SETTINGS} must be an object with "content", a string; got {entry!r}.')
    flags = {flag: entry.get(flag, False) for flag in ("lstrip", "rstrip", "single_word", "normalized")}
    flags["special"] = entry.get("special", True)
    if wrong := [flag for flag, value in flags.items() if not isinstance(value, bool)]:
        raise ValueError(f"{wrong[0]} of {name} in {SETTINGS} must be true or false, got {flags[wrong[0]]!r}.")
    return AddedToken(entry["content"], **flags)


def _name_pieces(proto, added: dict[int, AddedToken]) -> None:
    """Put the names of added tokens into the model, as InternLM2 names unused pieces; text no longer becomes them."""
    for number, token in added.items():
        if number >= len(proto.pieces):
            continue
        piece = proto.pieces[number]
        if piece.type in (NORMAL, USER_DEFINED, UNUSED) and (token.special or piece.piece != token.content):
            piece.type = CONTROL
        piece.piece = token.content


def _vocabulary(proto, added: dict[int, AddedToken], folder: Path) -> dict[str, int]:
    """Ids of the pieces and of the tokens added behind them."""
    pieces = [piece.piece for piece in proto.pieces]
    for number, token in sorted(added.items()):
        if number > len(pieces):
            raise ValueError(f"{folder}: token {token.content!r} has the id {number}, but the one before is missing.")
        if number == len(pieces):
            pieces.append(token.content)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise ValueError(f"{folder}: {len(pieces) - len(vocabulary)} tokens of tokenizer.model occur twice.")
    return vocabulary


def _special_tokens(proto, settings: dict) -> dict[str, AddedToken]:
    """`bos_token` and the like: as the settings say, or as the model was trained."""
    trained = {
        "unk_token": proto.trainer_spec.unk_piece,
        "bos_token": proto.trainer_spec.bos_piece,
        "eos_token": proto.trainer_spec.eos_piece,
    }
    known = {piece.piece for piece in proto.pieces}
    entries: dict[str, Any] = {key: name for key, name in trained.items() if name in known}
    entries |= {key: settings[key] for key in (*trained, "pad_token") if settings.get(key)}
    return {
        key: _token({"content": entry} if isinstance(entry, str) else entry, key) for key, entry in entries.items()
    }


def _text_borders(settings: dict, names: dict[str, str], vocabulary: dict[str, int]):
    """What stands around each text: its start unless the settings say no, its end if they say so."""
    bos = names.get("bos_token") if settings.get("add_bos_token", True) else None
    eos = names.get("eos_token") if settings.get("add_eos_token", False) else None
    first, second = (" ".join(filter(None, (bos, text, eos))) for text in ("$A", "$B"))
    used = [(name, vocabulary[name]) for name in (bos, eos) if name]
    return processors.TemplateProcessing(single=first, pair=f"{first} {second}", special_tokens=used)


def _white_space_rules(spec):
    """Normalizer and decoder: SentencePiece writes a space as `▁`, and may put one before the text."""
    steps: list = []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +|[ ▁]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    back: list = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        back.append(decoders.Strip(content=" ", left=1))
    return normalizers.Sequence(steps), decoders.Sequence(back)


def _check_probes(tokenizer: PreTrainedTokenizerFast, proto, file: Path, more: list[str]) -> None:
    """Compare ids with sentencepiece on `PROBES` and more strings; special tokens stay text on both sides."""
    encode = _reference(proto, file)
    for probe in (*PROBES, *more):
        expected = encode(probe)
        found = tokenizer(probe, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if found != expected:
            raise ValueError(
                f"{file}: the fast tokenizer gives {probe!r} the ids {found}, sentencepiece gives {expected}."
            )


def _reference(proto, file: Path) -> Callable[[str], list[int]]:
    """Give sentencepiece's own encoding; versions that refuse a NUL in a piece see another character in its place."""
    from sentencepiece import SentencePieceProcessor

    pieces = [piece.piece for piece in proto.pieces]
    nul = unused_characters([pieces, PROBES])[0] if any("\0" in piece for piece in pieces) else "\0"
    readable = type(proto)()
    readable.CopyFrom(proto)
    for piece in readable.pieces:
        piece.piece = piece.piece.replace("\0", nul)
    try:
        reference = SentencePieceProcessor(model_proto=readable.SerializeToString())
    except RuntimeError as error:
        raise ValueError(f"{file}: sentencepiece cannot read this model ({error}).") from error
    return lambda text: reference.encode(text.replace("\0", nul))
