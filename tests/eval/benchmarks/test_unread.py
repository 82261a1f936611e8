"""Answers that say what is expected in a form that a benchmark's rules do not read."""

import pytest

from hovle.eval.benchmarks.unread import says, unread_answers


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes.", "yes"),
        ("Yes, there is a dog.", "Yes"),
        ("**No**", "no"),
        ("The answer is B", "B"),
        ("The correct answer is: (B).", "B"),
        ("Answer: B", "B"),
        ("(B)", "B"),
        ("B. a bus", "B"),
        ("B) a bus", "B"),
        ("Option B", "B"),
        ("1,200", "1200"),
        ("1,200,000.50", "1200000.5"),
        ("$1,200", "1200"),
        ("12 %", "12"),
        ("The answer is 7.", "7"),
        ('"A red bus".', "a red bus"),
    ],
)
def test_an_answer_says_what_is_expected_whatever_stands_around_it(answer, expected):
    assert says(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A bus", "A"),
        ("B", "A"),
        ("Bus", "B"),
        ("The answer is C", "B"),
        ("no", "yes"),
        ("I do not know", "no"),
        ("nothing", "no"),
        ("12", "1200"),
        ("1,20", "120"),
        ("a bus", "a red bus"),
        ("", ""),
        ("", "A"),
    ],
)
def test_another_answer_does_not(answer, expected):
    assert not says(answer, expected)


def sample(answer: str, target, score) -> dict:
    return {"resps": [[answer]], "target": target, "score": score}


def test_only_answers_that_count_as_wrong_are_counted():
    samples = [
        sample("The answer is B", "B", 0.0),
        sample("(B)", "B", {"score": 0, "category": "x"}),
        sample("Yes.", "['yes', 'yeah']", False),
        sample("(B)", "B", 1.0),  # the rules read it
        sample("C", "B", 0.0),  # wrong in any form
        sample("B", "B", {"prediction": "B"}),  # it does not say
    ]
    shown = unread_answers(samples, ["score"])
    assert shown.startswith("3 of 6 answers say what is expected in a form that the harness's rules do not read")
    assert shown.endswith("such as 'The answer is B'")
    assert unread_answers(samples[3:], ["score"]) == ""
    assert unread_answers(samples, ["other"]) == ""
    assert unread_answers(samples, ["score"], lambda value: 0.0).startswith("4 of 6")
