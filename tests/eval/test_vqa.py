"""Scoring by free generation."""

import pytest
import torch
from PIL import Image

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.assets.vqa_questions import Question, describe_wording
from hovle.eval.vqa import answer_questions, exact_match, with_blank_pictures, with_shuffled_pictures


def make_questions(count: int) -> list[Question]:
    colours = ["red", "green", "blue", "white", "black"]
    return [
        Question(f"what colour {index}?", colours[index % 5], Image.new("RGB", (40 + index, 30), colours[index % 5]))
        for index in range(count)
    ]


def test_exact_match_forgives_case_and_a_full_stop_only():
    questions = [Question("?", "red", None)] * 4
    assert exact_match(["Red.", " red", "dark red", "blue"], questions) == 0.5


def test_blank_pictures_keep_size_and_question():
    question, blank = make_questions(3)[2], with_blank_pictures(make_questions(3))[2]
    assert (blank.text, blank.answer, blank.picture.size) == (question.text, question.answer, question.picture.size)
    assert blank.picture.getextrema() == ((255, 255),) * 3


def test_shuffled_pictures_leave_no_picture_in_place_and_lose_none():
    questions = make_questions(20)
    shuffled = with_shuffled_pictures(questions)
    assert [item.text for item in shuffled] == [item.text for item in questions]
    assert all(old.picture is not new.picture for old, new in zip(questions, shuffled, strict=True))
    assert {id(item.picture) for item in shuffled} == {id(item.picture) for item in questions}


@pytest.fixture
def answerer(make_tokenizer, tiny_config):
    torch.manual_seed(0)
    config = tiny_config()
    model = HoVLEForConditionalGeneration(config).eval()
    return model, HoVLEProcessor.from_language_model(make_tokenizer(), config, max_tiles=3)


def test_the_same_words_about_the_same_picture_are_answered_once(answerer):
    model, processor = answerer
    questions = with_blank_pictures([*make_questions(3), *make_questions(3)])
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    together = answer_questions(model, processor, questions, batch_size=1, max_new_tokens=1)
    handle.remove()
    assert together[:3] == together[3:]
    assert len(calls) == 3


def test_answers_do_not_depend_on_the_batch(answerer):
    model, processor = answerer
    questions = make_questions(5)
    together = answer_questions(model, processor, questions, batch_size=5)
    assert together == answer_questions(model, processor, questions, batch_size=1)
    assert len(set(together)) > 1  # random weights still tell the prompts apart


def test_prompts_of_like_length_share_a_batch(answerer, monkeypatch):
    model, processor = answerer
    sizes = [(8, 8), (24, 8), (8, 8), (24, 8)]
    questions = [Question("?", "yes", Image.new("RGB", size, (50 * n, 9, 9))) for n, size in enumerate(sizes)]
    widths = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **inputs: widths.append(inputs["input_ids"].shape) or generate(**inputs)
    )
    answers = answer_questions(model, processor, questions, batch_size=2, max_new_tokens=2)
    assert [rows for rows, _ in widths] == [2, 2]
    assert widths[0][1] > widths[1][1]
    monkeypatch.undo()
    assert answers == [answer_questions(model, processor, [item], max_new_tokens=2)[0] for item in questions]


def test_the_wording_is_learned_from_training_questions_only():
    train = [Question("round?", "yes", 1), Question("round?", "yes", 2), Question("round?", "no", 2)]
    train += [Question("colour?", "red", 1)]
    test = [Question("round?", "yes", 8), Question("round?", "no", 8), Question("colour?", "red", 9)]
    test += [Question("colour?", "blue", 9), Question("what?", "box", 7)]
    assert describe_wording(train, test) == {
        "train_questions": 4,
        "test_questions": 5,
        "train_pictures": 2,
        "test_pictures": 3,
        "yes_no_share": 0.4,
        "guessed_share": 0.4,
    }
