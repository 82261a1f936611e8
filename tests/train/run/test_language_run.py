"""Runs that hold the language: what they log, that they resume exactly, and that nothing changes where they do not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hovle.train.run.stage import run_stage


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"The lazy dog {number} jumps over the quick brown fox." for number in range(120)))
    return str(path)


def entries(output: str, event: str | None = None) -> list[dict]:
    lines = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    return [entry for entry in lines if entry.get("event") == event]


def weights(output: str) -> dict[str, torch.Tensor]:
    return load_file(Path(output) / "model" / "model.safetensors")


@pytest.fixture
def held(next_token_config, data, text):
    """`held("key=value", ...)`: the tiny recipe with text, and a validation source."""
    chat = data / "chat.jsonl"

    def make(*overrides: str):
        validation = ("validation.source=chat", f"validation.path={chat}", "num_validation_batches=1")
        return next_token_config(f"language.source={text}", *validation, "image_ablation=false", *overrides)

    return make


def test_steps_and_validation_log_the_distance_from_the_bare_model(held):
    config = held()
    run_stage(config)
    steps = entries(config.output)
    assert all(entry["language_kl"] > 0 for entry in steps)
    assert all(
        entry["loss"] == pytest.approx(entry["cross_entropy"] + entry["language_kl"], abs=2e-5) for entry in steps
    )
    validations = entries(config.output, "validation")
    assert len(validations) == 2
    assert all(entry["language_kl"] > 0 for entry in validations)


def test_a_resumed_run_ends_as_a_straight_one(held, tmp_path):
    straight = held(f"output={tmp_path / 'straight'}")
    run_stage(straight)
    interrupted = held(f"output={tmp_path / 'interrupted'}", "checkpoint_every=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hovle.train.run.writer.Writer.finish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_stage(interrupted)
    run_stage(interrupted, resume=True)
    expected, found = weights(straight.output), weights(interrupted.output)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_a_run_whose_text_changed_is_not_resumed(held, text):
    config = held("checkpoint_every=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hovle.train.run.writer.Writer.finish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_stage(config)
    Path(text).write_text(Path(text).read_text() + "\n\nA bus.")
    with pytest.raises(ValueError, match=r"Cannot resume: the text of language.source changed"):
        run_stage(config, resume=True)


def test_a_language_model_that_learns_resumes_with_the_copy_it_started_from(held, tmp_path):
    overrides = ("trainable=[stem, holistic_layers, language_model]", "learning_rate=1e-2")
    straight = held(f"output={tmp_path / 'straight'}", *overrides)
    run_stage(straight)
    interrupted = held(f"output={tmp_path / 'interrupted'}", "checkpoint_every=2", *overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hovle.train.run.writer.Writer.finish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_stage(interrupted)
    run_stage(interrupted, resume=True)
    last = [entries(config.output)[-1]["language_kl"] for config in (straight, interrupted)]
    assert last[0] == last[1]
    expected, found = weights(straight.output), weights(interrupted.output)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("kind", "term"), [("relative", "text_error"), ("fisher", "fisher_error"), ("kl", "language_kl")]
)
def test_distillation_holds_the_same_text(distillation_config, text, kind, term):
    config = distillation_config(
        f"language.source={text}", f"language.error={kind}", "learning_rate=1e-2", "num_steps=6"
    )
    run_stage(config)
    errors = [entry[term] for entry in entries(config.output)]
    assert abs(errors[0]) < 1e-4  # a new model's holistic layers are the identity
    assert all(error > 0 for error in errors[1:])


def test_a_resumed_distillation_measures_the_same_sensitivity(distillation_config, text, tmp_path):
    overrides = (f"language.source={text}", "language.error=fisher", "checkpoint_every=2")
    straight, interrupted = (
        distillation_config(f"output={tmp_path / name}", *overrides) for name in ("straight", "interrupted")
    )
    run_stage(straight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hovle.train.run.writer.Writer.finish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_stage(interrupted)
    run_stage(interrupted, resume=True)
    expected, found = weights(straight.output), weights(interrupted.output)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_only_distillation_chooses_how_text_is_held(held):
    with pytest.raises(ValueError, match=r"language.error is fisher, which is for distillation"):
        held("language.error=fisher")


def test_a_dry_run_says_what_text_takes_which_share(held, text, capsys):
    run_stage(held(), dry_run=True)
    assert f"language        {text}: 38 tokens of a batch, 9.9% of its places" in capsys.readouterr().out
