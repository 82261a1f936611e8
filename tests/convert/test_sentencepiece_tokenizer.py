"""The fast form of a SentencePiece tokenizer gives sentencepiece's own ids."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import SentencePieceExtractor

from hovle.convert.sentencepiece_tokenizer import CHAT_TEMPLATES, SYSTEM_MESSAGE, fast_tokenizer

WORDS = [
    *[
        "the",
        "a",
        "cat",
        "dog",
        "house",
        "street",
        "picture",
        "shows",
        "two",
        "people",
        "walking",
        "along",
        "river",
        "under",
        "bridge",
        "while",
        "it's",
        "don't",
    ],
    *[
        "number",
        "12",
        "345",
        "3.14",
        "2024",
        "def",
        "return",
        "self",
        "import",
        "x",
        "=",
        "y",
        "+",
        "z",
        "(",
        ")",
        "{",
        "}",
        "[",
        "]",
        ";",
        ":",
        ",",
        ".",
        "!",
        "?",
        "-",
        "_",
        "/",
        "|",
        "@",
        "#",
        "$",
        "%",
        "^",
        "&",
        "*",
        "~",
    ],
    *[
        "人",
        "工",
        "智能",
        "实验室",
        "猫",
        "坐",
        "在",
        "垫子",
        "上",
        "。",
        "、",
        "привет",
        "мир",
        "как",
        "дела",
        "こんにちは",
        "世界",
        "안녕",
        "naïve",
        "café",
        "ß",
        "é",
        "ü",
    ],
]


def corpus(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(count)]


def hostile(seed: int, count: int) -> list[str]:
    """Strings of random characters of all planes, odd spaces and pieces of special tokens."""
    rng = random.Random(seed)
    spaces = [" ", "  ", "\t", "\n", "\u3000", "\xa0", "\u200b", "▁"]
    special = ["<s>", "</s>", "<unk>", "<0x41>", "<|im_end|>", "<img>", "[UNUSED_TOKEN_1]"]

    def part() -> str:
        kind = rng.random()
        if kind < 0.4:
            return rng.choice(WORDS)
        if kind < 0.6:
            return rng.choice(spaces)
        if kind < 0.7:
            return rng.choice(special)
        return chr(rng.choice([rng.randint(1, 0x7F), rng.randint(0x80, 0xD7FF), rng.randint(0x10000, 0x1FFFF)]))

    return ["".join(part() for _ in range(rng.randint(1, 20))) for _ in range(count)]


def train(folder: Path, **options) -> Path:
    """A byte-pair model like InternLM2's: byte fallback, split digits, spaces kept; some unused pieces at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(0, 3000)),
        model_prefix=str(folder / "tokenizer"),
        **{
            "vocab_size": 640,
            "model_type": "bpe",
            "byte_fallback": True,
            "character_coverage": 0.999,
            "split_digits": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": True,
            "allow_whitespace_only_pieces": True,
            "control_symbols": ["[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_1]"],
            "minloglevel": 2,
            **options,
        },
    )
    settings = {
        "add_bos_token": True,
        "added_tokens_decoder": {
            "3": {"content": "<|im_end|>", "special": True},
            "4": {"content": "<|im_start|>", "special": True},
            "640": {"content": "<img>", "special": True},
            "641": {"content": "</img>", "special": True},
            "642": {"content": "<IMG_CONTEXT>", "special": True},
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def edit_model(folder: Path, change) -> Path:
    """Rewrite each piece of a model: `change(piece, number)`."""
    file = folder / "tokenizer.model"
    proto = SentencePieceExtractor(str(file)).proto
    for number, piece in enumerate(proto.pieces):
        change(piece, number)
    file.write_bytes(proto.SerializeToString())
    return folder


def assert_same_ids(fast, strings: list[str], expected: list[list[int]]) -> None:
    found = fast(strings, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    wrong = [triple for triple in zip(strings, found, expected, strict=True) if triple[1] != triple[2]]
    assert not wrong, f"{len(wrong)} differ, for instance {wrong[:3]}"


@pytest.mark.parametrize(
    "options", [{}, {"add_dummy_prefix": False}, {"remove_extra_whitespaces": True}], ids=lambda item: str(item)
)
def test_ten_thousand_strings_get_the_same_ids(tmp_path, options):
    folder = train(tmp_path / "model", **options)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    strings = corpus(1, 5000) + hostile(2, 5000)
    if options.get("remove_extra_whitespaces"):
        strings = [text for text in strings if set(text) - set(" \u3000\xa0▁")]  # nothing but space is its own case
    assert_same_ids(fast_tokenizer(folder), strings, reference.encode(strings))


def test_a_nul_piece_is_read_though_sentencepiece_refuses_it(tmp_path):
    """InternLM2's model has one; its twin here has another character in that place."""
    twin = train(tmp_path / "twin", user_defined_symbols=["☃", "☃☃"], add_dummy_prefix=False)

    def spell(piece, number: int) -> None:
        piece.piece = piece.piece.replace("☃", "\0")

    def merge(piece, number: int) -> None:
        piece.type = 1 if number in (5, 6) else piece.type

    edit_model(twin, merge)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(twin / "tokenizer.model"))
    fast = fast_tokenizer(edit_model(twin, spell))
    assert fast.convert_tokens_to_ids(["\0", "\0\0"]) == [5, 6]
    strings = [text.replace("a", "☃") for text in corpus(1, 5000)] + [f"☃{text}☃☃" for text in hostile(2, 5000)]
    assert_same_ids(fast, [text.replace("☃", "\0") for text in strings], reference.encode(strings))
    fast.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").decode(fast.encode("a\0cat")[1:]) == "a\0cat"


def test_scores_rank_merges_not_ids(tmp_path):
    folder = train(tmp_path / "model")
    normal = [
        (piece.piece, piece.score)
        for piece in SentencePieceExtractor(str(folder / "tokenizer.model")).proto.pieces
        if piece.type == 1
    ]
    random.Random(5).shuffle(normal)

    def deal(piece, number: int) -> None:
        if piece.type == 1:
            piece.piece, piece.score = normal.pop()

    fast = fast_tokenizer(edit_model(folder, deal))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    strings = corpus(1, 1000) + hostile(2, 1000)
    assert_same_ids(fast, strings, reference.encode(strings))


WHOLE = ["[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_2]", "[UNUSED_TOKEN_12]", "——", "……", "，", "Ａ", "Ａ，"]  # noqa: RUF001
WHOLE += ["cat", "catalog", "alogue", "og", "▁▁", "dog▁", "i", "を", "<|", "bridge-"]


@pytest.mark.parametrize("whitespace", [False, True], ids=["spaces kept", "spaces removed"])
def test_user_defined_pieces_are_taken_whole(tmp_path, whitespace):
    """InternLM2's model has such pieces: unused tokens (the first two here get names), dashes, full-width letters."""
    whole = [piece for piece in WHOLE if "▁" not in piece or not whitespace]
    folder = train(
        tmp_path / "model",
        control_symbols=[],
        user_defined_symbols=["[UNUSED_TOKEN_8]", "[UNUSED_TOKEN_9]", *whole],
        add_dummy_prefix=False,
        remove_extra_whitespaces=whitespace,
    )
    fast = fast_tokenizer(folder)
    fast.save_pretrained(tmp_path / "saved")
    rng = random.Random(3)
    parts = [*whole, *whole, "catalogue", "concat", "doggy", " ", "   ", "x", "[UNUSED_TOKEN_", "2]", "—", "人", "<s>"]
    strings = corpus(1, 3000) + hostile(2, 3000)
    strings += ["".join(rng.choices(parts, k=rng.randint(1, 9))) for _ in range(4000)]
    strings = [text for text in strings if set(text) - set(" \u3000\xa0▁")]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for tokenizer in (fast, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert_same_ids(tokenizer, strings, reference.encode(strings))
        assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "[UNUSED_TOKEN_1]"]) == [3, 5]
        assert set(tokenizer.all_special_ids).isdisjoint(reference.piece_to_id(whole))
        assert 3 not in tokenizer.encode("[UNUSED_TOKEN_8]")  # its name is another now
        assert tokenizer.decode(tokenizer.encode("a catalog——")[1:]) == "a catalog——"


def test_user_defined_pieces_behind_a_dummy_prefix_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the fast tokenizer gives '——' the ids"):
        fast_tokenizer(train(tmp_path / "model", user_defined_symbols=["——"]))


def test_the_tokenizer_survives_saving_and_decodes(tmp_path):
    fast = fast_tokenizer(train(tmp_path / "model"))
    fast.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in corpus(3, 50):
        assert loaded(text)["input_ids"] == fast(text)["input_ids"]
        assert loaded.decode(loaded(text, add_special_tokens=False)["input_ids"]) == text


def test_named_tokens_have_their_ids_and_bos_starts_a_text(tmp_path):
    fast = fast_tokenizer(train(tmp_path / "model"))
    names = ["<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    assert fast.convert_tokens_to_ids(names) == [3, 4, 640, 641, 642]
    assert fast("a<|im_end|>")["input_ids"][0] == fast.bos_token_id == 1
    assert fast("a<|im_end|>")["input_ids"][-1] == 3
    assert (fast.eos_token, fast.unk_token) == ("</s>", "<unk>")


def test_the_released_chat_format(tmp_path):
    fast = fast_tokenizer(train(tmp_path / "model"))
    fast.chat_template = CHAT_TEMPLATES["internlm2-chat"]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    start = f"<s><|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"
    assert fast.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == start
    assert fast.apply_chat_template(messages, tokenize=False) == f"{start}Yes?<|im_end|>"
    own = [{"role": "system", "content": "Be brief."}, *messages]
    assert fast.apply_chat_template(own, tokenize=False).startswith("<s><|im_start|>system\nBe brief.<|im_end|>")


def test_models_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="only byte-pair"):
        fast_tokenizer(train(tmp_path / "unigram", model_type="unigram", vocab_size=400))
    with pytest.raises(ValueError, match="changes characters"):
        fast_tokenizer(train(tmp_path / "nfkc", normalization_rule_name="nfkc"))


def test_added_tokens_that_leave_a_gap_are_refused(tmp_path):
    folder = train(tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["added_tokens_decoder"]["641"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="'<IMG_CONTEXT>' has the id 642, but the one before is missing"):
        fast_tokenizer(folder)


def change_settings(folder: Path, **fields) -> Path:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def test_added_tokens_keep_what_their_settings_say(tmp_path):
    added = json.loads((train(tmp_path / "model") / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    added["3"] |= {"lstrip": True, "rstrip": True}
    added["4"] |= {"single_word": True}
    added["2"] = {"content": "</s>", "rstrip": True, "special": True}
    folder = change_settings(
        tmp_path / "model", added_tokens_decoder=added, bos_token={"content": "<s>", "lstrip": True}
    )
    fast_tokenizer(folder).save_pretrained(tmp_path / "saved")
    for fast in (fast_tokenizer(folder), AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert fast.encode("a  <|im_end|>  ")[-2:] == [fast.encode("a")[-1], 3]
        assert 4 not in fast.encode("x<|im_start|>x")
        assert fast.encode("x <|im_start|> x").count(4) == 1
        tokens = fast.added_tokens_decoder
        assert (tokens[2].rstrip, tokens[1].lstrip, tokens[1].rstrip) == (True, True, False)
        assert all(tokens[number].special for number in (0, 1, 2, 3, 4))


def test_an_end_is_written_where_the_settings_ask_for_it(tmp_path):
    folder = change_settings(train(tmp_path / "model"), add_eos_token=True)
    fast_tokenizer(folder).save_pretrained(tmp_path / "saved")
    plain = fast_tokenizer(change_settings(folder, add_bos_token=False, add_eos_token=False))
    [a, b] = plain.encode("a"), plain.encode("b")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode("a", "b") == [1, *a, 2, 1, *b, 2]
    assert fast_tokenizer(change_settings(folder, add_eos_token=True)).encode("a") == [*a, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", [], "must hold a JSON object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3": "<|im_end|>"}}, "token 3 .* must be an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3": {"content": 3}}}, "token 3 .* must be an object"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"3": {"content": "x", "lstrip": "no"}}},
            "lstrip of token 3",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<|im_end|>"]}, "must give tokens by id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"three": {"content": "x"}}}, "must give tokens by id"),
        ("tokenizer_config.json", {"bos_token": 1}, "bos_token .* must be an object"),
        ("added_tokens.json", {"<img>": "640"}, "gives '<img>' the id '640'"),
        ("added_tokens.json", ["<img>"], "must hold a JSON object"),
    ],
    ids=str,
)
def test_settings_of_another_form_are_refused(tmp_path, name, content, message):
    folder = train(tmp_path / "model")
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        fast_tokenizer(folder)
