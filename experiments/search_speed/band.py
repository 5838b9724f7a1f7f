"""What a band costs: PSNR of `oss_shared` with a band against the search of all edges, on networks.

python -m experiments.search_speed.band    # half an hour of a core; finished networks are kept

Euler steps, a 100-step teacher, 32 search samples and 256 held-out noises. The differences are
paired: the same noises, with and without the band.
"""

from __future__ import annotations

import numpy as np

from experiments.common import command_line, keep, measure, table
from oss_exp.evaluation.psnr import Interval

NETWORKS = {
    "unet_fashion": [],
    "dit_fashion": [],
    "flux_fashion": ["data=prompts", "data.prompts=coloured_fashion.txt"],
}
BUDGETS = (5, 10)
BAND = "band: {_target_: oss_exp.Band, stride: 8, width: 1, shifts: 0}"
PLAIN = "_target_: oss_exp.OSSShared, start: analytic"
STRATEGIES = {
    "all_edges": f"{{{PLAIN}, refine: false}}",
    "band": f"{{{PLAIN}, refine: false, {BAND}}}",
    "all_edges_refined": f"{{{PLAIN}, refine: true}}",
    "band_refined": f"{{{PLAIN}, refine: true, {BAND}}}",
}


def main() -> None:
    command_line(__doc__).parse_args()
    rows = []
    for network, settings in NETWORKS.items():
        results = measure(
            f"search_speed/band_{network}",
            f"model={network}",
            *settings,
            "stepsize=edm",
            *(f"+stepsize.{name}={value}" for name, value in STRATEGIES.items()),
            f"num_steps={[*BUDGETS]}".replace(" ", ""),
            "data.search_samples=32",
            "data.eval_samples=256",
        )
        found = {(result.strategy, result.num_steps): result for result in results}
        for refined in ("", "_refined"):
            for k in BUDGETS:
                whole, banded = found[f"all_edges{refined}", k], found[f"band{refined}", k]
                pairs = [value - whole.values[i] for i, value in banded.values.items()]
                calls = [result.planning["network_calls_per_sample"] for result in (whole, banded)]
                name = f"{network}{', refined' * bool(refined)}"
                row = [name, str(k), str(whole.psnr), str(banded.psnr)]
                rows.append([*row, str(Interval.of(np.array(pairs))), *(f"{c:.0f}" for c in calls)])

    header = ["network", "K", "all edges, dB", "band, dB", "difference, dB", "calls", "with a band"]
    keep(__file__, "band.md", table(header, rows))


if __name__ == "__main__":
    main()
