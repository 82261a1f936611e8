"""`hovle demo`: twelve questions are asked, and answers shown as what they are."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from transformers import LlamaConfig, LlamaForCausalLM

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor, cli, packaged
from hovle.charts import load_pyplot
from hovle.demo import command
from hovle.demo.answers import RIGHT, WRONG, Answer, draw_answers
from hovle.demo.questions import load_questions


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_tokenizer):
    """Folder of a HoVLE that has learnt nothing."""
    folder = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(0)
    text = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**text, num_hidden_layers=1, num_key_value_heads=2)).save_pretrained(folder / "llm")
    make_tokenizer().save_pretrained(folder / "llm")
    untrained = HoVLEForConditionalGeneration.from_language_model(folder / "llm", 1, image_size=56)
    untrained.save_pretrained(folder)
    HoVLEProcessor.from_language_model(folder / "llm", untrained.config, max_tiles=4).save_pretrained(folder)
    return folder


def has_color(path, color: str) -> bool:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    return bool((pixels == ImageColor.getrgb(color)).all(axis=-1).any())


def test_twelve_questions_are_answered_and_drawn(model, tmp_path, monkeypatch, capsys):
    shown = []

    def answer(model, processor, questions, **options):
        shown.extend((question.text, question.picture) for question in questions)
        return answer_questions(model, processor, questions, **options)

    answer_questions = command.answer_questions
    monkeypatch.setattr(command, "answer_questions", answer)
    assert cli.main(["demo", "--model", str(model), "--picture", str(tmp_path / "demo.png")]) == 0
    asked = load_questions()
    assert shown == [(item.question.text, item.picture) for item in asked]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(asked) + 2
    for item, line in zip(asked, lines, strict=False):
        assert line.startswith(item.title)
        assert f"{item.question.text} " in line
        assert item.question.answer in line  # nothing learnt, nothing right
    assert lines[-2].startswith("0 of 12 answers are right")
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 900
    assert has_color(tmp_path / "demo.png", WRONG)
    assert not has_color(tmp_path / "demo.png", RIGHT)


def test_wrong_answers_are_shown_as_wrong_and_right_ones_as_right(model, tmp_path, monkeypatch, capsys):
    asked = load_questions()
    said = [f" {item.question.answer.upper()}." for item in asked]
    said[3] = "a purple elephant"
    monkeypatch.setattr(command, "answer_questions", lambda *_, **__: said)
    assert cli.main(["demo", "--model", str(model), "--picture", str(tmp_path / "demo.png")]) == 0
    out = capsys.readouterr().out
    assert out.count(" right\n") == 11
    assert f"-> a purple elephant    wrong, it is {asked[3].question.answer}\n" in out
    assert "11 of 12 answers are right" in out
    assert has_color(tmp_path / "demo.png", RIGHT)
    assert has_color(tmp_path / "demo.png", WRONG)


def test_all_right_answers_leave_nothing_red(tmp_path):
    answers = [Answer(item.picture, item.question.text, "yes", "yes", is_right=True) for item in load_questions()]
    draw_answers(load_pyplot(), tmp_path / "demo.png", answers, "all", columns=5)
    assert has_color(tmp_path / "demo.png", RIGHT)
    assert not has_color(tmp_path / "demo.png", WRONG)


@pytest.mark.parametrize(
    "text", ["", "$\\frac{", "costs $5, not $6", "\x1b[2J\n\n\x00", "\u56fe\u7247 \U0001f600", "on and " * 99]
)
def test_whatever_a_model_says_is_shown_on_a_line_and_drawn(text, tmp_path):
    answer = Answer(Image.new("RGB", (8, 8)), "what is it?", text, "red", is_right=False)
    assert 0 < len(answer.said) <= 80
    assert answer.said.isprintable()
    draw_answers(load_pyplot(), tmp_path / "demo.png", [answer], "one")
    assert has_color(tmp_path / "demo.png", WRONG)


def test_without_shipped_weights_the_advice_is_how_to_make_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packaged, "SHIPPED", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("hovle demo: smol: no trained weights are in this package yet")
    assert "hovle train smol/letters" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--model", "nowhere"], "No model in nowhere"), (["--picture", "nowhere/demo.png"], "no folder nowhere")],
)
def test_what_is_missing_is_told_in_a_line(model, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "answer_questions", lambda *_, **__: pytest.fail("nothing is to be asked"))
    assert cli.main(["demo", "--model", str(model), *arguments]) == 1
    assert message in capsys.readouterr().err
