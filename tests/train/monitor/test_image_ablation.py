"""Blank and shuffled pictures, and the alarm of a run that does not look."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from hovle.model.modeling_hovle import IGNORE_INDEX
from hovle.train import run_stage
from hovle.train.data.batch import PackedBatch
from hovle.train.monitor.image_ablation import (
    BlindPicturesError,
    Examiner,
    blank_pictures,
    only_after_pictures,
    shuffle_pictures,
    split_pictures,
)
from hovle.train.objectives.next_token import NextTokenObjective
from hovle.train.step.assembly import TrainableStep, prepare_model

ANSWERS = {"red": "A bus and a tree", "blue": "3"}


@pytest.fixture
def write_chats(tmp_path):
    """`write_chats(depends)`: one-coloured pictures; the answer names the colour's word, or is always the same."""

    def write(depends: bool) -> Path:
        lines = []
        for index in range(16):
            color = list(ANSWERS)[index % 2]
            name = f"{index}.png"
            Image.new("RGB", (56, 56), color).save(tmp_path / name)
            question = [{"type": "image", "path": name}, {"type": "text", "text": "What is in the picture?"}]
            answer = ANSWERS[color] if depends else ANSWERS["red"]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": messages}))
        path = tmp_path / "colors.jsonl"
        path.write_text("\n".join(lines))
        return path

    return write


@pytest.fixture
def color_config(write_chats, next_token_config):
    """`color_config(depends, "key=value", ...)`: training of everything on such pictures, 30 steps."""

    def run(depends: bool, *overrides: str):
        path = write_chats(depends)
        data = (f"data.path={path}", "validation.source=chat", f"validation.path={path}", "num_validation_batches=1")
        everything = "trainable=[stem, holistic_layers, language_model]"
        return next_token_config(
            *data, everything, "num_steps=30", "learning_rate=0.003", "rows_per_batch=1", *overrides
        )

    return run


def read_log(output: str) -> list[dict]:
    return [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]


def events(output: str, name: str) -> list[dict]:
    return [entry for entry in read_log(output) if entry.get("event") == name]


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_whose_answers_need_no_picture_raises_the_alarm(color_config, capsys):
    config = color_config(False)
    run_stage(config)
    [check] = events(config.output, "image_ablation")
    [warning] = events(config.output, "warning")
    assert check["step"] == warning["step"] == 30
    assert check["shuffled_gap"] < 0.01
    assert check["blank_gap"] < 0.05  # a blank one is like none that was learnt from: 0.016
    shown = capsys.readouterr().err
    assert "WARNING after step 30: Pictures hardly matter" in shown
    assert "wording alone" in warning["message"]


def test_a_run_whose_answers_need_the_picture_does_not(color_config, capsys):
    config = color_config(True, "stop_when_images_ignored=true")
    run_stage(config)
    [check] = events(config.output, "image_ablation")
    assert check["blank_gap"] > 0.1
    assert check["shuffled_gap"] > 0.1
    assert not events(config.output, "warning")
    assert "WARNING" not in capsys.readouterr().err


def test_stopping_in_the_middle_leaves_no_model_and_stopping_at_the_end_does(color_config, tmp_path):
    stopping = ("stop_when_images_ignored=true", "min_picture_gap=9")
    early = color_config(False, *stopping, "validate_every=2", "num_steps=3")
    with pytest.raises(BlindPicturesError, match="Pictures hardly matter"):
        run_stage(early)
    assert [entry["step"] for entry in events(early.output, "warning")] == [2]
    assert (Path(early.output) / "checkpoint-000002").is_dir()
    assert not (Path(early.output) / "model").exists()
    late = color_config(False, *stopping, "num_steps=1", f"output={tmp_path / 'b'}")
    with pytest.raises(BlindPicturesError, match=r"The model is saved in .*model"):
        run_stage(late)
    assert (tmp_path / "b" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["validation=null"], "there is no validation source"),
        (["validation.path={questions}"], "no held-out reply follows a picture"),
        (["validation=null", "image_ablation=false"], None),
        ([], None),
    ],
    ids=["nothing held out", "no pictures", "switched off", "pictures"],
)
def test_a_run_whose_pictures_cannot_be_checked_says_so_at_its_start(color_config, tmp_path, capsys, overrides, found):
    message = {"messages": [{"role": "user", "content": "A tree?"}, {"role": "assistant", "content": "A bus."}]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(message))
    overrides = [override.format(questions=tmp_path / "questions.jsonl") for override in overrides]
    config = color_config(True, *overrides, "num_steps=1", "min_picture_gap=-9")
    run_stage(config)
    shown = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert [line.split("pictures: ")[1].split(". Name")[0] for line in shown] == ([found] if found else [])


# --- the examination -------------------------------------------------------------------------------------------------


@pytest.fixture
def examiner(parts, batches, next_token_config, data, one_process):
    """`examiner("key=value", ...)`: an examiner of two batches, and the list it logs to."""

    def build(*overrides: str) -> tuple[Examiner, list[dict]]:
        held_out = ("validation.source=chat", f"validation.path={data / 'chat.jsonl'}")
        entries: list[dict] = []
        config, model = next_token_config(*held_out, *overrides), parts[0]
        trainable = prepare_model(model, config, torch.float32, one_process.device)
        step = TrainableStep(trainable, NextTokenObjective(model), config, one_process, torch.float32).distribute()
        return Examiner(step, batches("chat", 2), entries.append), entries

    return build


def test_before_the_first_step_nothing_but_validation_is_measured(examiner):
    examine, entries = examiner()
    assert examine.examine(0) is None
    assert [entry["event"] for entry in entries] == ["validation"]


def test_the_same_step_is_validated_once(examiner):
    examine, entries = examiner()
    examine.examine(2)
    loss = examine.held_out_loss(2)
    assert [entry["event"] for entry in entries if entry["event"] == "validation"] == ["validation"]
    assert loss == pytest.approx(entries[0]["cross_entropy"])
    examine.held_out_loss(4)
    assert [entry["step"] for entry in entries if entry["event"] == "validation"] == [2, 4]


def test_the_check_compares_replies_that_follow_a_picture(examiner, parts):
    examine, entries = examiner("min_picture_gap=0")
    examine.examine(4)
    validation, check = entries[:2]
    seeing = [only_after_pictures(batch, parts[0].config.image_token_id) for batch in examine.batches]
    assert check["true_nats"] == pytest.approx(examine._measure(seeing)["cross_entropy"])
    assert check["true_nats"] != pytest.approx(validation["cross_entropy"])  # some conversations have no picture
    assert check["blank_gap"] == pytest.approx(check["blank_nats"] - check["true_nats"])
    assert check["num_pictures"] == check["num_shuffled"] > 4


def test_no_alarm_is_raised_during_warm_up_or_when_switched_off(examiner):
    for overrides in (("warmup_ratio=0.5", "num_steps=10"), ("image_ablation=false",)):
        examine, entries = examiner("min_picture_gap=9", *overrides)
        assert examine.examine(5 if "num_steps=10" in overrides else 4) is None
        assert not [entry for entry in entries if entry["event"] == "warning"]
    examine, _ = examiner("min_picture_gap=9", "warmup_ratio=0.5", "num_steps=10", "stop_when_images_ignored=true")
    assert "with blank ones and" in str(examine.examine(6))


def test_without_pictures_there_is_nothing_to_alarm_about(examiner):
    examine, entries = examiner("min_picture_gap=9")
    examine.batches = [
        dataclasses.replace(batch, targets=torch.full_like(batch.targets, IGNORE_INDEX)) for batch in examine.batches
    ]
    assert examine.examine(4) is None
    assert entries[-1] == {"event": "image_ablation", "step": 4, "num_pictures": 0, "num_shuffled": 0}


# --- variants of a batch ---------------------------------------------------------------------------------------------


def test_only_replies_after_a_picture_of_the_same_sample_keep_their_targets(batches, parts):
    token = parts[0].config.image_token_id
    lost = kept = 0
    for batch in batches("chat", 3):
        found = only_after_pictures(batch, token).targets
        for row in range(len(found)):
            starts = [*(batch.position_ids[row] == 0).nonzero().flatten().tolist(), found.shape[1]]
            for start, end in itertools.pairwise(starts):
                ids, before = batch.input_ids[row, start:end], batch.targets[row, start:end]
                if token in ids:
                    assert torch.equal(found[row, start:end], before)
                    kept += int((before != IGNORE_INDEX).sum())
                else:
                    assert (found[row, start:end] == IGNORE_INDEX).all()
                    lost += int((before != IGNORE_INDEX).sum())
    assert min(lost, kept) > 0


def test_blank_pictures_are_white_and_leave_the_batch_alone(batches):
    [batch] = batches("chat")
    before = batch.pixel_values.clone()
    [blank] = blank_pictures([batch])
    assert blank.pixel_values.shape == before.shape
    assert (blank.pixel_values == 255).all()
    assert torch.equal(batch.pixel_values, before)


def test_shuffling_gives_every_place_a_picture_of_as_many_tiles_that_differs(batches, parts):
    config = parts[0].config
    held_out = batches("chat", 2)
    shuffled, num_pictures, num_shuffled = shuffle_pictures(held_out, config)
    before = [picture for batch in held_out for picture in split_pictures(batch, config)]
    after = [picture for batch in shuffled for picture in split_pictures(batch, config)]
    assert num_pictures == num_shuffled == len(before) == len(after)
    assert {len(picture) for picture in before} == {1, 3}
    for old, new in zip(before, after, strict=True):
        assert len(new) == len(old)
        assert not torch.equal(new, old)
        assert any(len(other) == len(new) and torch.equal(other, new) for other in before)


def picture_batch(config, pictures: list[torch.Tensor]) -> PackedBatch:
    """One row with these pictures between single words."""
    ids: list[int] = []
    for picture in pictures:
        ids += [5] + [config.image_token_id] * (len(picture) * config.image_seq_length)
    input_ids = torch.tensor([ids])
    return PackedBatch(
        input_ids=input_ids,
        targets=input_ids,
        position_ids=torch.arange(len(ids))[None],
        is_sample=torch.ones_like(input_ids, dtype=torch.bool),
        pixel_values=torch.cat(pictures),
    )


def tiles(number: int, value: float) -> torch.Tensor:
    return torch.full((number, 3, 56, 56), value)


def test_a_picture_shared_by_samples_is_not_exchanged_for_itself(parts):
    config = parts[0].config
    batch = picture_batch(config, [tiles(1, 1.0), tiles(1, 1.0), tiles(1, 2.0)])
    [shuffled], _, num_shuffled = shuffle_pictures([batch], config)
    assert shuffled.pixel_values[:, 0, 0, 0].tolist() == [2.0, 2.0, 1.0]
    assert num_shuffled == 3


def test_a_picture_of_its_own_size_gets_anothers_tiles_and_a_lone_one_stays(parts):
    config = parts[0].config
    batch = picture_batch(config, [tiles(3, 1.0), tiles(1, 2.0)])
    [shuffled], num_pictures, num_shuffled = shuffle_pictures([batch], config)
    assert shuffled.pixel_values[:, 0, 0, 0].tolist() == [2.0, 2.0, 2.0, 1.0]
    alone = picture_batch(config, [tiles(2, 1.0)])
    [shuffled], num_pictures, num_shuffled = shuffle_pictures([alone], config)
    assert torch.equal(shuffled.pixel_values, alone.pixel_values)
    assert (num_pictures, num_shuffled) == (1, 0)
