"""How many search samples a method needs: held-out PSNR from 4 to 512 of them.

python -m experiments.search_samples.run   # 35 minutes of a core; goes on where it was stopped

The Fashion mixture, DPM-Solver++ 2M, a teacher of 100 steps. Strategies that learn by gradient make
200 passes, half of the samples training and half choosing the best pass.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich.progress import track

from experiments.common import OUTPUTS, command_line, keep, png, table
from experiments.fitted_steps.run import BUDGETS, SEARCHED, Bench, fit
from oss_exp import BNS, GS, LD3, OLSS, DyWeight
from oss_exp.files import write_atomically
from oss_exp.stepsize import StepsizeStrategy

SAMPLES = (4, 8, 16, 32, 64, 128, 256, 512)
SEEDS = 2
PASSES = 200
STRATEGIES: dict[str, StepsizeStrategy] = {
    "oss_shared": SEARCHED,
    "olss": OLSS(),
    "oss_fit": fit(),
    "oss_fit, polish=10": replace(fit(), polish=10),
    "ld3": LD3(iterations=PASSES),
    "bns": BNS(iterations=PASSES),
    "gs": GS(iterations=PASSES),
    "dyweight": DyWeight(iterations=PASSES),
}
COLORS = (
    "tab:red",
    "tab:olive",
    "tab:blue",
    "navy",
    "0.6",
    "tab:green",
    "tab:orange",
    "tab:purple",
)
LEARNED = ("ld3", "bns", "gs", "dyweight")

# "strategy, samples, seed" -> {K: mean PSNR on the search samples, on held-out ones}.
Cells = dict[str, dict[str, tuple[float, float]]]


def main() -> None:
    command_line(__doc__).parse_args()
    cells = measured()
    keep(__file__, "table.md", tables(cells))
    keep(__file__, "held_out.png", picture(cells))


def measured() -> Cells:
    """Measure every cell, each written when it is done."""
    file = OUTPUTS / "search_samples" / "cells.json"
    cells: Cells = json.loads(file.read_text()) if file.exists() else {}
    bench = Bench()
    for count, seed, name in track([*product(SAMPLES, range(SEEDS), STRATEGIES)], "cells"):
        key = f"{name}, {count}, {seed}"
        if key not in cells:
            cells[key] = cell(bench, STRATEGIES[name], count, seed)
            write_atomically(file, json.dumps(cells, indent=1))
    return cells


def cell(
    bench: Bench, strategy: StepsizeStrategy, count: int, seed: int
) -> dict[str, tuple[float, float]]:
    noise = bench.noise(seed, count)
    values = {}
    for k, steps in bench.plan(strategy, noise).items():
        search = float(bench.psnr(steps, noise).mean())
        values[str(k)] = (search, float(bench.held_out(steps).mean()))
    return values


def values(cells: Cells, name: str, count: int, k: int) -> np.ndarray:
    """Return the mean PSNR of each seed, (SEEDS, 2): on search samples and on held-out ones."""
    return np.array([cells[f"{name}, {count}, {seed}"][str(k)] for seed in range(SEEDS)])


def tables(cells: Cells) -> str:
    """Return for every budget a table of held-out PSNR, and that on the search samples."""
    texts = []
    for k in BUDGETS:
        rows = []
        for name in STRATEGIES:
            row = [f"`{name}`"]
            for count in SAMPLES:
                search, held_out = values(cells, name, count, k).mean(0)
                row.append(f"{held_out:.1f} ({search:.1f})")
            rows.append(row)
        texts.append(table([f"K = {k}", *map(str, SAMPLES)], rows))
    return "\n".join(texts) + (
        f"\nPSNR in dB of held-out noises (of the search samples themselves), mean over {SEEDS} "
        "search sets of so many samples.\n"
    )


def picture(cells: Cells) -> bytes:
    figure, axes = plt.subplots(1, len(BUDGETS), figsize=(11, 4.4), layout="constrained")
    for axis, k in zip(axes, BUDGETS, strict=True):
        for name, color in zip(STRATEGIES, COLORS, strict=True):
            held_out = np.array([values(cells, name, count, k)[:, 1] for count in SAMPLES])
            style = "--" if name in LEARNED else "-"
            axis.plot(SAMPLES, held_out.mean(1), style, color=color, marker="o", ms=4, label=name)
            axis.fill_between(
                SAMPLES, held_out.min(1), held_out.max(1), color=color, alpha=0.12, lw=0
            )
        axis.set(title=f"K = {k}", xscale="log", xlabel="search samples")
        axis.set_xticks(SAMPLES, SAMPLES)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out PSNR, dB (band: the search sets)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, title="dashed: by gradient", loc="outside right")
    return png(figure)


if __name__ == "__main__":
    main()
