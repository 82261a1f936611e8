"""Samples, packing and streams."""

import dataclasses
import itertools
import json
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hovle import HoVLEProcessor
from hovle.train.config import DataConfig
from hovle.train.data import (
    PackedBatches,
    RandomTextSamples,
    Record,
    ReplySamples,
    Sample,
    StreamPosition,
    branch_mask,
    conversation,
    load_records,
    pack_rows,
    share_beginning,
    special_ids,
)


@pytest.fixture(scope="module")
def processor(checkpoints) -> HoVLEProcessor:
    return HoVLEProcessor.from_pretrained(checkpoints["tied"])


@pytest.fixture(scope="module")
def picture_records(data) -> list[Record]:
    return load_records(DataConfig(source="pictures", path=str(data / "pictures")))


@pytest.fixture(scope="module")
def chat_records(data) -> list[Record]:
    return load_records(DataConfig(source="chat", path=str(data / "chat.jsonl")))


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
    assert ids.count(processor.image_token_id) == processor.image_seq_length * len(sample.pixel_values)
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
        if "pixel_values" in expected:
            assert torch.equal(sample.pixel_values, expected["pixel_values"])
        else:
            assert len(sample.pixel_values) == 0


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


# --- sources ---------------------------------------------------------------------------------------------------------


def test_pictures_of_a_chat_are_found_beside_the_file(chat_records, data):
    paths = [item["path"] for item in chat_records[1].messages[0]["content"] if item["type"] == "image"]
    assert paths == [str((data / "pictures" / "01.png").resolve())]
    assert chat_records[1].name == "chat.jsonl:2"


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '{"message": []}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}',
        '{"messages": [{"role": "user", "content": ["text"]}]}',
    ],
)
def test_a_malformed_line_is_named(tmp_path, line):
    good = json.dumps({"messages": conversation_of("A tree?", "Yes")})
    (tmp_path / "chat.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=r"chat\.jsonl:2: expected"):
        load_records(DataConfig(source="chat", path=str(tmp_path / "chat.jsonl")))


def test_pictures_outside_the_data_folder_are_refused(tmp_path):
    messages = [{"role": "user", "content": [{"type": "image", "path": "../secret.png"}]}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(ValueError, match="lies outside"):
        load_records(DataConfig(source="chat", path=str(tmp_path / "chat.jsonl")))


@pytest.mark.parametrize(
    ("source", "message"), [("chat", "no conversations"), ("pictures", "no pictures"), ("x", "known: easy_vqa, chat")]
)
def test_empty_and_unknown_sources_are_refused(tmp_path, source, message):
    path = tmp_path / "empty"
    path.mkdir() if source == "pictures" else path.touch()
    with pytest.raises(ValueError, match=message):
        load_records(DataConfig(source=source, path=str(path)))
    if source != "x":
        with pytest.raises(ValueError, match=r"data\.path is missing"):
            load_records(DataConfig(source=source))


def test_easy_vqa_questions_about_one_picture_share_a_record(tmp_path):
    (tmp_path / "train").mkdir()
    rows = [["What color?", "red", 5], ["A circle?", "no", 5], ["What shape?", "cube", 5], ["Is it blue?", "yes", 6]]
    (tmp_path / "train" / "questions.json").write_text(json.dumps(rows))
    records = load_records(DataConfig(source="easy_vqa", path=str(tmp_path), questions_per_sample=2))
    assert [record.name for record in records] == ["5.png[0]", "5.png[2]", "6.png[0]"]
    picture = tmp_path / "train" / "images" / "5.png"
    assert records[0].messages == conversation(picture, "What color?", "red")
    assert records[0].others == (conversation(picture, "A circle?", "no"),)
    assert records[1].others == ()


def test_balanced_questions_are_drawn_anew_and_seldom_where_the_wording_tells_the_answer(tmp_path):
    """Of two pictures each is asked one question that always has the same answer and one that has two."""
    rows = [["Is it?", "yes", 0], ["Is it?", "yes", 1], *([f"What {n}?", "ab"[n % 2], n // 4] for n in range(8))]
    rows += [[f"What {n}?", "ba"[n % 2], 1 - n // 4] for n in range(8)]
    (tmp_path / "train" / "images").mkdir(parents=True)
    (tmp_path / "train" / "questions.json").write_text(json.dumps(rows))
    config = DataConfig(source="easy_vqa", path=str(tmp_path), questions_per_sample=3, balance_answers=True)
    records = load_records(config)
    assert [record.name for record in records] == ["0.png", "1.png"]
    asked: Counter[str] = Counter()
    for seed in range(400):
        drawn = records[0].draw(seed)
        assert drawn == records[0].draw(seed)
        conversations = [drawn.messages, *drawn.others]
        texts = [messages[0]["content"][1]["text"] for messages in conversations]
        assert len(set(texts)) == 3
        asked.update(texts)
    assert set(asked) == {"Is it?", *(f"What {n}?" for n in range(8))}
    others = [count for text, count in asked.items() if text != "Is it?"]
    assert asked["Is it?"] < 0.75 * min(others)  # half the weight
    one = dataclasses.replace(records[0], num_drawn=1)
    assert records[0].has_branches
    assert not one.has_branches  # although it knows more conversations
    with pytest.raises(ValueError, match="balances the questions of easy_vqa"):
        DataConfig(source="chat", path="x", balance_answers=True)


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
    assert sample.branch_ids is not None
    beginning = sample.branch_ids == 0
    assert processor.tokenizer.decode(sample.input_ids[beginning]).endswith("</img>")
    assert sample.input_ids.tolist().count(processor.image_token_id) == 4 * len(sample.pixel_values) == 12
    for branch, messages in enumerate([questions.messages, *questions.others], 1):
        alone = sampler.make(Record("alone", messages), 0)
        chosen = beginning | (sample.branch_ids == branch)
        assert torch.equal(sample.input_ids[chosen], alone.input_ids)
        assert torch.equal(sample.labels[chosen], alone.labels)
        assert sample.position_ids[chosen].tolist() == list(range(len(alone.input_ids)))


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


def test_a_token_looks_back_at_its_own_beginning_and_branch_only():
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, -1]])
    branches = torch.tensor([[0, 1, 1, 2, 0, 1, 0]])
    seen = [row.nonzero().flatten().tolist() for row in branch_mask(documents, branches)[0, 0]]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 3], [4], [4, 5], [6]]


# --- packing ---------------------------------------------------------------------------------------------------------


def sample_of(length: int, index: int) -> Sample:
    ids = torch.arange(1, length + 1) + 100 * index
    return Sample(f"sample {index}", index, ids, ids.clone(), torch.full((1, 3, 2, 2), float(index)))


class FixedLengths:
    """Makes samples whose length depends on their stream index alone."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    def make(self, record: Record, index: int) -> Sample:
        return sample_of(self.lengths[index % len(self.lengths)], index)


@pytest.fixture
def stream(next_token_config):
    """`stream(lengths, position, rank, world_size, **fields)`: packed batches of samples of these lengths."""

    def build(lengths, position=None, rank=0, world_size=1, num_records=10, **fields) -> PackedBatches:
        fields = {"rows_per_batch": 2, "row_length": 20, "packing_window": 4, **fields}
        return PackedBatches(
            [Record(f"record {number}", []) for number in range(num_records)],
            FixedLengths(lengths),
            dataclasses.replace(next_token_config(), **fields),
            position or StreamPosition(),
            rank,
            world_size,
            pad_token_id=0,
        )

    return build


def test_samples_are_packed_whole_with_positions_of_their_own(stream):
    batch = next(iter(stream([9, 7, 5, 3])))
    for row in range(2):
        starts = [*(batch["position_ids"][row] == 0).nonzero().flatten().tolist(), 20]
        for start, end in itertools.pairwise(starts):
            assert batch["position_ids"][row, start:end].tolist() == list(range(end - start))
            if not batch["is_sample"][row, start]:
                assert end == 20  # padding, at the end only
                assert (batch["labels"][row, start:] == -100).all()
                continue
            index = int(batch["input_ids"][row, start]) // 100
            expected = sample_of(end - start, index)
            assert torch.equal(batch["input_ids"][row, start:end], expected.input_ids)
            assert batch["labels"][row, start] == -100  # the sample before must not predict this one
            assert torch.equal(batch["labels"][row, start + 1 : end], expected.labels[1:])


def test_pictures_follow_the_rows_in_order(stream):
    for batch in itertools.islice(stream([9, 7, 5, 3, 8]), 5):
        is_start = (batch["position_ids"] == 0) & batch["is_sample"]
        in_rows = (batch["input_ids"][is_start] // 100).tolist()
        assert batch["pixel_values"][:, 0, 0, 0].tolist() == in_rows
        assert batch["names"] == [f"sample {index}" for index in in_rows]


def test_no_sample_is_lost_repeated_or_kept_waiting(stream):
    taken: list[int] = []
    for batch in itertools.islice(stream([18, 3, 11, 6, 20, 2, 9]), 60):
        taken += [int(name.split()[1]) for name in batch["names"]]
    assert len(taken) == len(set(taken))
    until = 100
    assert set(range(until)) <= set(taken)
    assert max(abs(index - place) for place, index in enumerate(taken)) <= 8  # twice the window


def test_the_window_grows_until_it_can_fill_the_batch(stream):
    batch = next(iter(stream([2], packing_window=1)))
    assert batch["is_sample"].all()


def test_a_larger_window_wastes_less(stream):
    def filled(window: int) -> float:
        batches = itertools.islice(stream([13, 11, 12, 14, 13, 6, 7, 9], packing_window=window), 20)
        return float(torch.stack([batch["is_sample"].float().mean() for batch in batches]).mean())

    assert filled(12) > filled(1) + 0.02


def test_best_fit_leaves_the_shortest():
    rows, left = pack_rows([sample_of(length, index) for index, length in enumerate([4, 3, 9, 6, 2])], 2, 10)
    assert [[sample.index for sample in row] for row in rows] == [[0, 3], [2]]
    assert [sample.index for sample in left] == [1, 4]


def test_an_overlong_sample_is_refused_not_cut(stream):
    with pytest.raises(ValueError, match=r"sample 2 has 21 tokens, more than row_length \(20\)"):
        next(iter(stream([5, 20, 21])))


def test_every_epoch_visits_each_record_once_in_an_order_of_its_own(stream):
    batches = stream([5], num_records=7)
    epochs = [[batches.record_at(epoch * 7 + place).name for place in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == [f"record {number}" for number in range(7)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batches.record_at(3).name == epochs[0][3]  # going back is possible


def test_ranks_share_the_stream_without_overlap(stream):
    taken = []
    for rank in range(3):
        indices: list[int] = []
        for batch in itertools.islice(stream([9, 4, 7], rank=rank, world_size=3), 12):
            indices += [int(name.split()[1]) for name in batch["names"]]
        assert all(index % 3 == rank for index in indices)
        taken.append(indices)
    assert not set(taken[0]) & set(taken[1])


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_stream_continues_from_its_position(stream, world_size):
    lengths = [18, 3, 11, 6, 20, 2, 9]
    rank = world_size - 1
    straight = list(itertools.islice(stream(lengths, None, rank, world_size), 8))
    resumed = itertools.islice(stream(lengths, straight[3]["position"], rank, world_size), 4)
    for expected, found in zip(straight[4:], resumed, strict=True):
        assert found["names"] == expected["names"]
        assert torch.equal(found["input_ids"], expected["input_ids"])
        assert found["position"] == expected["position"]


def test_a_batch_of_text_alone_has_no_tiles(processor, next_token_config):
    records = [Record("text", conversation_of("A tree?", "Yes"))]
    batch = next(iter(PackedBatches(records, ReplySamples(processor), next_token_config(), StreamPosition(), 0, 1, 0)))
    assert batch["pixel_values"].shape == (0, 3, 56, 56)
