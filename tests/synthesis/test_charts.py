import io
import random
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from hovle.synthesis.chart_data import draw_chart_data, draw_table_data
from hovle.synthesis.chart_questions import ask_chart, ask_table
from hovle.synthesis.skill import AssetFolders
from hovle.synthesis.skills.charts import Charts

FORMS = ("bar", "horizontal bar", "line", "pie")


@pytest.fixture(scope="module")
def skill():
    return Charts(AssetFolders(None))


@pytest.fixture(scope="module")
def samples(skill):
    drawn = [skill.draw(index, "train", 0) for index in range(24)]
    for sample in drawn:
        sample.check()
    return drawn


@pytest.fixture(scope="module")
def tested(skill):
    return [skill.draw(index, "test", 0) for index in range(10)]


def truth(question, data):
    """The answer by another reading of the question than the one that made it."""
    text, values = question.text, dict(zip(data.labels, data.values, strict=True))
    named = sorted((label for label in values if re.search(rf"\b{label}\b", text)), key=text.index)
    if question.kind in ("largest", "smallest"):
        ordered = sorted(values, key=values.__getitem__, reverse=question.kind == "largest")
        assert abs(values[ordered[0]] - values[ordered[1]]) >= 0.04 * max(values.values())
        return ordered[0]
    if question.kind == "value":
        return f"{values[named[-1]]}{'%' if data.form == 'pie' else ''}"
    if question.kind == "how many":
        return str(len(values))
    if question.kind == "above":
        threshold = int(re.search(r"\d+", text).group())
        assert min(abs(value - threshold) for value in values.values()) >= 0.04 * max(values.values())
        return str(sum(value > threshold for value in values.values()))
    if question.kind == "compare":
        return "yes" if values[named[0]] > values[named[1]] else "no"
    if question.kind == "trend":
        steps = np.diff(data.values)
        assert (steps > 0).all() or (steps < 0).all()
        return "up" if steps[0] > 0 else "down"
    if question.kind == "change":
        return "rise" if values[named[1]] > values[named[0]] else "fall"
    if question.kind == "title":
        return data.title
    if question.kind == "color":
        return data.colors[data.labels.index(named[-1])]
    if question.kind == "by color":
        (color,) = (color for color in data.colors if re.search(rf"\b{color}\b", text))
        return data.labels[data.colors.index(color)]
    assert question.kind == "form", question.kind
    return "bar chart" if "bar" in data.form else f"{data.form} chart"


def test_every_answer_follows_from_the_numbers():
    kinds = Counter()
    for number in range(600):
        rng = random.Random(number)
        data = draw_chart_data(FORMS[number % 4], "train" if number % 8 < 4 else "test", rng)
        for question in ask_chart(data, 9, rng):
            assert question.answer == truth(question, data), (question, data)
            kinds[question.kind] += 1
    assert len(kinds) == 12


def test_every_answer_follows_from_the_table():
    for number in range(300):
        rng = random.Random(number)
        data = draw_table_data("train" if number % 2 else "test", rng)
        for question in ask_table(data, 9, rng):
            text, answer = question.text, question.answer
            columns = [column for column in data.columns if re.search(rf"\b{column}\b", text)]
            rows = [row for row, label in enumerate(data.labels) if re.search(rf"\b{label}\b", text)]
            if question.kind == "cell":
                assert int(answer) in {data.cells[row][data.columns.index(columns[0])] for row in rows}
            elif "column" in question.kind:
                place = data.columns.index(columns[0])
                pick = max if "largest" in question.kind else min
                extreme = pick(line[place] for line in data.cells)
                assert data.cells[data.labels.index(answer)][place] == extreme
            elif question.kind == "row presence":
                assert (answer == "yes") == bool(rows)
            elif question.kind == "rows":
                assert answer == str(len(data.cells))
            elif question.kind == "nth row":
                place = ("first", "second", "third", "fourth", "fifth", "sixth").index(
                    re.search(r"the (\w+) row", text).group(1)
                )
                assert answer == data.labels[place]


def test_shares_of_a_pie_add_up_and_differ():
    for number in range(200):
        data = draw_chart_data("pie", "train", random.Random(number))
        ordered = np.sort(data.values)
        assert ordered.sum() == 100
        assert np.diff(ordered).min() >= 5


def test_places_of_texts_hold_ink_and_lie_apart(samples):
    num_regions = 0
    for sample in samples:
        gray = np.asarray(Image.open(io.BytesIO(sample.image)).convert("L")).astype(int)
        for place, region in enumerate(sample.regions):
            left, top, right, bottom = region.box
            assert bottom - top >= 7, region
            assert np.ptp(gray[top:bottom, left:right]) > 60, region
            for other in sample.regions[:place]:
                a, b = region.box, other.box
                shared = (min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1]))
                assert min(shared) <= 2, (region, other)
            num_regions += 1
    assert num_regions >= 5 * len(samples)


def test_tests_share_no_word_and_no_tool_with_training(skill, samples, tested):
    learned, unseen = ({source for sample in part for source in sample.source_ids} for part in (samples, tested))
    assert not learned & unseen
    assert "tool:matplotlib" in learned
    assert "tool:vega" in unseen


def test_pictures_are_drawn_the_same_again(skill, samples, tested):
    assert skill.draw(7, "train", 0) == samples[7]
    assert skill.draw(7, "test", 0) == tested[7]
    assert skill.draw(7, "train", 1).image != samples[7].image


def test_no_answer_is_much_more_frequent_than_the_others():
    answers = defaultdict(Counter)
    for number in range(1500):
        rng = random.Random(number)
        for question in ask_chart(draw_chart_data(FORMS[number % 4], "train", rng), 6, rng):
            answers[question.kind][question.answer] += 1
    for kind, counts in answers.items():
        most = {2: 0.6, 3: 0.55}.get(len(counts), 0.45)
        assert counts.most_common(1)[0][1] <= most * counts.total(), (kind, counts)


def test_titles_are_written_in_the_held_out_tool_too(tested):
    for sample in tested:
        gray = np.asarray(Image.open(io.BytesIO(sample.image)).convert("L")).astype(int)
        assert (gray < 110).sum() > 60, sample.questions  # a chart whose text vanished has colored areas only
        if any(question.kind == "title" for question in sample.questions):
            assert (gray[:30] < 140).sum() > 20
