"""Text without pictures in packed batches: what is read, where it stands, and that its stream goes on exactly."""

import itertools
import json

import pytest
import torch

from hovle.train.config import ChatData
from hovle.train.data.language import LanguageText, open_language, read_documents
from hovle.train.data.packing import PackedBatches, ShardPosition, StreamPosition
from hovle.train.data.readers import load_records
from hovle.train.data.samples import ReplySamples

DOCUMENTS = [list(range(100, 130)), [7], [], list(range(200, 275))]
"""106 tokens."""


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"The lazy dog {number} jumps over the quick brown fox." for number in range(120)))
    return str(path)


@pytest.fixture
def stream(parts, data, next_token_config, text):
    """`stream("key=value", ..., start=...)`: packed chats with text."""

    def build(*overrides: str, start: StreamPosition | None = None, rank=0, world_size=1, has_text=True):
        config = next_token_config(f"language.source={text}", *overrides)
        language = open_language(config, parts[1])
        return PackedBatches(
            load_records(ChatData(path=str(data / "chat.jsonl"))),
            ReplySamples(parts[1]),
            config,
            start or StreamPosition(),
            rank,
            world_size,
            pad_token_id=0,
            language=language[0] if language and has_text else None,
        )

    return build


# --- windows ---------------------------------------------------------------------------------------------------------


def test_every_token_is_trained_on_or_held_out_and_none_is_both():
    training, held_out = LanguageText(DOCUMENTS, 10, seed=0), LanguageText(DOCUMENTS, 10, seed=0, held_out=True)
    seen = [
        {token for number in range(len(text.starts)) for token in text.window_at(number).input_ids.tolist()}
        for text in (training, held_out)
    ]
    assert seen[0] | seen[1] == {token for document in DOCUMENTS for token in document}
    assert not seen[0] & seen[1]
    assert seen[1] == set(range(265, 275))


def test_positions_begin_anew_with_each_document_and_each_window():
    text = LanguageText(DOCUMENTS, 20, seed=0)
    windows = {int(window.input_ids[0]): window for window in map(text.window_at, range(len(text.starts)))}
    window = windows[120]  # ten of the first document, the lone token, nine of the last
    assert window.input_ids.tolist() == [*range(120, 130), 7, *range(200, 209)]
    assert window.position_ids.tolist() == [*range(10), 0, *range(9)]
    assert window.document_ids.tolist() == [0] * 10 + [1] + [2] * 9


def test_every_epoch_has_an_order_of_its_own_and_visits_each_window_once():
    text = LanguageText(DOCUMENTS, 10, seed=0)
    size = len(text.starts)
    epochs = [[int(text.window_at(epoch * size + place).input_ids[0]) for place in range(size)] for epoch in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
    again = LanguageText(DOCUMENTS, 10, seed=0)
    assert [int(again.window_at(size + place).input_ids[0]) for place in range(size)] == epochs[1]


def test_a_text_too_short_to_hold_something_out_is_refused():
    with pytest.raises(ValueError, match=r"has 106 tokens, but .* window of 60 .* take 120: name a longer text"):
        LanguageText(DOCUMENTS, 60, seed=0)


def test_the_fingerprint_knows_where_documents_end():
    joint = [[token for document in DOCUMENTS for token in document]]
    assert LanguageText(DOCUMENTS, 10, 0).fingerprint != LanguageText(joint, 10, 0).fingerprint


# --- sources ---------------------------------------------------------------------------------------------------------


def test_chats_are_encoded_by_the_chat_template_and_prose_as_it_stands(parts, tmp_path):
    _, processor = parts
    messages = [{"role": "user", "content": "A tree?"}, {"role": "assistant", "content": "And a bus."}]
    path = tmp_path / "replay.jsonl"
    path.write_text(f"{json.dumps({'messages': messages})}\n{json.dumps({'text': 'The quick brown fox.'})}\n")
    chat, prose = read_documents(str(path), processor)
    assert chat == processor.encode_chats([messages], [])[0]
    assert prose == processor.tokenizer("The quick brown fox.", add_special_tokens=False)["input_ids"]


def test_special_tokens_in_prose_are_ordinary_text(parts, tmp_path):
    model, processor = parts
    path = tmp_path / "text.txt"
    path.write_text("a <IMG_CONTEXT> b " + processor.tokenizer.decode([model.config.image_token_id]))
    [ids] = read_documents(str(path), processor)
    assert model.config.image_token_id not in ids


def test_a_folder_that_datasets_reads_gives_a_document_a_row(parts, tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = ["The quick brown fox.", "A bus and a tree."]
    (tmp_path / "prose").mkdir()
    datasets.Dataset.from_dict({"text": texts}).to_parquet(str(tmp_path / "prose" / "train.parquet"))
    for source in (tmp_path / "prose", tmp_path / "prose" / "train.parquet"):
        documents = list(read_documents(str(source), parts[1]))
        assert documents == [parts[1].tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}]}', "shows a picture"),
        ('{"caption": "A bus"}', "messages"),
        ("[1, 2]", "expected"),
        ('{"messages"', "replay.jsonl:2"),
    ],
)
def test_a_line_that_is_no_text_is_named(parts, tmp_path, line, fault):
    path = tmp_path / "replay.jsonl"
    path.write_text(f'{{"text": "A bus"}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"language.source: .*replay.jsonl:2.*{fault}|language.source: .*{fault}"):
        list(read_documents(str(path), parts[1]))


def test_a_missing_file_is_named_as_the_recipe_names_it(parts):
    with pytest.raises(ValueError, match=r"language.source: no text file nowhere.txt"):
        list(read_documents("nowhere.txt", parts[1]))


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "share", "layout"),
    [(11, 0.1, (1, 132)), (4, 0.1, (1, 53)), (1, 0.1, (1, 13)), (15, 0.1, (2, 132)), (2, 0.5, (1, 132))],
)
def test_the_share_holds_as_near_as_whole_rows_allow(next_token_config, rows, share, layout):
    config = next_token_config(
        f"rows_per_batch={rows}", "row_length=132", f"language.share={share}", "language.source=python_docs"
    )
    assert (config.num_language_rows, config.language_length) == layout
    most_off = 66 if share * rows >= 1 else 0.5
    assert layout[0] * layout[1] == pytest.approx(share * rows * 132, abs=most_off)


def test_the_last_rows_begin_with_text_that_has_no_targets(stream):
    batch = next(iter(stream("language.share=0.3")))
    assert (batch.num_language_rows, batch.language_length) == (1, 115)
    assert batch.input_ids.shape == (2, 192)
    assert (batch.language_part(batch.targets) == -100).all()
    assert batch.language_part(batch.is_sample).all()
    assert batch.language_part(batch.input_ids).shape == (1, 115)
    assert batch.is_supervised.any()
    assert batch.position_ids[1, 115] == 0  # a sample of its own, or padding


def test_text_and_samples_of_one_row_do_not_see_each_other(stream, parts):
    overrides = ("rows_per_batch=1", "language.share=0.3")
    batch, masked = next(iter(stream(*overrides))), stream(*overrides)
    masked.layout.has_branches = True
    mask = next(iter(masked)).attention_mask
    assert batch.names
    assert not mask[0, 0, batch.language_length :, : batch.language_length].any()
    model, _ = parts
    alone = model.model(input_ids=batch.language_part(batch.input_ids), use_cache=False).last_hidden_state
    joint = model.model.eval()(
        input_ids=batch.input_ids[:, : batch.language_length + 3].clamp(max=model.config.image_token_id - 1),
        position_ids=batch.position_ids[:, : batch.language_length + 3],
        use_cache=False,
    ).last_hidden_state
    torch.testing.assert_close(joint[:, : batch.language_length], alone, rtol=1e-4, atol=1e-5)


def test_samples_fit_beside_the_text_even_in_a_single_row(stream):
    batches = list(itertools.islice(stream("rows_per_batch=1", "row_length=160"), 6))
    assert all(batch.names for batch in batches)
    assert {batch.input_ids.shape for batch in batches} == {(1, 160)}


def test_without_text_batches_are_what_they_were(stream, next_token_config, parts, data):
    plain = PackedBatches(
        load_records(ChatData(path=str(data / "chat.jsonl"))),
        ReplySamples(parts[1]),
        next_token_config(),
        StreamPosition(),
        0,
        1,
        pad_token_id=0,
    )
    for found, expected in itertools.islice(zip(stream(has_text=False), plain, strict=False), 4):
        assert found.names == expected.names
        assert found.position == expected.position
        assert found.num_language_rows == 0
        for name in ("input_ids", "targets", "position_ids", "is_sample", "pixel_values"):
            assert torch.equal(getattr(found, name), getattr(expected, name))


def test_a_resumed_stream_goes_on_with_the_next_window(stream):
    straight = list(itertools.islice(stream(), 7))
    resumed = list(itertools.islice(stream(start=straight[3].position), 3))
    for found, expected in zip(resumed, straight[4:], strict=True):
        assert torch.equal(found.input_ids, expected.input_ids)
        assert found.position == expected.position


def test_processes_share_the_windows_as_micro_batches_do(stream):
    alone = list(itertools.islice(stream("gradient_accumulation_steps=2"), 6))
    for rank in (0, 1):
        own = list(itertools.islice(stream(rank=rank, world_size=2), 3))
        for found, expected in zip(own, alone[rank::2], strict=True):
            assert torch.equal(found.input_ids, expected.input_ids)
    texts = [tuple(batch.language_part(batch.input_ids).flatten().tolist()) for batch in alone]
    assert len(set(texts)) == len(texts)


def test_a_checkpoint_without_windows_starts_with_the_first(stream):
    old = {"next_index": 0, "pending": [], "streams": {}}
    assert ShardPosition(**old).num_windows == 0


def test_a_share_of_less_than_two_tokens_is_refused(next_token_config):
    with pytest.raises(ValueError, match=r"language.share \(0.001\) of 2 rows of 192 tokens is less than two tokens"):
        next_token_config("language.source=python_docs", "language.share=0.001")
