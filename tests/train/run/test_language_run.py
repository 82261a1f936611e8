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
    config = held("language.kl_weight=1", "language.weight=0")
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
    overrides = ("language.kl_weight=1",)
    straight = held(f"output={tmp_path / 'straight'}", *overrides)
    run_stage(straight)
    interrupted = held(f"output={tmp_path / 'interrupted'}", "checkpoint_every=2", *overrides)
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


def test_distillation_holds_the_same_text(distillation_config, text):
    config = distillation_config(f"language.source={text}", "learning_rate=1e-2", "num_steps=6")
    run_stage(config)
    errors = [entry["text_error"] for entry in entries(config.output)]
    assert abs(errors[0]) < 1e-4  # a new model's holistic layers are the identity
    assert all(error > 0 for error in errors[1:])


# peft 0.21.2 asks for `is_gradient_checkpointing`, which transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("overrides", "terms"),
    [
        ((), {"text_error": 1.0}),
        (("language.kl_weight=2",), {"text_error": 1.0, "language_kl": 2.0}),
        (("trainable=[language_model]",), {"text_error": 1.0, "language_kl": 1.0}),
        (("trainable=[]", "lora.rank=2", "language.weight=0.5"), {"text_error": 0.5, "language_kl": 1.0}),
        (("trainable=[language_model]", "language.kl_weight=0"), {"text_error": 1.0}),
    ],
)
def test_what_the_language_model_says_is_held_where_it_learns_or_the_recipe_says_so(held, overrides, terms):
    config = held("num_steps=1", *overrides)
    run_stage(config)
    [entry] = entries(config.output)
    assert {name: entry[name] for name in ("text_error", "language_kl") if name in entry}.keys() == terms.keys()
    weighted = sum(weight * entry[name] for name, weight in terms.items())
    assert entry["loss"] == pytest.approx(entry["cross_entropy"] + weighted, rel=1e-4)


def test_distillation_refuses_to_hold_what_the_language_model_says(distillation_config, text):
    with pytest.raises(ValueError, match=r"language.kl_weight is 2.0, but distillation does not run the language"):
        distillation_config(f"language.source={text}", "language.kl_weight=2")


def test_a_block_that_holds_nothing_is_refused(held):
    with pytest.raises(ValueError, match=r"language.weight and language.kl_weight are both 0"):
        held("language.weight=0")


def test_a_dry_run_says_what_text_takes_which_share(held, text, capsys):
    run_stage(held(), dry_run=True)
    assert f"language        {text}: 38 tokens of a batch, 9.9% of its places" in capsys.readouterr().out
