"""A byte-level BPE tokenizer as llama.cpp reads it, or the reason why it cannot."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..model.processing_hovle import HoVLEProcessor

if TYPE_CHECKING:
    from gguf import GGUFWriter

DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BYTES_ONLY = {**BYTES, "use_regex": False}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


SPLITTING: dict[str, list[dict]] = {
    "smollm": [DIGITS, BYTES],
    "gpt-2": [BYTES],
    "qwen2": [_split(QWEN2), BYTES_ONLY],
    "llama-bpe": [_split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), BYTES_ONLY],
}
"""What llama.cpp calls a way to split text before pieces are merged -> that way as tokenizer.json has it."""

TRIM = "trim_offsets"
"""A setting of byte-level splitting that changes no token."""


@dataclass
class Vocabulary:
    """Tokens and merges of a byte-level BPE, under llama.cpp's names."""

    splitting: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    special_ids: dict[str, int | None]
    """`bos`, `eos`, `pad` and `unk`; None where there is none."""
    adds_bos: bool
    chat_template: str | None

    @classmethod
    def of(cls, processor: HoVLEProcessor | None, vocab_size: int) -> tuple["Vocabulary | None", list[str]]:
        """The vocabulary of a processor's tokenizer, and what the user should know.

        Args:
            processor: None for a model without a tokenizer.
            vocab_size: Rows of the input embedding matrix; tokens are made up for those without one.
        """
        without = "The GGUF files hold no vocabulary: llama.cpp takes ids only"
        if processor is None:
            return None, [f"{without}."]
        tokenizer = processor.tokenizer
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        splitting, reason = _splitting(content)
        if splitting is None:
            return None, [f"{without}, as `hovle chat --engine llama.cpp` gives them, because {reason}."]
        tokens = [f"[unused {index}]" for index in range(vocab_size)]
        kinds = [_kinds().UNUSED] * vocab_size
        for token, index in content["model"]["vocab"].items():
            tokens[index], kinds[index] = token, _kinds().NORMAL
        for index, token in tokenizer.added_tokens_decoder.items():
            tokens[index], kinds[index] = token.content, _kinds().CONTROL if token.special else _kinds().USER_DEFINED
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
        template = processor.chat_template
        vocabulary = cls(
            splitting=splitting,
            tokens=tokens,
            kinds=kinds,
            merges=merges,
            special_ids={kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad", "unk")},
            adds_bos=tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id,
            chat_template=template["default"] if isinstance(template, dict) else template,
        )
        remarks = []
        if content.get("normalizer") is not None:
            remarks.append(
                "llama.cpp does not bring text into Unicode's NFC form before it tokenizes, as this model's does."
            )
        return vocabulary, remarks

    def add_to(self, writer: "GGUFWriter") -> None:
        """Write it into a file's header."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.splitting)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        for kind, index in self.special_ids.items():
            if index is not None:
                getattr(writer, f"add_{kind}_token_id")(index)
        writer.add_add_bos_token(self.adds_bos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def _splitting(content: dict[str, Any]) -> tuple[str | None, str]:
    """Which of `SPLITTING` a tokenizer.json has; None with the reason where llama.cpp has no such tokenizer."""
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("continuing_subword_prefix"):
        return None, "the tokenizer is no byte-level BPE"
    if (content.get("normalizer") or {"type": "NFC"}) != {"type": "NFC"}:
        return None, f"the tokenizer normalizes text ({content['normalizer']['type']})"
    rule = content["pre_tokenizer"] or {}
    parts = rule.get("pretokenizers", [rule])
    parts = [{key: value for key, value in part.items() if key != TRIM} for part in parts]
    name = next((name for name, known in SPLITTING.items() if known == parts), None)
    if name is None:
        kinds = ", ".join(str(part.get("type")) for part in parts)
        return None, f"llama.cpp is not known to split text as this tokenizer does ({kinds})"
    if bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        return None, f"llama.cpp's {name!r} treats whole words of the vocabulary otherwise (ignore_merges)"
    return name, ""


def _kinds() -> Any:
    from gguf import TokenType

    return TokenType
