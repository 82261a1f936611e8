"""Grouping: conversations about the same pictures share them, whatever source they come from."""

import dataclasses
import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.train.config import ChatData, HuggingFaceData, LlavaData, load_stage
from hovle.train.data.batch import PackedBatch
from hovle.train.data.grouping import GroupedRecords, sharing_key, split_turns
from hovle.train.data.mixture import Mixture, MixtureReader
from hovle.train.data.packing import PackedBatches, StreamPosition, load_batches
from hovle.train.data.readers import fingerprint_records, load_records
from hovle.train.data.records import Record, conversation
from hovle.train.data.samples import ReplySamples, Sample, was_split
from hovle.train.data.skips import SkipSampleError
from hovle.train.run.start import check_hd

PICTURE, OTHER = {"type": "image", "path": "a.png"}, {"type": "image", "path": "b.png"}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*items: dict) -> dict:
    return {"role": "user", "content": list(items)}


REPLY = {"role": "assistant", "content": "Yes"}


def names_of(record: Record) -> list[str]:
    return list(record.names or (record.name,))


# --- which conversations can share -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "right", "is_same"),
    [
        ([user(PICTURE, text("Why?")), REPLY], [user(PICTURE, text("How?")), REPLY, user(text("And?")), REPLY], True),
        ([user(PICTURE, text("Why?")), REPLY], [user(OTHER, text("Why?")), REPLY], False),
        ([user(text("A "), PICTURE, text("B")), REPLY], [user(text("A "), PICTURE, text("C")), REPLY], True),
        ([user(text("A "), PICTURE), REPLY], [user(text("B "), PICTURE), REPLY], False),
        ([user(PICTURE, OTHER), REPLY], [user(PICTURE, OTHER, text("B")), REPLY], True),
        ([user(PICTURE, OTHER), REPLY], [user(OTHER, PICTURE), REPLY], False),
        ([user(PICTURE, OTHER), REPLY], [user(PICTURE), REPLY], False),
        ([user(PICTURE, text("A"), OTHER), REPLY], [user(PICTURE, text("B"), OTHER), REPLY], False),
        ([user(PICTURE), REPLY], [{"role": "system", "content": "Be brief."}, user(PICTURE), REPLY], False),
        ([user(PICTURE), REPLY], [user(PICTURE), REPLY, user(OTHER)], True),  # what is left out does not count
        ([user({"type": "image", "image": b"1"}), REPLY], [user({"type": "image", "image": b"1"}), REPLY], True),
        ([user({"type": "image", "image": b"1"}), REPLY], [user({"type": "image", "image": b"2"}), REPLY], False),
    ],
)
def test_conversations_share_when_they_are_equal_up_to_their_last_picture(left, right, is_same):
    assert None not in (sharing_key(left), sharing_key(right))
    assert (sharing_key(left) == sharing_key(right)) == is_same


@pytest.mark.parametrize(
    "messages",
    [
        [user(text("Hello")), REPLY],
        [user(PICTURE)],
        [user(PICTURE), REPLY, user(OTHER), REPLY],
        [{"role": "user", "content": "Hello"}, REPLY, user(PICTURE), REPLY],
    ],
)
def test_text_alone_and_pictures_behind_a_reply_share_nothing(messages):
    assert sharing_key(messages) is None


# --- independent turns -----------------------------------------------------------------------------------------------


def test_every_question_gets_the_pictures_the_system_message_and_the_line_break():
    system = {"role": "system", "content": "Be brief."}
    later = {"role": "user", "content": "How?"}
    record = Record("x:1", [system, user(PICTURE, OTHER, text("\nWhy?")), REPLY, later, REPLY, later])
    first, second = split_turns(record)
    assert (first.name, second.name) == ("x:1 question 1", "x:1 question 2")
    assert first.messages == record.messages[:3]
    assert second.messages == [system, user(PICTURE, OTHER, text("\nHow?")), REPLY, later]
    assert sharing_key(first.messages) == sharing_key(second.messages)


def test_pictures_behind_the_first_question_go_before_every_one():
    record = Record("x", [user(text("Why?\n"), PICTURE), REPLY, user(text("How?")), REPLY])
    assert [item.messages[0] for item in split_turns(record)] == [
        user(PICTURE, text("\nWhy?")),
        user(PICTURE, text("\nHow?")),
    ]


def test_questions_without_pictures_are_split_as_they_are_and_single_ones_stay():
    turns = [{"role": "user", "content": word} for word in "ab"]
    assert [item.messages for item in split_turns(Record("x", [turns[0], REPLY, turns[1], REPLY]))] == [
        [turns[0], REPLY],
        [turns[1], REPLY],
    ]
    for messages in ([turns[0], REPLY], [turns[0]], [user(text("A"), PICTURE, text("B")), REPLY]):
        assert split_turns(Record("x", messages)) == [Record("x", messages)]


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([user(PICTURE), REPLY, user(OTHER), REPLY], "a later one shows a picture"),
        ([user(PICTURE), user(text("A")), REPLY, REPLY], "do not go from user to assistant"),
        ([user(PICTURE, text("A"), OTHER), REPLY, user(text("B")), REPLY], "text before and between or after"),
        ([user(text("A"), PICTURE, text("B")), REPLY, user(text("B")), REPLY], "text before and between or after"),
    ],
)
def test_turns_that_cannot_be_told_apart_are_skipped_by_name(messages, why):
    with pytest.raises(SkipSampleError, match=f"x:7: independent_turns: .*{why}") as caught:
        split_turns(Record("x:7", messages))
    assert caught.value.reason == "turns not independent"


# --- sources read by number ------------------------------------------------------------------------------------------


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (90, 40) if number % 2 else (50, 60), (number * 10, 80, 120)).save(file, "PNG")
    return file.getvalue()


NUM_PICTURES, NUM_ASKED = 4, 5


@pytest.fixture
def folder(tmp_path) -> Path:
    """`chat.jsonl` and `llava.json`: five questions about each of four pictures, in turns, and a text after each five.

    `pairs.json`: the same five questions as turns of one conversation about each picture.
    """
    for number in range(NUM_PICTURES):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    chats, entries = [], []
    for asked, number in itertools.product(range(NUM_ASKED), range(NUM_PICTURES)):
        chats.append(conversation(f"{number}.png", f"Question {asked}?", "the tree " * (asked + 1)))
        turns = [("human", f"<image>\nQuestion {asked}?"), ("gpt", "the tree " * (asked + 1))]
        entries.append((f"{number}.png", turns))
        if number == NUM_PICTURES - 1:
            chats.append([{"role": "user", "content": "Hello"}, REPLY])
            entries.append((None, [("human", "Hello"), ("gpt", "Yes")]))

    def llava(items) -> str:
        return json.dumps(
            [
                {"image": picture, "conversations": [{"from": speaker, "value": value} for speaker, value in turns]}
                for picture, turns in items
            ]
        )

    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in chats))
    (tmp_path / "llava.json").write_text(llava(entries))
    pairs = []
    for number in range(NUM_PICTURES):
        own = [turns for picture, turns in entries if picture == f"{number}.png"]
        later = [(speaker, value.removeprefix("<image>\n")) for turns in own[1:] for speaker, value in turns]
        pairs.append((f"{number}.png", [*own[0], *later]))
    (tmp_path / "pairs.json").write_text(llava(pairs))
    return tmp_path


def open_source(folder: Path, name: str, **fields):
    kind = ChatData if name == "chat.jsonl" else LlavaData
    return load_records(kind(path=str(folder / name), **fields))


@pytest.mark.parametrize("name", ["chat.jsonl", "llava.json"])
def test_rows_about_one_picture_are_put_together_over_the_whole_source(folder, name):
    plain = open_source(folder, name)
    grouped = open_source(folder, name, questions_per_sample=3)
    assert not isinstance(plain, GroupedRecords)
    assert (grouped.num_conversations, len(grouped), grouped.has_branches) == (len(plain), 4 * 2 + 5, True)
    members = [names_of(grouped[place]) for place in range(len(grouped))]
    assert sorted(itertools.chain(*members)) == sorted(plain[place].name for place in range(len(plain)))
    assert members[0] == [f"{name}:{row}" for row in (1, 6, 11)]  # the rest of the first picture's come later
    assert [f"{name}:{row}" for row in (16, 21)] in members
    assert grouped[0].name == f"{name}:1 and 2 more"
    assert [grouped[0].messages, *grouped[0].others] == [plain[row].messages for row in (0, 5, 10)]
    assert fingerprint_records(grouped) == fingerprint_records(plain)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_independent_turns_are_the_conversations_of_separate_rows(folder, size):
    apart = open_source(folder, "llava.json", questions_per_sample=size)
    split = open_source(folder, "pairs.json", questions_per_sample=size, independent_turns=True)

    def groups(records) -> list:
        found = ([item.messages, *item.others] for item in (records[place] for place in range(len(records))))
        return sorted((group for group in found if "Hello" not in str(group)), key=str)

    assert groups(split) == groups(apart)
    assert split.num_conversations == 20


def test_a_row_that_cannot_be_read_stays_alone_and_says_why(folder):
    entries = json.loads((folder / "llava.json").read_text())
    entries[5]["conversations"][0]["from"] = "robot"
    (folder / "llava.json").write_text(json.dumps(entries))
    records = open_source(folder, "llava.json", questions_per_sample=5)
    faults, read = [], []
    for place in range(len(records)):
        try:
            read += names_of(records[place])
        except SkipSampleError as error:
            faults.append(error.name)
    assert (faults, len(read)) == (["llava.json:6"], 24)


def test_options_belong_to_sources_with_conversations():
    with pytest.raises(ValueError, match=r"questions_per_sample belongs to .*chat.*; pictures does not read it"):
        load_stage("demo/distillation", ["data={source: pictures, path: x, questions_per_sample: 2}"])
    with pytest.raises(ValueError, match=r"independent_turns belongs to .*llava.*; easy_vqa does not read it"):
        load_stage("demo/alignment", ["data.independent_turns=true"])


def test_a_mixture_has_every_conversation_once_an_epoch_and_says_how_many_share(folder):
    mixture = Mixture([open_source(folder, "chat.jsonl", questions_per_sample=3)], seed=1, labels=["chats"])
    assert mixture.describe() == ["chats: 13 records of 25 conversations"]
    epochs = [[names_of(mixture.record_at(13 * epoch + place)) for place in range(13)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == sorted(f"chat.jsonl:{row + 1}" for row in range(25))
    assert epochs[0] != epochs[1]
    again = Mixture([open_source(folder, "chat.jsonl", questions_per_sample=3)], seed=1)
    assert [names_of(again.record_at(index)) for index in (20, 3)] == [epochs[1][7], epochs[0][3]]


def test_a_fingerprint_does_not_depend_on_the_names_of_grouped_conversations():
    record = Record.join([Record("a", []), Record("b", [])])
    assert repr(record) == "Record(name='a and 1 more', messages=[], others=([],), weights=(), num_drawn=0)"


# --- data sets -------------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path, monkeypatch) -> Path:
    """Four files of six rows: three neighbours show one picture; each row has two questions and replies."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List({"user": datasets.Value("string"), "assistant": datasets.Value("string")}),
        }
    )
    (tmp_path / "set").mkdir()
    for file in range(4):
        rows = [
            {
                "images": [{"bytes": png(row // 3), "path": None}],
                "texts": [{"user": f"{row} {turn}?", "assistant": f"answer {row} {turn}"} for turn in "ab"],
            }
            for row in range(file * 6, file * 6 + 6)
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "set" / f"train-{file}.parquet"))
    return tmp_path / "set"


def open_set(parquet: Path, **fields):
    return load_records(HuggingFaceData(path=str(parquet), **fields))


def replies(record: Record) -> list[str]:
    return [
        message["content"]
        for messages in (record.messages, *record.others)
        for message in messages
        if message["role"] == "assistant"
    ]


def test_embedded_pictures_share_by_their_bytes(parquet):
    records = open_set(parquet, questions_per_sample=8)
    assert (len(records), records.num_conversations) == (8, 24)
    assert replies(records[1]) == [f"answer {row} {turn}" for row in (3, 4, 5) for turn in "ab"]
    split = open_set(parquet, questions_per_sample=8, independent_turns=True)
    assert (len(split), split.num_conversations) == (8, 48)
    assert replies(split[1]) == replies(records[1])
    assert len(split[1].others) == 5


GROUPED = [(2, False), (8, False), (1, True), (4, True), (5, True)]


def read(mixture: Mixture, indices, states=None) -> tuple[list[list[str]], MixtureReader]:
    reader = MixtureReader(mixture, 0, 1, states or {})
    return [replies(reader.record_at(index)) for index in indices], reader


@pytest.mark.parametrize(("size", "independent"), GROUPED)
def test_neighbours_of_a_stream_share_within_an_epoch_and_none_is_lost(parquet, size, independent):
    fields = {"questions_per_sample": size, "independent_turns": independent, "streaming": True}
    mixture = Mixture([open_set(parquet, **fields)], seed=0)
    assert mixture.has_branches == (size > 1)
    reader = MixtureReader(mixture, 0, 1, {})
    epochs: dict[int, list[str]] = {0: [], 1: [], 2: []}
    longest = 0
    for index in itertools.count():
        record = reader.record_at(index)
        epoch = reader.streams[0].epoch
        assert reader.epoch_of(index) == epoch
        if epoch == 2:
            break
        longest = max(longest, record.num_conversations)
        epochs[epoch] += replies(record)
        rows = {int(reply.split()[1]) for reply in replies(record)}
        assert len({row // 3 for row in rows}) == 1  # one picture
    assert longest == min(size, 6 if independent else 3)
    for epoch in (0, 1):
        assert sorted(epochs[epoch]) == sorted(f"answer {row} {turn}" for row in range(24) for turn in "ab")


@pytest.mark.parametrize(("size", "independent"), GROUPED)
def test_a_grouped_stream_continues_exactly_wherever_it_stopped(parquet, size, independent):
    fields = {"questions_per_sample": size, "independent_turns": independent, "streaming": True}
    mixture = Mixture([open_set(parquet, **fields)], seed=0)
    straight = read(mixture, range(60))[0]
    reader = MixtureReader(mixture, 0, 1, {})
    for stop in range(57):
        states = json.loads(json.dumps(reader.states(stop)[0]))  # plain values
        found, _ = read(mixture, range(stop, stop + 3), states={0: states})
        assert found == straight[stop : stop + 3]
        reader.record_at(stop)


# --- samples and batches ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(checkpoints) -> HoVLEProcessor:
    return HoVLEProcessor.from_pretrained(checkpoints["tied"])


@pytest.fixture
def grouped_batches(folder, parquet, processor, next_token_config):
    """`grouped_batches(kind, position, rank, world_size, **fields)`: packed batches of a grouped source and a text."""

    def build(kind, position=None, rank=0, world_size=1, once=False, **fields) -> PackedBatches:
        options = {"questions_per_sample": 3, "independent_turns": kind in ("pairs", "stream of pairs")}
        if kind.startswith("stream"):
            source = open_set(parquet, streaming=True, **options)
        else:
            source = open_source(folder, {"rows": "chat.jsonl", "pairs": "pairs.json"}[kind], **options)
        mixture = Mixture([source, open_source(folder, "chat.jsonl")], 0, [3, 1])
        fields = {"packing_window": 6, "row_length": 200, "gradient_accumulation_steps": 4 // world_size, **fields}
        config = dataclasses.replace(next_token_config(), **fields)
        position = position or StreamPosition()
        return PackedBatches(mixture, ReplySamples(processor), config, position, rank, world_size, 0, once)

    return build


KINDS = ["rows", "pairs", "stream", "stream of pairs"]
TENSORS = ("input_ids", "targets", "position_ids", "is_sample", "pixel_values", "attention_mask")


def assert_same(found: PackedBatch, expected: PackedBatch) -> None:
    for name in TENSORS:
        assert torch.equal(getattr(found, name), getattr(expected, name))
    for name in ("names", "skips", "num_drawn", "num_split"):
        assert getattr(found, name) == getattr(expected, name)
    for number, shard in expected.position.shards.items():  # `datasets` writes equal states of streams differently
        assert found.position.shards[number].next_index == shard.next_index
        assert found.position.shards[number].pending == shard.pending


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_a_grouped_source_resume_to_the_bit_with_any_workers(grouped_batches, kind):
    straight = list(itertools.islice(grouped_batches(kind), 16))  # four steps
    assert all(any(" more" in name for name in batch.names) for batch in straight)
    position, place = straight[3].position, 4
    for num_workers in (0, 1, 3):  # each goes on where the one before stopped
        stopped = StreamPosition.join([dataclasses.asdict(position)])
        resumed = itertools.islice(load_batches(grouped_batches(kind, stopped), num_workers), 4)
        for found, expected in zip(resumed, straight[place : place + 4], strict=True):
            assert_same(found, expected)
            position = found.position
        place += 4


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_a_grouped_source_do_not_depend_on_the_processes(grouped_batches, kind):
    straight = list(itertools.islice(grouped_batches(kind), 8))
    ranks = [list(itertools.islice(grouped_batches(kind, None, rank, 2), 4)) for rank in range(2)]
    for place, expected in enumerate(straight):
        for name in TENSORS:
            assert torch.equal(getattr(ranks[place % 2][place // 2], name), getattr(expected, name))


def test_a_position_saved_with_the_key_lanes_continues(grouped_batches):
    straight = list(itertools.islice(grouped_batches("stream"), 8))
    saved = dataclasses.asdict(straight[3].position)
    old = {"lanes": saved.pop("shards")}
    assert saved == {}
    resumed = grouped_batches("stream", StreamPosition.join([old]))
    for found, expected in zip(itertools.islice(resumed, 4), straight[4:], strict=True):
        assert_same(found, expected)


def test_once_every_conversation_of_a_grouped_source_is_drawn_and_counted_once(folder, processor, next_token_config):
    records = open_source(folder, "chat.jsonl", questions_per_sample=3)
    batches = list(
        PackedBatches(records, ReplySamples(processor), next_token_config(), StreamPosition(), 0, 1, 0, once=True)
    )
    assert sum(batch.num_drawn for batch in batches) == 25
    alone = PackedBatches(
        open_source(folder, "chat.jsonl"),
        ReplySamples(processor),
        next_token_config(),
        StreamPosition(),
        0,
        1,
        0,
        True,
    )
    counts = [sum(int((batch.targets >= 0).sum()) for batch in found) for found in (batches, alone)]
    assert counts[0] == counts[1] > 100
    assert sum(len(batch.pixel_values) for batch in batches) == 2 * (1 + 3 + 1 + 3)  # two groups a picture


def test_the_tiles_of_shared_pictures_count_once_against_the_budget(folder, processor, next_token_config):
    records = open_source(folder, "chat.jsonl", questions_per_sample=5)
    config = next_token_config("max_tiles_per_batch=3", "row_length=400")
    batches = itertools.islice(PackedBatches(records, ReplySamples(processor), config, StreamPosition(), 0, 1, 0), 12)
    names = []
    for batch in batches:
        assert len(batch.pixel_values) <= 3
        names += batch.names
    assert any(name.endswith("and 4 more") for name in names)


def test_a_conversation_that_cannot_be_used_takes_no_other_one_with_it(data, processor):
    picture = data / "pictures" / "00.png"
    asked = [conversation(picture, f"Question {number}?", answer) for number, answer in enumerate(("A", "", "B"))]
    record = Record.join([Record(f"row {number}", messages) for number, messages in enumerate(asked)])
    sampler = ReplySamples(processor)
    [sample, fault] = made = sampler.make_all(record, 0, max_tokens=200)
    assert torch.equal(sample.input_ids, sampler.make(record.part([0, 2]), 0).input_ids)
    assert (fault.name, fault.reason, was_split(made)) == ("row 1", "no supervised token", False)
    gone = Record.join([Record(f"row {number}", conversation("gone.png", "Why?", "A")) for number in range(3)])
    faults = sampler.make_all(gone, 0, max_tokens=200)
    assert [(fault.name, fault.reason) for fault in faults] == [(f"row {n}", "missing file") for n in range(3)]
    assert not was_split(faults)


def test_a_group_that_is_too_long_is_shared_out_and_its_long_conversation_cut_between_turns(data, processor):
    short = conversation(data / "pictures" / "00.png", "Why?", "A bus")
    later = [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": "the tree " * 6}]
    long = [*short, *later, *later]
    record = Record.join([Record("long", long), Record("short", short), Record("again", short)])
    sampler = ReplySamples(processor)
    limit = sampler.make(Record("long", long), 0).num_inputs - 1
    made = sampler.make_all(record, 0, max_tokens=limit)
    assert was_split(made)
    assert all(isinstance(item, Sample) for item in made)
    assert [item.name for item in made] == [f"long and 2 more ({part} of 3)" for part in (1, 2, 3)]
    together = made[-1]
    assert torch.equal(together.input_ids, sampler.make(record.part([1, 2]), 0).input_ids)


def test_a_template_that_begins_differently_for_each_conversation_is_refused(make_tokenizer, data):
    template = (
        "{{ messages[0]['content'][-5:] }}{% for message in messages %}{{ message['role'] + ':' + message['content'] "
        "+ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    processor = HoVLEProcessor.from_language_model(make_tokenizer(chat_template=template), image_size=56)
    asked = [Record("x", conversation(data / "pictures" / "00.png", question, "A")) for question in ("Why?", "Where?")]
    with pytest.raises(ValueError, match=r"different beginnings .* set questions_per_sample to 1"):
        ReplySamples(processor).make(Record.join(asked), 0)


def test_hd_refuses_to_share_pictures_of_any_source(language_models, data, next_token_config):
    model = HoVLEForConditionalGeneration.from_language_model(
        language_models["tied"], 2, image_size=56, pixel_shuffle_loc="post", dtype=torch.float32
    )
    config = next_token_config("rows_per_batch=1", "data.questions_per_sample=2")
    with pytest.raises(ValueError, match=r"cannot share a picture .* set data\.questions_per_sample to 1"):
        check_hd(config, model)
    check_hd(next_token_config("rows_per_batch=1", "data.independent_turns=true"), model)
