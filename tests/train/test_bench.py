"""The training benchmark: every variant computes the same, and its arithmetic is right."""

import dataclasses
import os

import pytest
import torch

from hovle import HoVLEImageProcessor, HoVLEProcessor
from hovle.assets import easy_vqa
from hovle.assets.vqa_questions import load_questions
from hovle.bench import train as speed
from hovle.train.data.records import picture_sources
from hovle.train.data.samples import ReplySamples
from hovle.train.data.tiles import read_tiles
from hovle.train.parallel import make_accelerator

CPU = torch.device("cpu")


@pytest.mark.parametrize("mix", speed.MIXES)
def test_all_variants_train_on_the_same_samples_with_the_same_loss(mix, next_token_config, monkeypatch):
    monkeypatch.setitem(speed.SHAPES, mix, speed.Shape(2, 1024, 3))
    monkeypatch.setattr(speed, "NUM_TIMED_PASSES", 1)
    variants = [dataclasses.replace(item, compiled=False, keeps_memory=False) for item in speed.VARIANTS]
    config = next_token_config("learning_rate=0.0")
    measured = speed.compare(mix, 7, config, torch.float32, CPU, variants, run=lambda call, *args: call(*args))
    assert [item.name for item in measured] == [variant.name for variant in speed.VARIANTS]
    first = measured[0]
    for item in measured:
        assert item.nats_per_token == pytest.approx(first.nats_per_token, rel=1e-5)
        assert item.timed_nats_per_token == pytest.approx(item.nats_per_token, rel=1e-4)
        assert item.seconds * item.tokens_per_second == pytest.approx(first.seconds * first.tokens_per_second)
    assert measured[1].padding_ratio == pytest.approx(measured[-1].padding_ratio, abs=0.02)  # neither is packed


def test_shared_pictures_have_seven_tiles_and_five_to_ten_of_their_own_questions():
    records = speed.make_records("shared", 64)
    sizes = [record.num_conversations for record in records]
    assert (sum(sizes), min(sizes) >= 5, max(sizes) <= 10) == (64, True, True)
    image_processor = HoVLEImageProcessor(tile_size=112, max_tiles=speed.SHARED_MAX_TILES)
    asked = {(item.picture.name, item.text, item.answer) for item in load_questions(easy_vqa() / "train")}
    for record in records:
        conversations = [record.messages, *record.others]
        pictures = {picture for messages in conversations for picture in picture_sources(messages)}
        assert len(pictures) == 1
        assert len(read_tiles(pictures.pop(), image_processor)) == 7
        name = record.name.partition("[")[0]
        for question, reply in conversations:
            assert (name, question["content"][1]["text"], reply["content"][0]["text"]) in asked


def test_a_variant_runs_in_a_process_of_its_own():
    assert speed.in_own_process(os.getpid) != os.getpid()


def test_a_variant_with_another_loss_stops_the_benchmark():
    first = speed.Measured("ours", 1.0, 10.0, 20.0, 0.0, 1, nats_per_token=2.0, timed_nats_per_token=2.02)
    speed.check_loss(first, dataclasses.replace(first, nats_per_token=2.0001))
    with pytest.raises(ValueError, match=r"Trainer has 2\.0010 nats per token where ours has 2\.0000"):
        speed.check_loss(first, dataclasses.replace(first, name="Trainer", nats_per_token=2.001))
    with pytest.raises(
        ValueError, match=r"ours, while it is timed, has 2\.2000 nats per token where ours has 2\.0000"
    ):
        speed.check_loss(first, dataclasses.replace(first, timed_nats_per_token=2.2))
    with pytest.raises(ValueError, match="nan"):
        speed.check_loss(first, dataclasses.replace(first, nats_per_token=float("nan")))


@pytest.mark.parametrize("packed", [True, False])
def test_batches_hold_every_sample_once(packed, checkpoints):
    maker = ReplySamples(HoVLEProcessor.from_pretrained(checkpoints["tied"]))
    samples = [maker.make(record, index) for index, record in enumerate(speed.make_records("skewed", 9))]
    batches = speed.make_batches(samples, packed, speed.Shape(2, 1024, 4), maker)
    assert sorted(name for batch in batches for name in batch.names) == sorted(item.name for item in samples)
    assert sum(int(batch.is_supervised.sum()) for batch in batches) == sum(
        int((item.labels[1:] != -100).sum()) for item in samples
    )


def test_flops_of_a_product_are_counted_from_its_factors():
    assert speed.count_flops([2, 3], [3, 5]) == 2 * 2 * 3 * 5
    assert speed.count_flops([4, 2, 3], [4, 3, 5]) == 4 * 2 * 2 * 3 * 5
    assert speed.time_product([2, 3], [3, 5], torch.float32) > 0


def test_factors_are_told_from_biases_and_outputs():
    assert speed.factors("aten::mm", [[2, 3], [3, 5], [2, 5]]) == ([2, 3], [3, 5])
    assert speed.factors("aten::addmm", [[5], [2, 3], [3, 5], [], []]) == ([2, 3], [3, 5])
    assert speed.factors("aten::baddbmm", [[4, 2, 5], [4, 2, 3], [4, 3, 5]]) == ([4, 2, 3], [4, 3, 5])


@pytest.mark.parametrize("stage", ["distillation", "next_token"])
def test_a_step_is_taken_apart_into_its_matrix_products_and_the_rest(stage, request):
    config = request.getfixturevalue(f"{stage}_config")("compile=off", "num_workers=0")
    facts = speed.take_apart(config, make_accelerator(), torch.float32, num_steps=2)
    assert 0 < facts["matrix_products_alone_seconds"] < facts["seconds"]
    assert 0 < facts["mfu"] < 1
    assert facts["seconds_by_kind"]["matrix products"] > 0
    assert (facts["teacher_seconds"] > 0) == (stage == "distillation")


def test_products_slower_than_the_step_they_belong_to_are_no_result(next_token_config, monkeypatch):
    monkeypatch.setattr(speed, "time_product", lambda *_: 10.0)
    with pytest.raises(ValueError, match="something else was running"):
        speed.take_apart(next_token_config("compile=off", "num_workers=0"), make_accelerator(), torch.float32, 1)
