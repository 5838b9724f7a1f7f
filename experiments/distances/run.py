"""Compare what a search minimises: four distances and two norms, per sample and shared.

python -m experiments.distances.run
"""

from __future__ import annotations

from experiments.common import command_line, keep, measure, table

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


BUDGETS = (5, 10)
SEARCHES = ("oss", "oss_ave", "oss_shared")


def main() -> None:
    command_line(__doc__).parse_args()
    rows = []
    for name, distance in DISTANCES.items():
        results = measure(f"distances/{'_'.join(distance).replace('=', '_')}", *SETTING, *distance)
        by_key = {(result.strategy, result.num_steps): result for result in results}

        # One row a distance.
        row = [name]
        for k in BUDGETS:
            row += [str(by_key[search, k].psnr) for search in SEARCHES]
        calls = by_key["oss", 5].planning["network_calls_per_sample"]
        rows.append([*row, f"{calls:.0f}"])

    # DDIM does not depend on the distance.
    ddim = [str(by_key["ddim", k].psnr) for k in BUDGETS]
    rows.append(["(ddim, no search)", ddim[0], "", "", ddim[1], "", "", "0"])

    header = ["distance"]
    for k in BUDGETS:
        header += [f"{search}, K={k}" for search in SEARCHES]
    keep(__file__, "table.md", table([*header, "calls a sample"], rows))


if __name__ == "__main__":
    main()
