"""Turn the SentencePiece tokenizer of the released checkpoints (InternLM2) into a fast tokenizer.

The library parts (vocabulary, merges, byte fallback) are transformers' and tokenizers'; here are the rules of the
model file, the tokens a tokenizer_config.json adds or renames, and a check against sentencepiece on odd strings.
"""

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from .chat_rendering import unused_characters

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
    names = _special_names(proto, settings)
    unknown = sorted(set(names.values()) - vocabulary.keys())
    if unknown:
        raise ValueError(f"{folder}: tokenizer_config.json names {', '.join(unknown)}, which the model does not know.")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names.values()])
    tokenizer.add_tokens(list(added.values()))
    # sentencepiece takes user-defined pieces whole, the longest first, from the text in which `▁` stands for a space.
    whole = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=True, special=False) for piece in whole])
    if settings.get("add_bos_token", True) and "bos_token" in names:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
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
    file = folder / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _added_tokens(folder: Path, settings: dict) -> dict[int, AddedToken]:
    """Tokens added to the model's pieces or put in their place, by id."""
    added: dict[int, AddedToken] = {}
    file = folder / "added_tokens.json"
    if file.exists():
        for content, number in json.loads(file.read_text(encoding="utf-8")).items():
            added[number] = AddedToken(content, normalized=False, special=True)
    for number, token in settings.get("added_tokens_decoder", {}).items():
        added[int(number)] = AddedToken(token["content"], normalized=False, special=bool(token.get("special", True)))
    return added


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


def _special_names(proto, settings: dict) -> dict[str, str]:
    """`bos_token` and the like: as the settings say, or as the model was trained."""
    trained = {
        "unk_token": proto.trainer_spec.unk_piece,
        "bos_token": proto.trainer_spec.bos_piece,
        "eos_token": proto.trainer_spec.eos_piece,
    }
    known = {piece.piece for piece in proto.pieces}
    names = {key: name for key, name in trained.items() if name in known}
    for key in ("unk_token", "bos_token", "eos_token", "pad_token"):
        value = settings.get(key)
        content = value.get("content") if isinstance(value, dict) else value
        if content:
            names[key] = content
    return names


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
