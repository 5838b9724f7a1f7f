"""Table 7 on our own scenes: does a picture of 10 steps still show what was asked for?

python -m experiments.table_7.run

First the ceiling: the verdicts on scenes that show exactly what is wished. Then flux_scenes with 100 steps and
with 10 by every strategy, four pictures of each of 553 prompts. Goes on where it was stopped.
"""

from __future__ import annotations

import torch

from experiments.common import configuration, finished, keep
from oss_exp.evaluation.detectors import FashionDetector
from oss_exp.report.geneval import table
from oss_exp.tasks.captioned import SIDE
from oss_exp.tasks.data import fashion_mnist
from oss_exp.tasks.fit_detector import ceiling
from oss_exp.tasks.scenes import Wardrobe

STRATEGIES = "stepsize=[fm,ddim,gits,dm,oss_ave,oss_shared,oss_fit]"
# An analytic start is from one mean for all prompts, and each has its own.
SETTINGS = [STRATEGIES, "stepsize.oss_shared.start=pinned", "model.guidance.scale=1.5"]


def main() -> None:
    torch.set_grad_enabled(False)
    root = configuration("data=fashion_scenes").data.root
    rows = {}
    for split in ("train", "test"):
        wardrobe = Wardrobe(*fashion_mnist(root, split, SIDE))
        rows[f"scenes of {split} garments"] = (0, ceiling(FashionDetector.from_asset(), wardrobe, seed=1))
    keep(__file__, "ceiling.md", table(rows).replace(" (0)", ""))
    folder = finished("table_7", "task=geneval", *SETTINGS, file="geneval.json")
    keep(__file__, "table_7.md", (folder / "geneval.md").read_text())


if __name__ == "__main__":
    main()
