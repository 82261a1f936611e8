"""The reading tour of CONTRIBUTING.md stays one that a newcomer can finish."""

import re

from places import ROOT

TOUR = re.findall(r"^\d+\. `(\S+)`: ", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)


def test_the_tour_has_eight_files_of_fewer_than_2500_lines_together():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in TOUR}
    assert len(lines) == 8
    assert sum(lines.values()) < 2500, lines
