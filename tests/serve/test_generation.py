"""Text that grows token by token is the text of the whole, whatever the tokens."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hovle.serve.generation import GrowingText


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece makes them: words that begin with a mark for the space, and a token for each byte."""
    words = ["<unk>", "<s>", "</s>", "\u2581hello", "\u2581", "llo", "\u2581world", "!", "\u4f60", "\ufffd"]
    pieces = [*words, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["byte fallback", "byte level"])
def any_tokenizer(request, tokenizer):
    return byte_fallback_tokenizer() if request.param == "byte fallback" else tokenizer


def grown(tokenizer, ids: list[int]) -> list[str]:
    text = GrowingText(tokenizer)
    return [*map(text.feed, ids), text.rest()]


@pytest.mark.parametrize("seed", range(40))
def test_pieces_of_any_tokens_make_up_the_whole_text(any_tokenizer, seed):
    draw = random.Random(seed)
    ids = [draw.randrange(len(any_tokenizer)) for _ in range(draw.choice([1, 7, 100, 400]))]
    assert "".join(grown(any_tokenizer, ids)) == any_tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", ["\U0001f600 hello", "\u4f60\u597d!", "caf\u00e9", "a\u0301"])
def test_a_character_of_several_tokens_comes_whole(any_tokenizer, text):
    if any_tokenizer.convert_tokens_to_ids("<0xF0>") is None:
        ids = any_tokenizer(text)["input_ids"]
    else:
        ids = [any_tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
    pieces = grown(any_tokenizer, ids)
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == any_tokenizer.decode(ids)


def test_text_is_told_as_it_grows(tokenizer):
    ids = tokenizer("The quick brown fox jumps over the lazy dog. " * 20)["input_ids"]
    assert all(grown(tokenizer, ids)[:-1])


def test_the_last_unfinished_character_is_shown_as_in_the_whole(tokenizer):
    ids = tokenizer("hello \U0001f600")["input_ids"][:-1]
    assert grown(tokenizer, ids)[-1] == "\ufffd"
    assert "".join(grown(tokenizer, ids)) == tokenizer.decode(ids)
