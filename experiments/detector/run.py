"""The highest score that scenes can reach: the detector's verdicts on scenes that fit the prompt.

python -m experiments.detector.run
"""

from __future__ import annotations

import torch

from experiments.common import command_line, configuration, keep
from oss_exp.data.captioned import SIDE
from oss_exp.data.images import fashion_mnist
from oss_exp.data.scenes import Wardrobe
from oss_exp.geneval.detectors import FashionDetector
from oss_exp.report.geneval import table
from oss_exp.tasks.fit_detector import ceiling


def main() -> None:
    command_line(__doc__).parse_args()
    torch.set_grad_enabled(False)
    root = configuration("task=fit_detector").images.root
    rows = {}
    for split in ("train", "test"):
        wardrobe = Wardrobe(*fashion_mnist(root, split, SIDE))
        verdicts = ceiling(FashionDetector.from_asset(), wardrobe, seed=1)
        rows[f"scenes of {split} garments"] = (0, verdicts)
    keep(__file__, "table.md", table(rows).replace(" (0)", ""))


if __name__ == "__main__":
    main()
