"""`hovle eval retention`: perplexity and text tasks, the bare language model against each stage."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from places import ROOT
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.charts import load_pyplot
from hovle.cli import main
from hovle.eval.analyses.own_answers import encode_prompts, greedy_answers
from hovle.eval.analyses.retention import spread_rows
from hovle.eval.analyses.retention_report import answers_table, draw, table
from hovle.eval.analyses.text_tasks import TASKS, Item, TaskScore, draw_items, score_items
from hovle.language.likelihood import Row, log_likelihoods


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


@pytest.fixture
def words(tmp_path):
    """Options that name small texts: a prose file and replayed chats."""
    prose, chats = tmp_path / "prose.txt", tmp_path / "chats.jsonl"
    prose.write_text("\n\n".join(f"The {number} apples are on the table." for number in range(60)))
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "There are two, and a bus."}]
    chats.write_text("".join(json.dumps({"messages": [*turns, *turns]}) + "\n" for _ in range(12)))
    return ["--prose", str(prose), "--replay", str(chats), "--tokens", "200", "--window", "50", "--items", "6"]


def measured(capsys, *arguments):
    """What the command writes, and what it says."""
    assert main(["eval", "retention", *map(str, arguments)]) == 0, capsys.readouterr().err
    folder = Path(arguments[arguments.index("--output") + 1])
    return json.loads((folder / "retention.json").read_text()), capsys.readouterr().out


def test_the_bare_model_stands_beside_each_stage(stages, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hovle.eval.analyses.retention.fastest_dtype", lambda device: torch.float32)
    bare, *models = map(str, stages)
    output = tmp_path / "o"
    result, said = measured(capsys, *models, "--language-model", bare, *words, "--output", str(output))
    first, fresh, moved = result["models"]
    assert [row["name"] for row in result["models"]] == ["bare llama", "fresh", "moved"]
    assert list(result["texts"]) == ["text", "prose", "replay"]
    for name, facts in result["texts"].items():
        assert 150 <= facts["num_tokens"] <= 260
        assert facts["num_scored"] < facts["num_tokens"]
        assert fresh["texts"][name]["ratio"] == pytest.approx(1, rel=1e-5)
        assert moved["texts"][name]["ratio"] != pytest.approx(1, rel=1e-3)
        ratio = moved["texts"][name]["perplexity"] / first["texts"][name]["perplexity"]
        assert moved["texts"][name]["ratio"] == ratio
    assert {task: entry["accuracy"] for task, entry in fresh["tasks"].items()} == {
        task: entry["accuracy"] for task, entry in first["tasks"].items()
    }
    assert fresh["own_answers"]["ratio"] == pytest.approx(1, rel=1e-5)
    assert moved["own_answers"]["ratio"] > 1.001  # greedy answers are the likeliest of the model that gave them
    assert fresh["answers"] == first["answers"] != moved["answers"]
    assert len(first["answers"]) == 12
    assert len(result["own_answers"]["answers"]) == 50
    assert {"commit", "environment", "models"} <= set(result["provenance"])
    assert list(first["tasks"]) == list(TASKS)
    text = moved["texts"]["text"]
    table = (output / "retention.md").read_text()
    assert f"| moved | {text['perplexity']:.2f} ({text['ratio']:.3f}) |" in table
    assert "perplexity, prose: prose.txt (ratio)" in table
    assert "cloze (chance 25%; bare model not above it)" in table  # random weights know nothing
    assert table in said
    assert "| question | bare llama | moved |" in (output / "answers.md").read_text()
    with Image.open(output / "retention.png") as drawing:
        assert len(drawing.convert("L").getcolors()) > 10


def test_the_bare_models_answers_are_greedy_and_kept_for_the_next_run(stages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hovle.eval.analyses.retention.fastest_dtype", lambda device: torch.float32)
    bare, fresh, moved = map(str, stages)
    options = ["--language-model", bare, "--parts", "answers", "--output", str(tmp_path / "o")]
    result, said = measured(capsys, fresh, *options)
    assert (
        "Not measured: text\nNot measured: prose\nNot measured: replay (--replay FILE adds it)\nNot measured: tasks\n"
        in said
    )
    model, processor = LlamaForCausalLM.from_pretrained(bare).eval(), HoVLEProcessor.from_pretrained(fresh)
    for entry in result["own_answers"]["answers"][:5]:
        [prompt] = processor.encode_chats(
            [[{"role": "user", "content": entry["prompt"]}]], [], add_generation_prompt=True
        )
        assert 1 <= len(entry["ids"]) <= 64
        assert len(entry["ids"]) == 64 or entry["ids"][-1] == model.generation_config.eos_token_id
        with torch.no_grad():
            logits = model(torch.tensor([prompt + entry["ids"]])).logits[0, len(prompt) - 1 : -1]
        logits[:, processor.image_token_ids] = -torch.inf
        assert logits.argmax(-1).tolist() == entry["ids"]
    generated = []
    monkeypatch.setattr(
        "hovle.eval.analyses.retention.greedy_answers",
        lambda model, prompts, *rest: generated.append(len(prompts)) or greedy_answers(model, prompts, *rest),
    )
    again, _ = measured(capsys, moved, *options)
    assert generated == [12], "the bare model answered anew"
    assert again["own_answers"] == result["own_answers"]
    shaken = LlamaForCausalLM.from_pretrained(bare)
    torch.nn.init.normal_(shaken.lm_head.weight)
    shaken.save_pretrained(bare)
    other, _ = measured(capsys, moved, *options)
    assert generated == [12, 50, 12], "answers of another model were taken"
    assert other["own_answers"]["key"] != result["own_answers"]["key"]


def test_answers_of_prompts_of_different_lengths_are_those_of_each_alone(stages):
    model = HoVLEForConditionalGeneration.from_pretrained(stages[2]).eval()
    processor = HoVLEProcessor.from_pretrained(stages[2])
    prompts = encode_prompts(processor, ["Why?", "What is in the picture? A bus, a tree and two people who wait."])
    together = greedy_answers(model, prompts, max_new_tokens=8)
    assert together == [greedy_answers(model, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    model.generation_config.eos_token_id = [together[0][2], 9999]
    [cut, _] = greedy_answers(model, prompts, max_new_tokens=8)
    assert cut == together[0][: together[0].index(together[0][2]) + 1]


def test_likelihoods_do_not_depend_on_what_is_run_together(stages):
    model = HoVLEForConditionalGeneration.from_pretrained(stages[2]).eval()
    generator = torch.Generator().manual_seed(0)
    rows = [
        Row(torch.randint(3, 400, (length,), generator=generator).tolist(), given)
        for length, given in [(9, 1), (30, 12), (9, 8), (1, 1), (17, 3), (30, 1)]
    ]
    alone = [log_likelihoods(model, [row])[0] for row in rows]
    assert log_likelihoods(model, rows, tokens_at_once=1) == alone
    assert log_likelihoods(model, rows, tokens_at_once=64) == pytest.approx(alone, rel=1e-5)
    assert alone[3] == 0
    assert alone[1] < 0


def test_windows_of_long_texts_come_from_all_over_and_never_reach_into_the_next_document():
    documents = [[100 * number + place for place in range(25)] for number in range(1, 41)]
    rows = spread_rows(documents, 200, 10, "numbers")
    firsts = [row.ids[0] // 100 for row in rows]
    assert firsts == sorted(firsts)
    assert firsts[0] == 1
    assert firsts[-1] > 35
    assert 190 <= sum(len(row.ids) for row in rows) <= 210
    assert all(row.ids == list(range(row.ids[0], row.ids[0] + len(row.ids))) for row in rows)
    assert spread_rows(documents, 1000, 10, "numbers") == [
        Row(ids[start : start + 10], 1) for ids in documents for start in (0, 10, 20)
    ]
    with pytest.raises(ValueError, match=r"numbers has 1000 tokens, fewer than --tokens \(1001\)"):
        spread_rows(documents, 1001, 10, "numbers")


def test_results_of_the_first_format_are_still_drawn_and_later_ones_refused(tmp_path):
    old = json.loads((ROOT / "tests" / "golden" / "retention_format_1.json").read_text())
    drawn = table(old)
    assert "| distillation | 55.85 (3.340) | 40.6% |" in drawn
    assert answers_table(old) == "This result was measured without the models\x27 answers."
    draw(load_pyplot(), old, tmp_path / "old.png")
    with Image.open(tmp_path / "old.png") as drawing:
        assert len(drawing.convert("L").getcolors()) > 10
    with pytest.raises(ValueError, match="the result has format 3; this version of hovle reads up to 2"):
        table({**old, "format": 3})
    with pytest.raises(ValueError, match="no result of `hovle eval retention`"):
        table({"models": []})


def test_answers_stay_within_their_cells():
    rows = [{"name": "bare", "texts": {}, "answers": ["a | b\n\n*c*"]}, {"name": "m", "texts": {}, "answers": ["<b>"]}]
    made = answers_table({"format": 2, "texts": {}, "shown_prompts": ["Q?"], "models": rows})
    assert made.splitlines()[-1] == r"| Q? | a \| b<br><br>\*c\* | \<b\> |"


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
    score = score_items(model, processor._encode_text, items, tokens_at_once=7)
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
    score = score_items(Uniform(), lambda text, at_start: list(text.encode()), items, tokens_at_once=2)
    assert (score.num_right, score.chance) == (2, pytest.approx((0.5 + 1 / 3 + 0.5) / 3))
    assert math.isclose(score.accuracy, 2 / 3)


def test_wrong_input_is_refused_by_message(stages, tmp_path, make_tokenizer, capsys):
    bare, fresh, _ = map(str, stages)
    options = ["--num-tokens", "100", "--window", "50", "--parts", "text,tasks"]
    for arguments, message in (
        ([fresh, "--language-model", bare, *options, "--items", "0"], "--items must be at least 1, got 0"),
        (
            [fresh, "--language-model", bare, "--parts", "text,words"],
            "--parts: 'words' is none of text, prose, replay",
        ),
        ([fresh, "--language-model", bare, "--parts", "replay"], "--parts replay and --replay FILE"),
        ([fresh, "--language-model", bare, "--parts", "text", "--replay", "x"], "--parts replay and --replay FILE"),
        (
            [fresh, "--language-model", bare, "--parts", "replay", "--replay", "x.jsonl"],
            "--replay: no text file x.jsonl",
        ),
        ([fresh, "--language-model", bare, "--parts", "prose", "--prose", "x.txt"], "--prose: no text file x.txt"),
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
    assert "has 200 rows in its table but its tokenizer gives the id" in capsys.readouterr().err


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
    options = ["--parts", "text,tasks", "--num-tokens", "100", "--window", "50", "--output", str(tmp_path / "o")]
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
    options = ["--parts", "text,tasks", "--num-tokens", "100", "--window", "50", "--text", str(tmp_path / "text.txt")]
    assert main(["eval", "retention", fresh, "--language-model", bare, *options]) == 1
    assert f"makes other ids of {tmp_path / 'text.txt'} than that of {fresh}" in capsys.readouterr().err


def test_a_bare_model_without_a_tokenizer_is_refused(stages, tmp_path, capsys):
    bare, fresh, _ = map(str, stages)
    LlamaForCausalLM.from_pretrained(bare).save_pretrained(tmp_path / "alone")
    options = ["--parts", "text", "--num-tokens", "100", "--window", "50"]
    assert main(["eval", "retention", fresh, "--language-model", str(tmp_path / "alone"), *options]) == 1
    assert f"{tmp_path / 'alone'} gives no tokenizer" in capsys.readouterr().err


def test_models_with_different_tokenizers_are_refused(stages, tmp_path, capsys):
    bare, fresh, moved = map(str, stages)
    processor = HoVLEProcessor.from_pretrained(moved)
    processor.tokenizer.add_tokens(["capital"])
    processor.save_pretrained(moved)
    options = ["--parts", "text,tasks", "--num-tokens", "100", "--window", "50"]
    assert main(["eval", "retention", fresh, moved, "--language-model", bare, *options]) == 1
    assert f", that of {moved} as [" in capsys.readouterr().err
