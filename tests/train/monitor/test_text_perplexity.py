"""Perplexity on text, compared with the bare language model's at every stage."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.language.text_perplexity import RECORD, TextRetention, read_text
from hovle.train import run_stage
from hovle.train.config import RetentionConfig

FLOAT32: contextlib.AbstractContextManager = contextlib.nullcontext()

SMALL = ("retention.num_tokens=64", "retention.window=32")


def measured(output: str | Path) -> list[dict]:
    entries = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry.get("event") == "text_retention"]


def test_perplexity_is_that_of_all_tokens_but_each_windows_first(parts):
    model, processor = parts
    retention = TextRetention(RetentionConfig(num_tokens=50, window=20), processor)
    assert [len(row.ids) for row in retention.rows] == [20, 20, 10]
    found = retention.perplexity(model, FLOAT32)
    assert model.training
    model.eval()
    nats = []
    with torch.no_grad():
        for ids, _ in retention.rows:
            chances = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(dim=-1)
            nats += [-float(chances[place, token]) for place, token in enumerate(ids[1:])]
    assert len(nats) == 47
    assert found == pytest.approx(math.exp(sum(nats) / 47), rel=1e-5)


def test_the_text_is_a_file_or_pythons_documentation_and_nothing_in_it_is_special(parts, tmp_path):
    _, processor = parts
    assert len(read_text("python_docs")) > 100_000
    (tmp_path / "text.txt").write_text("One picture <IMG_CONTEXT> and <|im_end|> of it. " * 9, encoding="utf-8")
    config = RetentionConfig(source=str(tmp_path / "text.txt"), num_tokens=40, window=40)
    [(ids, _)] = TextRetention(config, processor).rows
    assert processor.image_token_id not in ids
    assert processor.tokenizer.decode(ids).startswith("One picture <IMG_CONTEXT> and <|im_end|>")
    with pytest.raises(ValueError, match=r"has \d+ tokens, fewer than retention.num_tokens \(4000\)"):
        TextRetention(RetentionConfig(source=str(tmp_path / "text.txt"), num_tokens=4000), processor)
    with pytest.raises(
        ValueError, match=r"no text file nowhere\.txt; it may also be python_docs or state_of_the_union"
    ):
        TextRetention(RetentionConfig(source="nowhere.txt"), processor)


def test_every_stage_is_compared_with_the_language_model_the_first_one_began_with(
    distillation_config, next_token_config, language_models, tmp_path
):
    first = run_stage(distillation_config(*SMALL, f"output={tmp_path / 'first'}"))
    start, end = measured(tmp_path / "first")
    assert (start["step"], end["step"]) == (0, 4)
    assert start["perplexity_ratio"] == 1
    processor = HoVLEProcessor.from_pretrained(first)
    retention = TextRetention(RetentionConfig(num_tokens=64, window=32), processor)
    bare = AutoModelForCausalLM.from_pretrained(language_models["tied"], dtype=torch.float32)
    assert start["bare_perplexity"] == pytest.approx(retention.perplexity(bare, FLOAT32), rel=1e-4)
    trained = HoVLEForConditionalGeneration.from_pretrained(first)
    assert end["text_perplexity"] == pytest.approx(retention.perplexity(trained, FLOAT32), rel=1e-4)
    assert end["perplexity_ratio"] != 1

    # A stage that does not measure hands the record on.
    second = run_stage(next_token_config(f"model.checkpoint={first}", "num_steps=1", f"output={tmp_path / 'second'}"))
    assert (second / RECORD).read_text() == (first / RECORD).read_text()
    tuned = next_token_config(
        *SMALL,
        f"model.checkpoint={second}",
        "trainable=[stem, holistic_layers, language_model]",
        "learning_rate=0.01",
        f"output={tmp_path / 'third'}",
    )
    run_stage(tuned)
    for entry in measured(tmp_path / "third"):
        assert entry["bare_perplexity"] == start["bare_perplexity"]
    assert measured(tmp_path / "third")[-1]["text_perplexity"] != end["text_perplexity"]


def test_without_a_record_the_language_model_must_be_named(next_token_config, language_models, tmp_path):
    with pytest.raises(ValueError, match=r"does not record the bare .* retention\.language_model"):
        run_stage(next_token_config(*SMALL))
    assert not (tmp_path / "run").exists()
    run_stage(next_token_config(*SMALL, f"retention.language_model={language_models['tied']}", "num_steps=1"))
    start, _ = measured(tmp_path / "run")
    assert start["bare_perplexity"] != start["text_perplexity"]  # this checkpoint's new layers are not the identity
    assert json.loads((tmp_path / "run" / "model" / RECORD).read_text())["bare_perplexity"] > 1
