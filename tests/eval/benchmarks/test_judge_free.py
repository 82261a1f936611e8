"""Rules in the place of judges."""

import importlib.util

import pytest

from hovle.eval.benchmarks.suites import TASKS_FOLDER


@pytest.fixture(scope="module")
def rules():
    path = TASKS_FOLDER / "judge_free" / "judge_free_scores.py"
    spec = importlib.util.spec_from_file_location("judge_free_scores", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("expected", "said", "score"),
    [
        ("-1<AND>-5", "x = -1 or x = -5", 1.0),
        ("-1<AND>-5", "x = -5", 0.5),
        ("4<OR>four", "Four birds.", 1.0),
        ("4<OR>four", "forty", 0.0),
        ("a<AND>b<OR>c", "c", 1.0),
        ("ice cream", "Ice-cream", 0.0),
        ("1.75", "It costs $1.75.", 0.0),
        ("$1.75", "It costs $1.75.", 1.0),
        ("red", "", 0.0),
    ],
)
def test_mm_vet_counts_the_expected_phrases(rules, expected, said, score):
    assert rules.mmvet_results({"answer": expected}, [said]) == {"exact_match": score}


@pytest.mark.parametrize(
    ("truth", "said", "correct"),
    [
        ("1", "Yes.", True),
        ("0", "No, and yes to the other", True),
        ("1", "Maybe", False),
        ("0", "Nothing known", False),
    ],
)
def test_hallusion_bench_reads_the_first_yes_or_no(rules, truth, said, correct):
    doc = {"category": "VD", "subcategory": "x", "set_id": 0, "figure_id": 1, "question_id": 2, "gt_answer": truth}
    assert rules.hallusion_results(doc, [said])["average"]["correct"] is correct


CHOICES = ["red", "dark red", "blue"]


@pytest.mark.parametrize(
    ("said", "choices", "kind", "precision", "expected"),
    [
        ("(C)", CHOICES, "text", 0, "blue"),
        ("B", CHOICES, "text", 0, "dark red"),
        ("C. blue", CHOICES, "text", 0, "blue"),
        ("The answer is blue.", CHOICES, "text", 0, "blue"),
        ("dark red", CHOICES, "text", 0, None),  # names two of them
        ("A boat", CHOICES, "text", 0, "red"),  # a letter at the start counts, as the prompt asks for one
        ("Z", CHOICES, "text", 0, None),
        ("1,234 apples", None, "integer", 0, "1234"),
        ("3 + 4 = 7.0", None, "integer", 0, "7"),
        ("none", None, "integer", 0, None),
        ("about 1.449", None, "float", 1, "1.4"),
        ("from [1, 2] to [2007,2008]", None, "list", 0, "[2007, 2008]"),
        ("[a, b]", None, "list", 0, "[a, b]"),
        ("1 and 2", None, "list", 0, None),
    ],
)
def test_math_vista_reads_choices_numbers_and_lists(rules, said, choices, kind, precision, expected):
    assert rules.read_answer(said, choices, kind, precision) == expected


def test_math_vista_compares_with_the_expected_answer(rules):
    doc = {"precision": 2.0, "choices": None, "answer_type": "float", "answer": "0.33"}
    assert rules.mathvista_results(doc, ["0.333"]) == {"exact_match": 1.0}
    assert rules.mathvista_results(doc, ["no idea"]) == {"exact_match": 0.0}
