"""Algorithm 2: what a search gains with multistep solvers of order 1, 2 and 3.

The PSNR of the paper's figure 6.

python -m experiments.figure_6.run
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.common import command_line, keep, measure, png, table
from oss_exp.evaluation.psnr import Interval

ORDERS = (1, 2, 3)
COLORS = {
    "oss_ave": "tab:orange",
    "oss_shared_pinned": "tab:green",
    "oss_shared_free": "tab:red",
    "oss_shared_analytic": "tab:blue",
}
FIXED = "oss_ave, run at the fixed order"
TABULATED = (5, 10)

Results = dict[tuple[str, int, int], Interval]  # (row, order, K) -> PSNR


def main() -> None:
    command_line(__doc__).parse_args()
    psnr: Results = {}
    for order in ORDERS:
        for result in measured(order, "searched"):
            psnr[result.strategy, order, result.num_steps] = result.psnr
        for result in measured(order, "fixed", "stepsize=oss_ave"):
            psnr[FIXED, order, result.num_steps] = result.psnr

    # Worst first, by the last column of order 2.
    names = sorted({name for name, *_ in psnr}, key=lambda name: psnr[name, 2, TABULATED[-1]].mean)
    keep(__file__, "table.md", markdown(names, psnr))
    keep(__file__, "figure.png", picture(names, psnr))


def measured(order: int, run_orders: str, *settings: str):
    """Return the results of one order; `run_orders` is those of the students."""
    return measure(
        f"figure_6/order_{order}_{run_orders}",
        "experiment=figure_6",
        f"solver.order={order}",
        f"run_orders={run_orders}",
        *settings,
    )


def best(names: list[str], psnr: Results, order: int, k: int, searched: bool) -> float:
    """Return the PSNR of the best search, or of the best schedule made without one."""
    rivals = [name for name in names if name.startswith("oss") == searched]
    return max(psnr[name, order, k].mean for name in rivals)


def markdown(names: list[str], psnr: Results) -> str:
    columns = [(order, k) for k in TABULATED for order in ORDERS]

    # One row a strategy.
    rows = []
    for name in names:
        rows.append([name, *(str(psnr[name, order, k]) for order, k in columns)])

    # What the search gains.
    gains = ["**best search minus best hand-made**"]
    for order, k in columns:
        gain = best(names, psnr, order, k, True) - best(names, psnr, order, k, False)
        gains.append(f"{gain:+.2f}")

    header = ["PSNR, dB"]
    for order, k in columns:
        header.append(f"K={k}, order {'≤ ' * (order > 1)}{order}")
    return table(header, [*rows, gains])


def picture(names: list[str], psnr: Results) -> bytes:
    """Draw PSNR against calls, a panel for each order."""
    budgets = sorted({k for *_, k in psnr})
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.3), sharey=True, layout="constrained")
    for axis, order in zip(axes, ORDERS, strict=True):

        def curve(name: str, order: int = order) -> list[float]:
            return [psnr[name, order, k].mean for k in budgets]

        # Schedules made without a search.
        for name in names:
            if not name.startswith("oss"):
                axis.plot(budgets, curve(name), color="0.7", lw=1)
        hand_made = [best(names, psnr, order, k, False) for k in budgets]
        label = "best hand-made (others in grey)"
        axis.plot(budgets, hand_made, color="0.3", lw=2, marker=".", label=label)

        # Searches.
        for name, color in COLORS.items():
            axis.plot(budgets, curve(name), color=color, lw=2, marker="o", ms=4, label=name)
        axis.plot(budgets, curve(FIXED), color="tab:orange", ls=":", label=FIXED)

        title = f"DPM-Solver++, orders up to {order}"
        axis.set(title=title, xlabel="network calls K", xticks=budgets)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("PSNR against the 100-step teacher, dB")
    axes[0].legend(fontsize=8)
    return png(figure)


if __name__ == "__main__":
    main()
