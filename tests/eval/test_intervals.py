"""Scores read from per-document results, and their confidence intervals."""

import math

import numpy as np
import pytest

from hovle.eval.intervals import documents, f1, hallusion, mme, mmstar, ocrbench, true_false, wilson


def unused(values):
    raise AssertionError("the aggregation is not needed here")


def test_wilsons_interval_has_its_textbook_values():
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)


def test_a_share_of_right_answers_gets_wilsons_interval():
    units = documents([1.0, 0.0, 1, {"score": 1.0}], unused)
    assert units.score == 0.75
    assert units.interval() == wilson(3, 4)


def test_a_mean_of_graded_answers_gets_about_the_normal_interval():
    grades = np.random.default_rng(3).choice([0.0, 0.3, 0.6, 1.0], size=800).tolist()
    units = documents(grades, unused)
    half = 1.96 * np.std(grades) / math.sqrt(len(grades))
    assert units.interval() == pytest.approx((np.mean(grades) - half, np.mean(grades) + half), abs=0.1 * half)
    assert units.interval() == documents(grades, unused).interval()  # the seed is fixed


def test_what_is_no_number_is_scored_by_the_harness_alone():
    values = [{"pred": "A", "answer": "A"}, {"pred": "B", "answer": "A"}]
    assert documents(values, lambda rows: sum(row["pred"] == row["answer"] for row in rows) / len(rows)).score == 0.5


def test_f1_is_that_of_the_harness_whatever_is_answered(lmms_eval):
    from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score

    said, truth = ["yes", "yes", "no", "maybe", "yes."], ["yes", "no", "yes", "yes", "no"]
    values = [{"prediction": a, "ground_truth": b} for a, b in zip(said, truth, strict=True)]
    units = f1(values, unused)
    assert units.score == pytest.approx(2 * 1 / (2 * 1 + 1 + 1))  # "maybe" is no miss
    assert units.score == pytest.approx(pope_aggregate_f1_score(values))
    assert f1(values[3:], unused).score == pope_aggregate_f1_score(values[3:]) == 0
    low, high = units.interval()
    assert 0 <= low < units.score < high <= 1


def test_mme_adds_accuracy_and_pairs_over_categories():
    def row(category, picture, score):
        return {"category": category, "question_id": picture, "score": score}

    units = mme([row("count", 1, 1.0), row("count", 1, 0.0), row("count", 2, 1.0), row("count", 2, 1.0),
                 row("OCR", 1, 1.0), row("OCR", 1, 1.0)], unused)  # fmt: skip
    assert units.score == pytest.approx((50 + 200) / 2 + 200)
    low, high = units.interval()
    assert low == pytest.approx(50 + 200)  # only "count" can vary
    assert high == pytest.approx(200 + 200)
    with pytest.raises(ValueError, match="two questions about each picture, but 7 has another number"):
        mme([row("count", 7, 1.0)], unused)


def test_mmstar_weighs_its_categories_alike():
    values = [{"l2_category": "a", "score": 1.0}] * 3 + [{"l2_category": "b", "score": 0.0}]
    assert mmstar(values, unused).score == 0.5


def test_hallusion_takes_the_mean_of_answers_questions_and_pictures():
    def row(figure, question, correct):
        return {"category": "VD", "subcategory": "x", "set_id": "0", "figure_id": figure, "question_id": question,
                "correct": correct}  # fmt: skip

    units = hallusion([row(0, 0, True), row(1, 0, False), row(0, 1, True), row(1, 1, True)], unused)
    assert units.score == pytest.approx((3 / 4 + 1 / 2 + 1 / 2) / 3)


def test_figures_of_the_harness_in_other_units_are_compared_in_them():
    assert ocrbench([{"score": 1}, {"score": 0}], unused).harness_factor == 0.002
    units = true_false([{"true_false": True}, {"true_false": False}], unused)
    assert (units.score, units.harness_factor) == (0.5, 100)
