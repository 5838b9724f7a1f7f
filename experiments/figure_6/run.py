"""Algorithm 2: what the search gains with multistep solvers of order 1, 2 and 3 (the paper's figure 6, PSNR).

python -m experiments.figure_6.run
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.common import keep, measure, png, table

ORDERS = (1, 2, 3)
OURS = ("oss_ave", "oss_shared_pinned", "oss_shared_free", "oss_shared_analytic")
SHOWN = (5, 10)


def main() -> None:
    psnr: dict[tuple[str, int, int], str] = {}  # (row, order, K) -> text
    mean: dict[tuple[str, int, int], float] = {}
    for order in ORDERS:
        for run_orders in ("searched", "fixed"):
            only = ["stepsize=oss_ave"] if run_orders == "fixed" else []
            results = measure(
                f"figure_6/order_{order}_{run_orders}",
                "experiment=figure_6",
                f"solver.order={order}",
                f"run_orders={run_orders}",
                *only,
            )
            for r in results:
                name = (
                    f"{r.strategy}, run at the fixed order" if run_orders == "fixed" else r.strategy
                )
                psnr[name, order, r.num_steps], mean[name, order, r.num_steps] = (
                    str(r.psnr),
                    r.psnr.mean,
                )
    names = sorted({name for name, *_ in mean}, key=lambda name: mean[name, 2, SHOWN[-1]])
    keep(__file__, "table.md", _table(names, psnr, mean))
    keep(__file__, "figure.png", _figure(names, mean))


def _best_by_hand(names, mean, order, k) -> tuple[float, str]:
    return max((mean[name, order, k], name) for name in names if not name.startswith("oss"))


def _table(names, psnr, mean) -> str:
    columns = [(order, k) for k in SHOWN for order in ORDERS]
    rows = [[name, *(psnr[name, order, k] for order, k in columns)] for name in names]
    ours = [
        max(mean[name, order, k] for name in names if name.startswith("oss"))
        for order, k in columns
    ]
    gains = [
        f"{best - _best_by_hand(names, mean, *c)[0]:+.2f}"
        for best, c in zip(ours, columns, strict=True)
    ]
    rows.append(["**best search minus best hand-made**", *gains])
    return table(
        ["PSNR, dB", *(f"K={k}, order {'≤ ' * (order > 1)}{order}" for order, k in columns)], rows
    )


def _figure(names, mean) -> bytes:
    budgets = sorted({k for *_, k in mean})
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.3), sharey=True, layout="constrained")
    for axis, order in zip(axes, ORDERS, strict=True):
        for name in names:
            if name.startswith("oss"):
                continue
            axis.plot(budgets, [mean[name, order, k] for k in budgets], color="0.7", lw=1)
        best = [_best_by_hand(names, mean, order, k)[0] for k in budgets]
        axis.plot(
            budgets, best, color="0.3", lw=2, marker=".", label="best hand-made (others in grey)"
        )
        for name, color in zip(
            OURS, ("tab:orange", "tab:green", "tab:red", "tab:blue"), strict=True
        ):
            axis.plot(
                budgets,
                [mean[name, order, k] for k in budgets],
                color=color,
                lw=2,
                marker="o",
                ms=4,
                label=name,
            )
        fixed = "oss_ave, run at the fixed order"
        axis.plot(
            budgets,
            [mean[fixed, order, k] for k in budgets],
            color="tab:orange",
            ls=":",
            label=fixed,
        )
        axis.set(
            title=f"DPM-Solver++, orders up to {order}", xlabel="network calls K", xticks=budgets
        )
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("PSNR against the 100-step teacher, dB")
    axes[0].legend(fontsize=8)
    return png(figure)


if __name__ == "__main__":
    main()
