"""Runs that teach words: what they log and leave, that they resume exactly, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from hovle import HoVLEForConditionalGeneration
from hovle.train.run.stage import run_stage

WORDS = "objective.words={num_others: 32, characters: {layer: -2}}"


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    """Ten pictures of a line of text each, with the regions that tell it."""
    folder = tmp_path_factory.mktemp("lines")
    rows = []
    for number, text in enumerate(["cat on mat", "the dog", "A bus", "3 4 5", "lazy"] * 2):
        picture = Image.new("RGB", (112 if number % 2 else 56, 56), "white")
        ImageDraw.Draw(picture).text((4, 20), text, fill="black")
        picture.save(folder / f"{number}.png")
        content = [{"type": "image", "path": f"{number}.png"}, {"type": "text", "text": "Read it."}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": text}]
        rows.append({"messages": messages, "regions": [{"box": [2, 12, 54, 40], "text": text}]})
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "lines.jsonl"


@pytest.fixture
def taught(distillation_config, lines):
    """`taught("key=value", ...)`: the tiny recipe on lines of text, which it also holds out."""

    def make(*overrides: str):
        source = f"{{source: chat, path: {lines}}}"
        held_out = (f"validation={source}", "num_validation_batches=1")
        return distillation_config(f"data={source}", *held_out, WORDS, *overrides)

    return make


def entries(output: str, event: str | None = None) -> list[dict]:
    lines = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    return [entry for entry in lines if entry.get("event") == event]


def test_a_run_logs_what_is_read_and_leaves_a_model_without_heads(taught):
    config = taught()
    run_stage(config)
    for entry in entries(config.output):
        assert -1 <= entry["word_cosine"] <= 1
        assert entry["character_cross_entropy"] > 0
        assert entry["gradient_norm_words"] > 0  # the head
        assert "word_accuracy" not in entry
    first, last = entries(config.output, "validation")
    assert 0 <= first["word_accuracy"] <= 1
    assert 0 <= last["word_accuracy"] <= 1
    model = Path(config.output) / "model"
    assert not [name for name in load_file(model / "model.safetensors") if "head" in name and "lm_head" not in name]
    HoVLEForConditionalGeneration.from_pretrained(model)


def test_a_resumed_run_ends_as_a_straight_one_heads_included(taught, tmp_path):
    straight = taught(f"output={tmp_path / 'straight'}", "checkpoint_every=3")
    run_stage(straight)
    interrupted = taught(f"output={tmp_path / 'interrupted'}", "checkpoint_every=2", "num_workers=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hovle.train.run.writer.Writer.finish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_stage(interrupted)
    run_stage(interrupted, resume=True)
    ends = [entries(config.output)[-1] for config in (straight, interrupted)]
    timeless = [name for name in ends[0] if name.startswith(("word", "character", "loss", "gradient", "filler"))]
    assert {name: ends[0][name] for name in timeless} == {name: ends[1][name] for name in timeless}
    expected, found = (load_file(Path(c.output) / "model" / "model.safetensors") for c in (straight, interrupted))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_hd_is_taught_words(taught):
    config = taught(
        "model.pixel_shuffle_loc=post", "rows_per_batch=1", "objective.words={num_others: 32}", "num_steps=2"
    )
    run_stage(config)
    assert all(entry["word_cross_entropy"] > 0 for entry in entries(config.output))


def test_words_without_regions_in_the_data_are_refused_before_the_first_step(distillation_config):
    with pytest.raises(ValueError, match=r"objective.words is set, but none of the first 256 records has regions"):
        run_stage(distillation_config(WORDS))


def test_a_run_whose_regions_changed_is_not_resumed(taught, lines, tmp_path):
    copied = tmp_path / "data"
    copied.mkdir()
    for path in lines.parent.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    config = taught(f"data={{source: chat, path: {copied / 'lines.jsonl'}}}", "checkpoint_every=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hovle.train.run.writer.Writer.finish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_stage(config)
    text = (copied / "lines.jsonl").read_text()
    (copied / "lines.jsonl").write_text(text.replace("[2, 12, 54, 40]", "[2, 12, 50, 40]"))
    with pytest.raises(ValueError, match="Cannot resume: the data changed"):
        run_stage(config, resume=True)
