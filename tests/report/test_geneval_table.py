"""Table 7 of the paper, written from its own numbers."""

import pytest

from oss_exp.evaluation.psnr import Interval
from oss_exp.geneval.rules import TASKS, scores
from oss_exp.report.geneval import table

PAPER = {  # arXiv 2503.21774, table 7: overall, then the six
    "FM": (100, 0.649, (0.989, 0.803, 0.722, 0.774, 0.220, 0.390)),
    "FM ": (10, 0.590, (0.963, 0.727, 0.663, 0.668, 0.213, 0.310)),
    "DDIM": (10, 0.623, (0.971, 0.742, 0.694, 0.758, 0.22, 0.353)),
    "GITS": (10, 0.604, (0.981, 0.732, 0.678, 0.697, 0.210, 0.325)),
    "DM": (10, 0.643, (0.971, 0.788, 0.719, 0.777, 0.188, 0.415)),
    "OSS-ave": (10, 0.645, (0.981, 0.775, 0.728, 0.777, 0.195, 0.415)),
}
COUNTS = (320, 396, 320, 376, 400, 400)  # four pictures of each prompt


def scored(shares: tuple[float, ...]) -> dict[str, Interval]:
    """Return the scores of verdicts of which these shares of each task are correct."""
    tags = []
    correct = []
    for task, share, count in zip(TASKS, shares, COUNTS, strict=True):
        tags += [task] * count
        correct += [i < round(share * count) for i in range(count)]
    values = scores(tags, correct).items()
    return {name: Interval(value.mean, None, None, value.n) for name, value in values}


def test_the_papers_numbers_give_the_papers_table():
    rows = {method: (steps, scored(shares)) for method, (steps, _, shares) in PAPER.items()}

    header, _, *lines = table(rows).splitlines()

    titles = "method (steps) | overall | single | two | counting | colors | position | color attr"
    assert header == f"| {titles} |"
    for line, (method, (steps, overall, shares)) in zip(lines, PAPER.items(), strict=True):
        label, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert label == f"{method} ({steps})"
        assert [float(cell) for cell in cells] == pytest.approx(
            (overall, *shares), rel=0, abs=0.00101
        )  # both are rounded
