"""Samples: random text, replies, questions that share a picture, conversations cut between turns."""

import dataclasses
import itertools

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hovle import HoVLEProcessor
from hovle.train.config import ChatData, PictureData
from hovle.train.data.readers import load_records
from hovle.train.data.records import Record, conversation
from hovle.train.data.samples import RandomTextSamples, ReplySamples, Sample, share_beginning, special_ids, was_split
from hovle.train.data.skips import NO_FAULTS, SkipSampleError
from hovle.train.data.tiles import PixelNormalization


@pytest.fixture(scope="module")
def processor(checkpoints) -> HoVLEProcessor:
    return HoVLEProcessor.from_pretrained(checkpoints["tied"])


@pytest.fixture(scope="module")
def picture_records(data) -> list[Record]:
    return load_records(PictureData(path=str(data / "pictures")))


@pytest.fixture(scope="module")
def chat_records(data) -> list[Record]:
    return load_records(ChatData(path=str(data / "chat.jsonl")))


def ids_between(sample: Sample, start: list[int], end: list[int]) -> list[int]:
    ids = sample.input_ids.tolist()
    first = next(place for place in range(len(ids)) if ids[place : place + len(start)] == start) + len(start)
    last = next(place for place in range(first, len(ids)) if ids[place : place + len(end)] == end)
    return ids[first:last]


# --- random text -----------------------------------------------------------------------------------------------------


def test_random_text_stands_after_the_picture_and_in_the_reply(processor, picture_records):
    sample = RandomTextSamples(processor, 50, seed=0).make(picture_records[1], 0)
    encode = processor.tokenizer.encode
    end_of_turn = encode("<|im_end|>")
    after_picture = ids_between(sample, encode("</img>"), end_of_turn)
    reply = ids_between(sample, encode("<|im_start|>assistant\n"), end_of_turn)
    assert (len(after_picture), len(reply)) == (50, 50)
    assert after_picture != reply
    ids = sample.input_ids.tolist()
    assert ids[: len(encode("<|im_start|>user\n<img>"))] == encode("<|im_start|>user\n<img>")
    assert sample.num_tiles == [1]
    assert ids.count(processor.image_token_id) == processor.image_seq_length
    assert (sample.labels == -100).all()


def test_random_text_is_drawn_from_all_ordinary_tokens_and_no_others(processor, picture_records):
    sampler = RandomTextSamples(processor, 200, seed=0)
    ordinary = set(range(len(processor.tokenizer))) - special_ids(processor.tokenizer)
    encode = processor.tokenizer.encode
    drawn: set[int] = set()
    for index in range(40):
        drawn |= set(ids_between(sampler.make(picture_records[1], index), encode("</img>"), encode("<|im_end|>")))
    assert drawn == ordinary
    for token in ("<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert processor.tokenizer.convert_tokens_to_ids(token) not in ordinary


def test_random_text_depends_on_seed_and_index_alone(processor, picture_records):
    first = RandomTextSamples(processor, 20, seed=0)
    expected = first.make(picture_records[1], 7).input_ids
    torch.manual_seed(123)
    first.make(picture_records[0], 3)
    assert torch.equal(RandomTextSamples(processor, 20, seed=0).make(picture_records[1], 7).input_ids, expected)
    assert not torch.equal(first.make(picture_records[1], 8).input_ids, expected)
    assert not torch.equal(RandomTextSamples(processor, 20, seed=1).make(picture_records[1], 7).input_ids, expected)


def test_random_text_finds_its_place_with_a_tokenizer_that_marks_the_start_of_a_string(picture_records):
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "▁", "▁a", "a", "s", "t"]
    tokenizer = Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    template = (
        "{% for message in messages %}{{ '<s>' + message['role'] + ':' + message['content'] + '</s>' }}{% endfor %}"
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )
    processor = HoVLEProcessor.from_language_model(fast, image_size=56, max_tiles=1)
    sample = RandomTextSamples(processor, 5, seed=0).make(picture_records[1], 0)
    assert len(ids_between(sample, [processor.end_image_token_id], [fast.eos_token_id])) == 5


def test_a_conversation_without_a_picture_cannot_be_distilled(processor):
    record = Record("notes.jsonl:3", [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}])
    with pytest.raises(ValueError, match=r"notes\.jsonl:3: no picture"):
        RandomTextSamples(processor, 5, seed=0).make(record, 0)


# --- replies ---------------------------------------------------------------------------------------------------------


def supervised_spans(sample: Sample, tokenizer) -> list[str]:
    spans = []
    for is_supervised, places in itertools.groupby(
        range(len(sample.labels)), key=lambda place: int(sample.labels[place]) != -100
    ):
        if is_supervised:
            spans.append(tokenizer.decode(sample.labels[list(places)]))
    return spans


def test_exactly_the_replies_and_their_ends_are_supervised(processor, chat_records):
    sampler = ReplySamples(processor)
    for index, record in enumerate(chat_records):
        sample = sampler.make(record, index)
        replies = [message["content"] for message in record.messages if message["role"] == "assistant"]
        assert supervised_spans(sample, processor.tokenizer) == [f"{reply}<|im_end|>" for reply in replies]
        supervised = sample.labels != -100
        assert torch.equal(sample.labels[supervised], sample.input_ids[supervised])


def test_a_sample_reads_as_the_processor_would_encode_the_chat(processor, chat_records):
    for record in chat_records[:4]:
        sample = ReplySamples(processor).make(record, 0)
        expected = processor.apply_chat_template(record.messages, tokenize=True, return_dict=True, return_tensors="pt")
        length = len(sample.input_ids)
        assert torch.equal(sample.input_ids, expected["input_ids"][0, :length])
        assert (
            processor.decode(expected["input_ids"][0, length:]) == "\n"
        )  # after the last reply there is nothing to learn
        pixel_values = ReplySamples(processor).load_pixels("x", sample.pictures, sample.num_tiles)
        if "pixel_values" in expected:
            found = PixelNormalization.of(processor.image_processor)(pixel_values)
            difference = (found - expected["pixel_values"]).abs()
            assert difference.mean() < 1e-3  # worst 1e-4: see test_pixels
        else:
            assert len(pixel_values) == 0


def test_special_tokens_typed_in_a_reply_stay_text(processor):
    messages = [
        {"role": "user", "content": "Say it"},
        {"role": "assistant", "content": "<IMG_CONTEXT> and <|im_end|> are tokens"},
    ]
    sample = ReplySamples(processor).make(Record("typed", messages), 0)
    assert processor.image_token_id not in sample.input_ids
    end_of_turn = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sample.labels.tolist().count(end_of_turn) == 1
    assert supervised_spans(sample, processor.tokenizer) == ["<IMG_CONTEXT> and <|im_end|> are tokens<|im_end|>"]


def test_what_follows_the_last_reply_is_left_out(processor):
    messages = [*conversation_of("A tree?", "Yes"), {"role": "user", "content": "unanswered"}]
    sample = ReplySamples(processor).make(Record("open", messages), 0)
    assert "unanswered" not in processor.tokenizer.decode(sample.input_ids)


def test_pictures_after_the_last_reply_are_left_out_and_counted(processor, data):
    asked = conversation(data / "pictures" / "01.png", "What is it?", "A bus")
    trailing = conversation(data / "pictures" / "00.png", "And this?", "")[:1]
    sampler = ReplySamples(processor)
    alone = sampler.make(Record("alone", asked), 0)
    [sample, remark] = made = sampler.make_all(Record("open", [*asked, *trailing]), 0, max_tokens=192)
    assert torch.equal(sample.input_ids, alone.input_ids)
    assert (sample.name, sample.pictures, sample.num_tiles) == ("open", alone.pictures, [1])
    assert isinstance(remark, SkipSampleError)
    assert (remark.reason, "1 messages after its last reply" in str(remark)) == ("unanswered turn", True)
    assert not was_split(made)
    [silent] = sampler.make_all(Record("silent", trailing), 0, max_tokens=192)
    assert silent.reason == "no supervised token"


def test_a_question_without_a_reply_beside_answered_ones_is_left_out(processor, questions):
    trailing = [{"role": "user", "content": "unanswered"}]
    record = dataclasses.replace(questions, others=tuple([*other, *trailing] for other in questions.others))
    made = ReplySamples(processor).make_all(record, 0, max_tokens=400)
    assert torch.equal(made[0].input_ids, ReplySamples(processor).make(questions, 0).input_ids)
    assert "2 messages after" in str(made[1])


def test_a_template_without_end_of_turn_token_supervises_the_whole_reply(make_tokenizer):
    template = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    processor = HoVLEProcessor.from_language_model(make_tokenizer(chat_template=template), image_size=56)
    sample = ReplySamples(processor).make(Record("plain", conversation_of("A tree?", "Yes")), 0)
    assert supervised_spans(sample, processor.tokenizer) == [" Yes\n"]


def test_a_conversation_without_a_reply_is_refused(processor):
    with pytest.raises(ValueError, match="half: no reply to learn from"):
        ReplySamples(processor).make(Record("half", [{"role": "user", "content": "Hello"}]), 0)


def test_a_template_that_rewrites_earlier_turns_is_refused(make_tokenizer):
    template = "{{ messages | length }}{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
    processor = HoVLEProcessor.from_language_model(make_tokenizer(chat_template=template), image_size=56)
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        ReplySamples(processor).make(Record("x", conversation_of("A tree?", "Yes")), 0)


def conversation_of(*turns: str) -> list[dict]:
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]


# --- several questions about one picture -----------------------------------------------------------------------------


@pytest.fixture
def questions(data) -> Record:
    """Three questions about one wide picture; two of them start alike, two answers too."""
    first, *others = [
        conversation(data / "pictures" / "00.png", question, answer)
        for question, answer in (("What is in the picture?", "A bus"), ("What is it?", "A bus"), ("Why?", "0 1 2 3"))
    ]
    return Record("questions", first, tuple(others))


def test_conversations_about_one_picture_share_its_tokens(processor, questions):
    sampler = ReplySamples(processor)
    sample = sampler.make(questions, 0)
    assert sample.subsegment_ids is not None
    beginning = sample.subsegment_ids == 0
    assert processor.tokenizer.decode(sample.input_ids[beginning]).endswith("</img>")
    assert sample.input_ids.tolist().count(processor.image_token_id) == 4 * sum(sample.num_tiles) == 12
    for branch, messages in enumerate([questions.messages, *questions.others], 1):
        alone = sampler.make(Record("alone", messages), 0)
        chosen = beginning | (sample.subsegment_ids == branch)
        assert torch.equal(sample.input_ids[chosen], alone.input_ids)
        assert torch.equal(sample.labels[chosen], alone.labels)
        assert sample.position_ids[chosen].tolist() == list(range(len(alone.input_ids)))


def test_a_last_token_that_is_only_predicted_takes_no_place(processor, questions):
    sampler = ReplySamples(processor)
    end_of_turn = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    alone = sampler.make(Record("alone", questions.messages), 0)
    assert alone.is_input.tolist() == [True] * (len(alone.input_ids) - 1) + [False]
    assert alone.targets[:-1].tolist() == alone.labels[1:].tolist()
    shared = sampler.make(questions, 0)
    assert shared.input_ids[~shared.is_input].tolist() == [end_of_turn] * (1 + len(questions.others))
    # What is predicted is what each conversation predicts alone.
    conversations = [Record("alone", messages) for messages in (questions.messages, *questions.others)]
    expected = [target for record in conversations for target in sampler.make(record, 0).targets.tolist()]
    found = shared.targets[shared.is_input].tolist()
    assert [target for target in found if target != -100] == [target for target in expected if target != -100]


def test_an_unsupervised_last_token_keeps_its_place():
    ids = torch.arange(4)
    sample = Sample("distilled", 0, ids, torch.full_like(ids, -100))
    assert sample.is_input.all()
    assert (sample.targets == -100).all()


def test_no_branch_predicts_the_first_token_of_the_next():
    # Two conversations that differ in a reply only: they part one token before it.
    ids, labels, branches = share_beginning([([1, 2, 3, 9], [-100, -100, 3, 9]), ([1, 2, 4, 9], [-100, -100, 4, 9])])
    assert ids == [1, 2, 3, 9, 2, 4, 9]
    assert labels == [-100, -100, 3, 9, -100, 4, 9]
    assert branches == [0, 1, 1, 1, 2, 2, 2]


def test_a_conversation_that_is_the_start_of_another_shares_all_before_its_reply():
    ids, labels, branches = share_beginning(
        [([1, 2, 3], [-100, -100, 3]), ([1, 2, 3, 4, 5], [-100, -100, 3, -100, 5])]
    )
    assert ids == [1, 2, 3, 2, 3, 4, 5]
    assert labels == [-100, -100, 3, -100, 3, -100, 5]
    assert branches == [0, 1, 1, 2, 2, 2, 2]


# --- what cannot be used, and what is too long -----------------------------------------------------------------------


@pytest.mark.parametrize("maker", [ReplySamples, lambda processor: RandomTextSamples(processor, 5, 0)])
def test_missing_and_unreadable_pictures_are_told_apart(processor, tmp_path, maker):
    (tmp_path / "text.png").write_text("not a picture")
    for name, reason in (("gone.png", "missing file"), ("text.png", "unreadable picture")):
        record = Record("a record", conversation(tmp_path / name, "What is it?", "A bus"))
        with pytest.raises(SkipSampleError, match=f"a record: .*{name}") as caught:
            maker(processor).make(record, 0)
        assert caught.value.reason == reason


def test_a_picture_damaged_behind_its_header_is_found_when_its_pixels_are_read(processor, data, tmp_path):
    whole = (data / "pictures" / "00.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    sampler = ReplySamples(processor)
    sample = sampler.make(Record("half", conversation(tmp_path / "half.png", "What is it?", "A bus")), 0)
    with pytest.raises(SkipSampleError, match=r"half: .*half\.png") as caught:
        sampler.load_pixels(sample.name, sample.pictures, sample.num_tiles)
    assert caught.value.reason == "unreadable picture"
    with pytest.raises(SkipSampleError, match=r"promise \[1\] tiles, their pixels make \[3\]"):
        sampler.load_pixels("changed", [str(data / "pictures" / "00.png")], [1])


def test_pictures_may_be_bytes(processor, data):
    path = data / "pictures" / "00.png"
    sampler = ReplySamples(processor)
    from_path, from_bytes = (
        sampler.make(Record("x", conversation(picture, "What is it?", "A bus")), 0)
        for picture in (path, path.read_bytes())
    )
    assert torch.equal(from_bytes.input_ids, from_path.input_ids)
    pixels = [sampler.load_pixels("x", sample.pictures, sample.num_tiles) for sample in (from_path, from_bytes)]
    assert torch.equal(*pixels)


def test_empty_replies_teach_nothing(processor):
    with pytest.raises(SkipSampleError, match="no reply to learn from") as caught:
        ReplySamples(processor).make(Record("mute", conversation_of("A tree?", "")), 0)
    assert caught.value.reason == "no supervised token"


def test_a_conversation_the_template_refuses_is_skipped(make_tokenizer):
    template = "{% if messages | length > 2 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    template += "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
    processor = HoVLEProcessor.from_language_model(make_tokenizer(chat_template=template), image_size=56)
    with pytest.raises(SkipSampleError, match="x: roles must alternate") as caught:
        ReplySamples(processor).make(Record("x", conversation_of("A tree?", "Yes", "And?", "No")), 0)
    assert caught.value.reason == "refused by the chat template"


def test_a_long_conversation_is_cut_between_turns_and_every_part_sees_the_pictures(processor, data):
    turns = [f"{word}?" if place % 2 == 0 else word for place, word in enumerate("0123456789")]
    messages = [{"role": "system", "content": "Describe"}, *conversation_of(*turns)]
    picture = {"type": "image", "path": str(data / "pictures" / "00.png")}
    messages[1] = {"role": "user", "content": [picture, {"type": "text", "text": turns[0]}]}
    sampler = ReplySamples(processor)
    whole = sampler.make(Record("long", messages), 7)
    parts = sampler.make_all(Record("long", messages), 7, max_tokens=whole.num_inputs - 1)
    assert [part.name for part in parts] == ["long (1 of 2)", "long (2 of 2)"]
    assert [(part.index, part.part) for part in parts] == [(7, 0), (7, 1)]
    text = [processor.tokenizer.decode(part.input_ids) for part in parts]
    assert torch.equal(parts[0].input_ids, whole.input_ids[: len(parts[0].input_ids)])  # all turns but the last
    replies = [supervised_spans(part, processor.tokenizer) for part in parts]
    assert replies == [[f"{reply}<|im_end|>" for reply in "1357"], ["9<|im_end|>"]]
    assert text[1].startswith("<|im_start|>system\nDescribe<|im_end|>\n<|im_start|>user\n<img>")
    assert all(part.num_tiles == [3] for part in parts)
    assert all((part.input_ids == processor.image_token_id).sum() == 12 for part in parts)
    shortest = sampler.make_all(Record("long", messages), 7, max_tokens=parts[1].num_inputs)
    assert [supervised_spans(part, processor.tokenizer) for part in shortest] == [
        [f"{reply}<|im_end|>"] for reply in "13579"
    ]


def test_only_the_turn_that_fits_no_row_is_left_out(processor):
    messages = conversation_of("A?", "1", "B?", "the quick brown fox jumps over the lazy dog " * 3, "C?", "2")
    made = ReplySamples(processor).make_all(Record("uneven", messages), 0, max_tokens=30)
    assert [item.reason if isinstance(item, SkipSampleError) else "sample" for item in made] == [
        "sample",
        "over-long",
        "sample",
    ]
    assert "more than row_length (30)" in str(made[1])


def test_no_sample_takes_more_positions_than_the_language_model_has(processor, questions):
    messages = conversation_of("A?", "1", "B?", "the quick brown fox jumps over the lazy dog " * 3, "C?", "2")
    sampler = ReplySamples(processor)
    sampler.max_positions = 30
    made = sampler.make_all(Record("uneven", messages), 0, max_tokens=1000)
    reasons = [item.reason if isinstance(item, SkipSampleError) else "sample" for item in made]
    assert reasons == ["sample", "over-long", "sample"]
    assert "more than the language model has (30)" in str(made[1])
    whole = sampler.make(questions, 0)  # of which each sees the pictures and itself only
    sampler.max_positions = int(whole.position_ids[whole.is_input].max()) + 1
    assert sampler.max_positions < whole.num_inputs
    assert len(sampler.make_all(questions, 0, max_tokens=1000)) == 1
    sampler.max_positions -= 1
    assert len(sampler.make_all(questions, 0, max_tokens=1000)) == 2


def test_no_questions_share_a_picture_beyond_the_positions_at_which_the_rope_turns(processor, questions):
    sampler = ReplySamples(processor)
    whole = sampler.make(questions, 0)
    num_positions = int(whole.position_ids[whole.is_input].max()) + 1
    sampler.max_shared_positions = num_positions
    assert len(sampler.make_all(questions, 0, max_tokens=1000)) == 1
    sampler.max_shared_positions = 1
    alone = sampler.make_all(questions, 0, max_tokens=1000)
    assert len(alone) == questions.num_conversations
    assert all(sample.subsegment_ids is None for sample in alone)


def test_questions_about_one_picture_are_shared_out_between_samples_when_they_are_too_many(processor, questions):
    sampler = ReplySamples(processor)
    whole = sampler.make(questions, 0)
    parts = sampler.make_all(questions, 0, max_tokens=whole.num_inputs - 1)
    assert [int(part.subsegment_ids.max()) if part.subsegment_ids is not None else 0 for part in parts] == [2, 0]
    spans = [span for part in parts for span in supervised_spans(part, processor.tokenizer)]
    assert spans == supervised_spans(whole, processor.tokenizer)


def test_random_text_that_is_too_long_is_left_out(processor, picture_records):
    [made] = RandomTextSamples(processor, 50, 0).make_all(picture_records[0], 0, max_tokens=60)
    assert isinstance(made, SkipSampleError)
    assert made.reason == "over-long"


def test_keys_nobody_reads_are_counted_once_and_are_no_fault(processor):
    record = Record("row", conversation_of("A tree?", "Yes"), unread=("rating", "style", "rating"))
    for maker in (ReplySamples(processor), RandomTextSamples(processor, 5, seed=0)):
        *made, remark = maker.make_all(record, 0, max_tokens=400)
        assert (remark.reason, remark.detail) == ("unread key", "its 'rating', 'style' is not read.")
        assert remark.reason in NO_FAULTS
        assert len(made) == 1


# --- odd rows --------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1].lstrip() }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A template that drops earlier thinking, as Qwen3's does."""


@pytest.fixture(scope="module")
def line_breaks() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for two line breaks, as byte-level ones have."""
    vocab = {"<pad>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "\n": 3, "\n\n": 4}
    words = "user assistant system a tree ? yes no and of course because <think> </think>"
    vocab |= {word: 5 + place for place, word in enumerate([*words.split(), " ", "[unk]"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pre_tokenizers_pattern(), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML.replace(".split('</think>')[-1].lstrip()", "")
    return fast


def pre_tokenizers_pattern():
    from tokenizers import Regex

    return Regex(r"\n\n|\n| |[^\s]+")


@pytest.mark.parametrize("reply", ["\nyes", "\n\nyes", "\n\n\nyes\n\n"])
def test_a_reply_that_begins_with_line_breaks_is_learnt_as_it_would_be_said(line_breaks, reply):
    processor = HoVLEProcessor.from_language_model(line_breaks, image_size=56)
    messages = [{"role": "user", "content": "a tree?"}, {"role": "assistant", "content": reply}]
    following = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "\nno"}]
    sample = ReplySamples(processor).make(Record("x", [*messages, *following]), 0)
    [prompt] = processor.encode_chats([messages[:1]], [], add_generation_prompt=True)
    assert sample.input_ids[: len(prompt)].tolist() == prompt  # the very ids the model is asked with
    said = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] + [2] for text in (reply, "\nno")]
    assert sample.labels[sample.labels != -100].tolist() == [*said[0], *said[1]]
    supervised = sample.labels != -100
    assert torch.equal(sample.labels[supervised], sample.input_ids[supervised])
    text = [
        processor.tokenizer.decode(ids)
        for ids in (sample.input_ids, processor.encode_chats([[*messages, *following]], [])[0])
    ]
    assert text[0].replace(" ", "") == text[1].replace(" ", "").removesuffix(
        "\n"
    )  # this one puts spaces between tokens


def test_a_conversation_whose_earlier_thinking_is_dropped_becomes_a_sample_for_each_reply(make_tokenizer):
    processor = HoVLEProcessor.from_language_model(make_tokenizer(chat_template=CHATML), image_size=56)
    thoughts = [f"<think>because {number}</think>Yes {number}" for number in range(3)]
    turns = [turn for number, thought in enumerate(thoughts) for turn in (f"{number}?", thought)]
    sampler = ReplySamples(processor)
    made = sampler.make_all(Record("x", conversation_of(*turns)), 7, max_tokens=400)
    assert [(item.name, item.part, item.num_parts) for item in made] == [
        (f"x ({part} of 3)", part - 1, 3) for part in (1, 2, 3)
    ]
    assert [supervised_spans(item, processor.tokenizer) for item in made] == [
        [f"{thought}<|im_end|>"] for thought in thoughts
    ]
    last = processor.tokenizer.decode(made[2].input_ids)
    assert last.count("<think>") == 1  # earlier thinking is not seen, as when the model answers
    assert "Yes 0" in last
    [whole] = sampler.make_all(Record("y", conversation_of("0?", "Yes 0", "1?", "Yes 1")), 8, max_tokens=400)
    assert len(supervised_spans(whole, processor.tokenizer)) == 2  # nothing is dropped of this one


def test_a_thinking_conversation_takes_no_other_one_with_it(make_tokenizer, data):
    processor = HoVLEProcessor.from_language_model(make_tokenizer(chat_template=CHATML), image_size=56)
    picture = data / "pictures" / "00.png"
    plain = conversation(picture, "What?", "A bus")
    plain = [{**plain[0], "content": [plain[0]["content"][0]]}, {"role": "assistant", "content": "A bus"}]
    thinking = [*plain[:1], *conversation_of("", "<think>so</think>A bus", "Sure?", "<think>hm</think>Yes")[1:]]
    made = ReplySamples(processor).make_all(Record("x", plain, (thinking,)), 0, max_tokens=400)
    assert all(isinstance(item, Sample) for item in made)
    said = [span for item in made for span in supervised_spans(item, processor.tokenizer)]
    assert said == ["A bus<|im_end|>", "<think>so</think>A bus<|im_end|>", "<think>hm</think>Yes<|im_end|>"]


def test_a_conversation_that_the_model_begins_is_skipped_and_its_later_replies_are_learnt(make_tokenizer):
    template = "{% if messages %}{{ '<|im_start|>' }}{% endif %}" + CHATML
    processor = HoVLEProcessor.from_language_model(make_tokenizer(chat_template=template), image_size=56)
    first, *others = ReplySamples(processor).make_all(
        Record("x", [{"role": "assistant", "content": "Hello"}, *conversation_of("A tree?", "Yes")]), 0, max_tokens=400
    )
    assert (first.reason, "x: the model speaks first" in str(first)) == ("no question", True)
    assert [supervised_spans(item, processor.tokenizer) for item in others] == [["Yes<|im_end|>"]]


@pytest.mark.parametrize("picture", ["a long text in place of a name " * 300, "..folder", "null\0character"])
@pytest.mark.parametrize("maker", ["replies", "random text"])
def test_what_is_no_name_of_a_picture_is_a_skip_by_name(processor, tmp_path, picture, maker):
    (tmp_path / "..folder").mkdir()
    sampler = ReplySamples(processor) if maker == "replies" else RandomTextSamples(processor, 5, seed=0)
    record = Record("row 5", conversation(str(tmp_path / picture), "What?", "A bus"))
    [skip] = sampler.make_all(record, 0, max_tokens=400)
    assert isinstance(skip, SkipSampleError)
    assert skip.name == "row 5"
    assert len(str(skip)) < 700


def test_whatever_goes_wrong_with_one_record_is_a_skip_by_its_name_but_a_fault_of_the_run_is_none(
    processor, monkeypatch
):
    record = Record("row 5", conversation_of("A tree?", "Yes"))
    for error, is_skip in (
        (KeyError("x"), True),
        (OSError("gone"), True),
        (MemoryError(), False),
        (AssertionError(), False),
    ):
        monkeypatch.setattr(
            processor, "encode_chats", lambda *args, error=error, **kwargs: (_ for _ in ()).throw(error)
        )
        if not is_skip:
            with pytest.raises(type(error)):
                ReplySamples(processor).make_all(record, 0, max_tokens=400)
            continue
        [skip] = ReplySamples(processor).make_all(record, 0, max_tokens=400)
        assert (skip.name, skip.reason) == ("row 5", "unexpected")
        assert type(error).__name__ in str(skip)
