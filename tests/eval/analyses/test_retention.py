"""`hovle eval retention`: perplexity and text tasks, the bare language model against each stage."""

import json
import math

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.cli import main
from hovle.eval.analyses.text_tasks import TASKS, Item, TaskScore, draw_items, score_items


@pytest.fixture
def stages(tmp_path, make_tokenizer):
    """Folders of a random Llama, of the fresh HoVLE around it, and of one whose weights have moved."""
    torch.manual_seed(0)
    text = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**text, num_hidden_layers=2)).save_pretrained(tmp_path / "llama")
    make_tokenizer().save_pretrained(tmp_path / "llama")
    model = HoVLEForConditionalGeneration.from_language_model(tmp_path / "llama", 1, image_size=56)
    processor = HoVLEProcessor.from_language_model(tmp_path / "llama", model.config)
    for stage in ("fresh", "moved"):
        model.save_pretrained(tmp_path / stage / "model")
        processor.save_pretrained(tmp_path / stage / "model")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return tmp_path / "llama", tmp_path / "fresh" / "model", tmp_path / "moved" / "model"


def test_the_bare_model_stands_beside_each_stage(stages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hovle.eval.analyses.retention.fastest_dtype", lambda device: torch.float32)
    bare, *models = map(str, stages)
    options = ["--num-tokens", "200", "--window", "50", "--items", "6", "--output", str(tmp_path / "o")]
    assert main(["eval", "retention", *models, "--language-model", bare, *options]) == 0
    result = json.loads((tmp_path / "o" / "retention.json").read_text())
    first, fresh, moved = result["models"]
    assert [row["name"] for row in result["models"]] == ["bare llama", "fresh", "moved"]
    assert fresh["perplexity"] == pytest.approx(first["perplexity"], rel=1e-5)
    assert {task: entry["accuracy"] for task, entry in fresh["tasks"].items()} == {
        task: entry["accuracy"] for task, entry in first["tasks"].items()
    }
    assert moved["perplexity"] != pytest.approx(first["perplexity"], rel=1e-3)
    assert list(first["tasks"]) == list(TASKS)
    table = (tmp_path / "o" / "retention.md").read_text()
    assert f"| moved | {moved['perplexity']:.2f} |" in table
    assert "cloze (chance 25%; bare model not above it)" in table  # random weights know nothing
    assert table in capsys.readouterr().out + "\n"
    with Image.open(tmp_path / "o" / "retention.png") as drawing:
        assert len(drawing.convert("L").getcolors()) > 10


def test_scores_are_those_of_a_direct_computation(stages):
    model = HoVLEForConditionalGeneration.from_pretrained(stages[2]).eval()
    processor = HoVLEProcessor.from_pretrained(stages[2])
    items = [item for task in TASKS for item in draw_items(task, 8)]
    num_right = 0
    for item in items:
        context = processor.tokenizer(item.context, add_special_tokens=False)["input_ids"]
        nats = []
        for choice in item.choices:
            ending = processor.tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                chances = model(input_ids=torch.tensor([context + ending]), use_cache=False).logits[0].log_softmax(-1)
            nats.append(sum(float(chances[len(context) - 1 + place, token]) for place, token in enumerate(ending)))
        num_right += max(range(len(nats)), key=nats.__getitem__) == item.answer
    score = score_items(model, processor._encode_text, items, batch_size=7)
    assert (score.num_items, score.num_right) == (40, num_right)
    assert score.chance == pytest.approx((4 * 0.25 + 0.5) / 5)
    assert 0 < num_right < 40


@pytest.mark.parametrize("task", TASKS)
def test_items_have_one_right_ending_in_any_place_and_stay_the_same(task):
    items = draw_items(task, 60)
    assert len(items) == len({(item.context, item.choices) for item in items}) == 60
    assert items == draw_items(task, 60)
    assert items != draw_items(task, 60, seed=1)
    for item in items:
        assert len(set(item.choices)) == len(item.choices) == (2 if task == "agreement" else 4)
        assert all(choice.startswith(" ") and len(choice) > 1 for choice in item.choices)
    assert len({item.answer for item in items}) == (2 if task == "agreement" else 4)


def test_right_endings_are_right():
    endings = {item.context: item.choices[item.answer] for task in TASKS for item in draw_items(task, 10**6)}
    assert endings["The capital of Peru is"] == " Lima"
    assert endings["An oak is a kind of"] == " tree"
    assert endings["The opposite of cold is"] == " hot"
    assert endings["The opposite of hot is"] == " cold"
    agreement = [item for item in draw_items("agreement", 10**6) if item.context.startswith("The dogs ")]
    assert {item.choices[item.answer] for item in agreement} == {" are", " were", " have"}
    assert all(not item.context.endswith("s") for item in agreement)  # the nearer noun says otherwise


def test_above_chance_means_the_whole_interval_is():
    low, high = TaskScore(100, 50, 0.25).interval
    assert (low, high) == (
        pytest.approx(0.4038, abs=1e-4),
        pytest.approx(0.5962, abs=1e-4),
    )  # Wilson, from its formula
    assert TaskScore(100, 50, 0.25).is_above_chance
    assert not TaskScore(100, 28, 0.25).is_above_chance
    assert TaskScore(100, 100, 0.5).interval[1] == pytest.approx(1)


def test_endings_are_compared_by_their_whole_likelihood():
    """A model that only counts: every token has the same likelihood, so the shortest ending wins."""

    class Uniform(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, **kwargs):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 300)})

    items = [Item("a", (" long", " b"), 1), Item("abc", (" x", " yz", " uvw"), 0), Item("abc", (" x", " yz"), 1)]
    score = score_items(Uniform(), lambda text, at_start: list(text.encode()), items, batch_size=2)
    assert (score.num_right, score.chance) == (2, pytest.approx((0.5 + 1 / 3 + 0.5) / 3))
    assert math.isclose(score.accuracy, 2 / 3)


def test_wrong_input_is_refused_by_message(stages, tmp_path, make_tokenizer, capsys):
    bare, fresh, _ = map(str, stages)
    options = ["--num-tokens", "100", "--window", "50"]
    for arguments, message in (
        ([fresh, "--language-model", bare, *options, "--items", "0"], "--items must be at least 1, got 0"),
        (["missing/one/model", "--language-model", bare, *options], "No model in missing/one/model"),
        ([fresh, "--language-model", bare, *options, "--text", "no.txt"], "no text file no.txt"),
    ):
        assert main(["eval", "retention", *arguments]) == 1
        assert message in capsys.readouterr().err
    small = LlamaConfig(vocab_size=200, hidden_size=32, intermediate_size=32, num_attention_heads=2)
    small.num_hidden_layers = 1
    LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    assert main(["eval", "retention", fresh, "--language-model", str(tmp_path / "small"), *options]) == 1
    assert "has 200 rows in its table but the models' tokenizer gives the id" in capsys.readouterr().err


@pytest.fixture
def other_tokenizer(make_tokenizer):
    """As large as that of the stages, with two letters changed about: its ids fit the table and mean others."""
    tokenizer = make_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    return tokenizer


def test_a_bare_model_that_reads_other_ids_is_refused(stages, other_tokenizer, tmp_path, capsys):
    bare, fresh, _ = map(str, stages)
    other_tokenizer.save_pretrained(bare)
    options = ["--num-tokens", "100", "--window", "50", "--output", str(tmp_path / "o")]
    assert main(["eval", "retention", fresh, "--language-model", bare, *options]) == 1
    said = capsys.readouterr().err
    assert f"The tokenizer of {bare} reads 'The capital of " in said
    assert f", that of {fresh} as [" in said
    assert f"Name the language model {fresh} was built around" in said
    assert not (tmp_path / "o").exists()


def test_a_bare_model_that_differs_on_the_long_text_only_is_refused(stages, make_tokenizer, tmp_path, capsys):
    bare, fresh, _ = map(str, stages)
    (tmp_path / "text.txt").write_text("Qx Qx Qx " * 100)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["Qx"])
    tokenizer.save_pretrained(bare)
    options = ["--num-tokens", "100", "--window", "50", "--text", str(tmp_path / "text.txt")]
    assert main(["eval", "retention", fresh, "--language-model", bare, *options]) == 1
    assert f"makes other ids of {tmp_path / 'text.txt'} than that of {fresh}" in capsys.readouterr().err


def test_a_bare_model_without_a_tokenizer_is_refused(stages, tmp_path, capsys):
    bare, fresh, _ = map(str, stages)
    LlamaForCausalLM.from_pretrained(bare).save_pretrained(tmp_path / "alone")
    options = ["--num-tokens", "100", "--window", "50"]
    assert main(["eval", "retention", fresh, "--language-model", str(tmp_path / "alone"), *options]) == 1
    assert f"{tmp_path / 'alone'} gives no tokenizer" in capsys.readouterr().err


def test_models_with_different_tokenizers_are_refused(stages, tmp_path, capsys):
    bare, fresh, moved = map(str, stages)
    processor = HoVLEProcessor.from_pretrained(moved)
    processor.tokenizer.add_tokens(["capital"])
    processor.save_pretrained(moved)
    arguments = ["eval", "retention", fresh, moved, "--language-model", bare, "--num-tokens", "100", "--window", "50"]
    assert main(arguments) == 1
    assert "have no common bare model to be compared with" in capsys.readouterr().err
