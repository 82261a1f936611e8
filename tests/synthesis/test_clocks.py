import io
import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from hovle.synthesis.clock_faces import Look, Time, draw_face, looks
from hovle.synthesis.skill import AssetFolders
from hovle.synthesis.skills.clocks import Clocks, in_words


@pytest.fixture(scope="module")
def samples():
    skill = Clocks(AssetFolders(None))
    drawn = [skill.draw(index, "train", 0) for index in range(160)]
    for sample in drawn:
        sample.check()
    return drawn


@pytest.mark.parametrize(
    ("time", "words"),
    [
        (Time(3, 0), "three o'clock"),
        (Time(3, 15), "quarter past three"),
        (Time(12, 30), "half past twelve"),
        (Time(10, 35), "twenty-five to eleven"),
        (Time(12, 55), "five to one"),
    ],
)
def test_times_are_said_as_people_say_them(time, words):
    assert in_words(time) == words


def test_a_time_between_five_minutes_is_not_put_in_words():
    with pytest.raises(ValueError, match="3:07"):
        in_words(Time(3, 7))


def test_hands_point_where_the_time_says():
    """Ink far out lies under the minute hand alone, ink near the middle under both."""
    for hour, minute in ((3, 0), (6, 20), (9, 35), (1, 50)):
        image, (left, top, right, bottom) = draw_face(
            Time(hour, minute), Look("none", "line", "bare"), (224, 224), _Steady(7)
        )
        gray = np.asarray(image.convert("L")).astype(float)
        ink = abs(gray - np.median(gray)) > 40
        x, y = (left + right) / 2, (top + bottom) / 2
        radius = (right - left) / 2
        rows, columns = np.nonzero(ink)
        reach = np.hypot(columns - x, rows - y) / radius
        turns = (np.arctan2(columns - x, y - rows) / (2 * math.pi)) % 1
        far = turns[reach > 0.58]
        assert len(far) > 5
        assert _apart(far, minute / 60).max() < 0.03
        near = turns[(reach > 0.2) & (reach < 0.35)]
        for turn in (minute / 60, (hour + minute / 60) / 12):
            assert _apart(near, turn).min() < 0.02


class _Steady(random.Random):
    """Never draws a second hand, which chance below a quarter would give, nor a face in colors."""

    def random(self):
        return 0.45


def _apart(turns, turn):
    return np.abs((turns - turn + 0.5) % 1 - 0.5)


def test_answers_agree_with_the_time_a_clock_was_drawn_with(samples):
    for sample in samples:
        (region,) = sample.regions
        hour, minute = region.text.split(":")
        for question in sample.questions:
            if question.kind == "time":
                assert question.answer == region.text
            elif question.kind == "hour":
                assert question.answer == hour
            elif question.kind == "minutes":
                assert question.answer == str(int(minute))
            elif question.kind == "check":
                assert (question.answer == "yes") == (f" {region.text}?" in question.text)
            elif question.kind == "half":
                assert (question.answer == "before") == (int(minute) < 30)


def test_looks_of_tests_are_never_learned_but_made_of_learned_parts(samples):
    learned, tested = looks("train"), looks("test")
    assert not set(learned) & set(tested)
    for part in ("marks", "hands", "shape"):
        assert {getattr(look, part) for look in tested} <= {getattr(look, part) for look in learned}
    ids = {source for sample in samples for source in sample.source_ids}
    assert not ids & {f"look:{look.name}" for look in tested}


def test_no_answer_is_much_more_frequent_than_the_others(samples):
    answers = defaultdict(Counter)
    for sample in samples:
        for question in sample.questions:
            answers[question.kind][question.answer] += 1
    for kind, counts in answers.items():
        if kind != "caption":
            most = 0.66 if len(counts) == 2 else 0.25
            assert counts.most_common(1)[0][1] <= most * counts.total(), (kind, counts)
    assert len({answer.split(":")[0] for answer in answers["time"]}) >= 12


def test_pictures_depend_on_number_part_and_seed_alone(samples):
    skill = Clocks(AssetFolders(None))
    assert skill.draw(5, "train", 0) == samples[5]
    assert skill.draw(5, "test", 0).image != samples[5].image
    assert skill.draw(5, "train", 1).image != samples[5].image
    assert Image.open(io.BytesIO(samples[5].image)).size == samples[5].size
