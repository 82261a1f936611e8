"""Perplexity on held-out text beside the bare language model's, and runs that end when it is lost."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hovle.train import run_stage
from hovle.train.data.language import LanguageText
from hovle.train.model.bare_language_model import BareLanguageModel
from hovle.train.monitor import language_check
from hovle.train.monitor.language_check import ForgettingError, LanguageCheck
from hovle.train.objectives.held_language import HeldLanguage
from hovle.train.objectives.next_token import NextTokenObjective
from hovle.train.step.assembly import TrainableStep, prepare_model

DOCUMENTS = torch.randint(20, 400, (30, 21), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture
def check(parts, next_token_config, one_process):
    """A check on windows of 40 tokens, which hold parts of two or three documents."""
    config = next_token_config("trainable=[holistic_layers, language_model]")
    model = prepare_model(parts[0], config, torch.float32, one_process.device)
    objective = NextTokenObjective(model.model, held=HeldLanguage(BareLanguageModel(model.model, torch.float32)))
    step = TrainableStep(model, objective, config, one_process, torch.float32).distribute()
    return LanguageCheck(step, LanguageText(DOCUMENTS, 40, seed=0))


def nats_of(model: nn.Module, check: LanguageCheck) -> float:
    """Mean over the documents of each window by themselves."""
    nats, count = 0.0, 0
    for ids, positions in zip(torch.cat(check.input_ids), torch.cat(check.position_ids), strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in itertools.pairwise(starts):
            document = ids[start:end]
            logits = model(input_ids=document[None], use_cache=False).logits[0, :-1]
            nats += float(nn.functional.cross_entropy(logits, document[1:], reduction="sum"))
            count += len(document) - 1
    return nats / count


@torch.no_grad()
def test_the_ratio_is_that_to_the_original_language_model(check, language_models):
    model = check.step.model
    original = AutoModelForCausalLM.from_pretrained(language_models["tied"], dtype=torch.float32)
    original.resize_token_embeddings(model.config.text_config.vocab_size)
    original.lm_head.weight.copy_(model.lm_head.weight)  # the rows of picture tokens are new
    expected = torch.tensor(nats_of(model.eval(), check) - nats_of(original, check)).exp()
    assert float(expected) != pytest.approx(1, abs=1e-3)
    assert check.perplexity_ratio() == pytest.approx(float(expected), rel=1e-4)
    assert model.training


def test_the_bare_language_model_is_measured_once_and_as_the_stage_found_it(check, monkeypatch):
    first = check.perplexity_ratio()
    monkeypatch.setattr(check.step.objective, "bare_logits", None)
    with torch.no_grad():
        check.step.model.lm_head.weight.mul_(3)
    assert check.perplexity_ratio() > 1.01 * first


def test_no_more_text_is_measured_than_tells_enough(check, monkeypatch):
    monkeypatch.setattr(language_check, "NUM_TOKENS", 90)
    found = LanguageCheck(check.step, LanguageText(DOCUMENTS, 40, seed=0))
    assert torch.cat(found.input_ids).shape == (3, 40)
    assert all(len(items) <= 2 for items in found.input_ids)  # rows_per_batch


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("ZQX vkj-WPF~ %KJ@# " * 300)  # nothing of what the chats say
    return f"language.source={path}"


def validations(output: str) -> list[dict]:
    lines = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    return [entry for entry in lines if entry.get("event") == "validation"]


def test_distillation_begins_with_the_bare_language_models_perplexity(distillation_config, text):
    config = distillation_config(text, "learning_rate=1e-2", "num_steps=3")
    run_stage(config)
    first, last = (entry["perplexity_ratio"] for entry in validations(config.output))
    assert first == pytest.approx(1, abs=1e-5)
    assert last != pytest.approx(1, abs=1e-5)


def test_a_run_that_forgets_ends_with_a_checkpoint_and_can_go_on(next_token_config, text, data, tmp_path):
    forgetful = (
        text,
        "language.weight=1e-6",
        "language.kl_weight=1e-6",
        "validation.source=chat",
        f"validation.path={data / 'chat.jsonl'}",
        "num_validation_batches=1",
        "validate_every=4",
        "image_ablation=false",
        "trainable=[holistic_layers, language_model]",
        "learning_rate=3e-2",
        "num_steps=6",
    )
    config = next_token_config(*forgetful, "stop_when_forgetting=1.1")
    with pytest.raises(ForgettingError, match=r"times the bare .* The run is saved in .*checkpoint-000004"):
        run_stage(config)
    output = Path(config.output)
    assert (output / "checkpoint-000004").is_dir()
    assert not (output / "model").exists()
    assert [entry["step"] for entry in validations(config.output)] == [0, 4]
    run_stage(next_token_config(*forgetful), resume=True)
    straight = next_token_config(*forgetful, f"output={tmp_path / 'straight'}")
    run_stage(straight)
    assert validations(config.output)[-1]["perplexity_ratio"] == validations(straight.output)[-1]["perplexity_ratio"]


def test_a_run_that_has_forgotten_at_its_end_leaves_its_model(next_token_config, text):
    forgetful = ("language.weight=1e-6", "language.kl_weight=1e-6", "trainable=[language_model]", "learning_rate=3e-2")
    config = next_token_config(text, *forgetful, "stop_when_forgetting=1.1")
    with pytest.raises(ForgettingError, match=r"The model is saved in .*model"):
        run_stage(config)
    assert (Path(config.output) / "model" / "model.safetensors").is_file()


def test_without_text_nothing_could_be_forgotten(next_token_config):
    with pytest.raises(ValueError, match="stop_when_forgetting needs a language block"):
        next_token_config("stop_when_forgetting=1.1")
