import hashlib
import io
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from drawn_packages import write_drawings
from PIL import Image

from hovle.synthesis.colors import NAMED_COLORS, name_of
from hovle.synthesis.english import plural
from hovle.synthesis.shapes import SHAPE_NAMES
from hovle.synthesis.skill import AssetFolders
from hovle.synthesis.skills.scenes import Scenes, held_out_color
from hovle.synthesis.stamps import ICONS, PICTOGRAMS

NUM_SCENES = 240

NAMES = {*SHAPE_NAMES, *ICONS, *PICTOGRAMS}
MANY = {plural(name): name for name in NAMES}


@pytest.fixture(scope="module")
def skill(tmp_path_factory):
    return Scenes(AssetFolders(write_drawings(tmp_path_factory.mktemp("drawings"))))


@pytest.fixture(scope="module")
def samples(skill):
    drawn = [skill.draw(index, "train", 0) for index in range(NUM_SCENES)]
    for sample in drawn:
        sample.check()
    return drawn


class Seen:
    """What stands in a sample, read from its regions alone."""

    def __init__(self, sample):
        self.size = sample.size
        self.boxes = [region.box for region in sample.regions]
        parts = [region.text.partition(" ") for region in sample.regions]
        self.colors = [first if first in NAMED_COLORS else None for first, _, _ in parts]
        self.names = [
            rest if first in NAMED_COLORS else region.text
            for (first, _, rest), region in zip(parts, sample.regions, strict=True)
        ]

    def only(self, name):
        places = [place for place, other in enumerate(self.names) if other == name]
        assert len(places) == 1, f"{name} does not point out one of {self.names}"
        return places[0]

    def middle(self, place):
        left, top, right, bottom = self.boxes[place]
        return np.array([left + right, top + bottom]) / 2

    def side(self, place, other):
        """Which side of the other thing it is on, and no doubt about it."""
        across, down = self.middle(place) - self.middle(other)
        assert max(abs(across), abs(down)) >= 2 * min(abs(across), abs(down))
        a, b = self.boxes[place], self.boxes[other]
        if abs(across) > abs(down):
            assert a[2] < b[0] or b[2] < a[0]
            return "left" if across < 0 else "right"
        assert a[3] < b[1] or b[3] < a[1]
        return "above" if down < 0 else "below"

    def areas(self):
        return [(right - left) * (bottom - top) for left, top, right, bottom in self.boxes]


def truth(question, seen):  # one rule per type of question
    """The answer by another reading of the question than the one that made it."""
    text = question.text.rstrip("?.")
    kind = question.kind
    if kind == "count":
        (name,) = (
            MANY[many] for many in sorted(MANY, key=len) if re.search(rf"\b(many|the|of) {many}\b(?! \w+s\b)", text)
        )
        return str(seen.names.count(name))
    if kind == "count all":
        return str(len(seen.names))
    if kind == "count color":
        (color,) = (color for color in NAMED_COLORS if color in text.split())
        return str(seen.colors.count(color))
    if kind == "color":
        return seen.colors[seen.only(re.search(r".*the ([a-z ]+?)(?: have)?$", text).group(1))]
    if kind == "presence":
        described = re.search(r"\ban? (.+?)(?: in the picture)?$", text).group(1)
        there = {f"{color} {name}" for color, name in zip(seen.colors, seen.names, strict=True)} | set(seen.names)
        return "yes" if described in there else "no"
    if kind == "side":
        first, side, second = re.search(
            r"the (.+?) (?:stand )?(left of|right of|above|below) the (.+)$", text
        ).groups()
        return "yes" if seen.side(seen.only(first), seen.only(second)) == side.removesuffix(" of") else "no"
    if kind == "where":
        if found := re.search(r"Where is the (.+), seen from the (.+)$", text):
            first, second = found.groups()
        elif found := re.search(r"side of the (.+) is the (.+)$", text):
            second, first = found.groups()
        else:
            first, second = re.search(r"Is the (.+) left of, right of, above or below the (.+)$", text).groups()
        return seen.side(seen.only(first), seen.only(second))
    if kind == "neighbor":
        side, name = re.search(r"(left|right|above|below)(?: of)? the (.+)$", text).groups()
        place = seen.only(name)
        axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[side]
        beyond = [
            other for other in range(len(seen.names)) if sign * (seen.middle(other) - seen.middle(place))[axis] > 4
        ]
        assert len(beyond) == 1
        assert seen.side(beyond[0], place) == side
        return seen.names[beyond[0]]
    if kind == "between":
        first, second = (seen.only(name) for name in re.search(r"between the (.+) and the (.+)$", text).groups())
        side = seen.side(first, second)
        axis = 0 if side in ("left", "right") else 1
        low, high = sorted((seen.middle(first)[axis], seen.middle(second)[axis]))
        across = (seen.middle(first) + seen.middle(second))[1 - axis] / 2
        near = [
            place
            for place in range(len(seen.names))
            if low < seen.middle(place)[axis] < high and abs(seen.middle(place)[1 - axis] - across) < (high - low) / 4
        ]
        assert len(near) == 1
        return seen.names[near[0]]
    if kind in ("biggest", "smallest"):
        ordered = sorted(zip(seen.areas(), seen.names, strict=True), reverse=kind == "biggest")
        assert max(ordered[0][0], ordered[1][0]) >= 1.9 * min(ordered[0][0], ordered[1][0])
        return ordered[0][1]
    if kind == "corner":
        row, column = re.search(r"(top|bottom) (left|right) corner", text).groups()
        corner = np.array([0 if column == "left" else seen.size[0], 0 if row == "top" else seen.size[1]])
        return seen.names[
            min(range(len(seen.names)), key=lambda place: max(abs(seen.middle(place) - corner) / np.array(seen.size)))
        ]
    if kind in ("same kind", "all same"):
        return "yes" if len(set(seen.names)) == 1 else "no"
    if kind == "same color":
        first, second = seen.colors
        return "yes" if first == second else "no"
    assert kind == "more", kind
    more, fewer = re.search(r"(?:more|number of) (.+?) (?:larger than that of|than) (.+)$", text).groups()
    return "yes" if seen.names.count(MANY[more]) > seen.names.count(MANY[fewer]) else "no"


def test_every_answer_is_what_the_regions_say(samples):
    num_checked = Counter()
    for sample in samples:
        seen = Seen(sample)
        for question in sample.questions:
            if question.kind != "caption":
                assert question.answer == truth(question, seen), (question, sample.regions)
                num_checked[question.kind] += 1
    assert len(num_checked) >= 14
    assert min(num_checked.values()) >= 5


def test_things_stand_apart_and_within_the_picture(samples):
    for sample in samples:
        boxes = [region.box for region in sample.regions]
        for place, (left, top, right, bottom) in enumerate(boxes):
            for other in boxes[:place]:
                assert right < other[0] or other[2] < left or bottom < other[1] or other[3] < top


def test_painted_things_have_the_color_they_are_called(samples):
    for sample in samples[::4]:
        pixels = np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB"))
        for region in sample.regions:
            color = region.text.split(" ")[0]
            if color in NAMED_COLORS:
                left, top, right, bottom = region.box
                inside = pixels[top:bottom, left:right].reshape(-1, 3)
                names = Counter(name_of(pixel) for pixel in np.random.default_rng(0).choice(inside, 80))
                assert names[color] >= 0.15 * names.total(), (region, names)


def test_pictures_are_the_same_in_another_process(skill, samples):
    """Where strings have other hashes, so that sets have another order."""
    script = (
        "import hashlib, pathlib; from hovle.synthesis.skill import AssetFolders;"
        "from hovle.synthesis.skills.scenes import Scenes;"
        f"skill = Scenes(AssetFolders(pathlib.Path({str(skill.folders.root)!r})));"
        "print(hashlib.sha256(repr([skill.draw(i, 'train', 0) for i in range(30)]).encode()).hexdigest(), end='')"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert found.stdout == hashlib.sha256(repr(samples[:30]).encode()).hexdigest()


def test_parts_and_seeds_differ_and_pairs_held_out_are_never_learned(skill, samples):
    held_out = {f"{held_out_color(name)} {name}" for name in NAMES}
    learned = {region.text for sample in samples for region in sample.regions}
    tested = [skill.draw(index, "test", 0) for index in range(80)]
    assert not learned & held_out
    assert {region.text for sample in tested for region in sample.regions} & held_out
    assert not {sample.image for sample in samples} & {sample.image for sample in tested}
    assert skill.draw(3, "train", 1).image != samples[3].image


def test_no_answer_is_much_more_frequent_than_the_others(samples):
    answers = defaultdict(Counter)
    for sample in samples:
        for question in sample.questions:
            answers[question.kind][question.answer] += 1
    for kind, counts in answers.items():
        if kind != "caption" and counts.total() >= 60:
            yes_or_no = set(counts) <= {"yes", "no"}
            assert counts.most_common(1)[0][1] <= (0.65 if yes_or_no else 0.4) * counts.total(), (kind, counts)
    assert set(answers["count"]) == set("0123456789")
