"""Table 7 of the paper from its own numbers."""

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


def test_the_papers_numbers_give_the_papers_table():
    """The shares are of whole pictures: counted back, scored and printed, they are the printed ones."""
    rows = {}
    for method, (steps, _, shares) in PAPER.items():
        tags = [task for task, count in zip(TASKS, COUNTS, strict=True) for _ in range(count)]
        correct = [
            i < round(share * n) for share, n in zip(shares, COUNTS, strict=True) for i in range(n)
        ]
        found = scores(tags, correct)
        rows[method.strip() + " " * method.count(" ")] = (
            steps,
            {name: Interval(each.mean, None, None, each.n) for name, each in found.items()},
        )
    lines = table(rows).splitlines()
    assert (
        lines[0]
        == "| method (steps) | overall | single | two | counting | colors | position | color attr |"
    )
    for line, (method, (steps, overall, shares)) in zip(lines[2:], PAPER.items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == f"{method} ({steps})"
        for cell, share in zip(cells[1:], (overall, *shares), strict=True):
            assert abs(float(cell) - share) <= 0.00101  # both are rounded
