"""What the search minimises: four distances, two norms, per sample and shared.

python -m experiments.distances.run
"""

from __future__ import annotations

from experiments.common import keep, measure, table

DISTANCES = {
    "x_t-MSE": ["distance=xt_mse"],
    "x_t, norm 1": ["distance=xt_mse", "distance.norm=1"],
    "x0-MSE": ["distance=x0_mse"],
    "features of x0 (random network)": ["distance=features"],
    "responsibilities at x_t (perceptual)": ["distance=perceptual"],
}
SETTING = [
    "stepsize=[ddim,oss,oss_ave,oss_shared]",
    "stepsize.oss_shared.start=free",
    "stepsize.oss_shared.refine=false",
    "num_teacher_steps=50",
    "data.search_samples=32",
    "data.per_sample=64",
]


def main() -> None:
    header = [
        "distance",
        *(f"{s}, K={k}" for k in (5, 10) for s in ("oss", "oss_ave", "oss_shared")),
        "calls a sample",
    ]
    rows = []
    for name, distance in DISTANCES.items():
        results = measure(f"distances/{'_'.join(distance).replace('=', '_')}", *SETTING, *distance)
        found = {(r.strategy, r.num_steps): r for r in results}
        calls = found["oss", 5].planning["network_calls_per_sample"]
        cells = [str(found[s, k].psnr) for k in (5, 10) for s in ("oss", "oss_ave", "oss_shared")]
        rows.append([name, *cells, f"{calls:.0f}"])
    ddim = [str(found["ddim", k].psnr) for k in (5, 10)]
    rows.append(["(ddim, no search)", ddim[0], "", "", ddim[1], "", "", "0"])
    keep(__file__, "table.md", table(header, rows))


if __name__ == "__main__":
    main()
