"""Pictures of a run: where the steps are, and what they do to the samples."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from oss_exp import escaping
from oss_exp.evaluation.comparison import Result
from oss_exp.evaluation.pictures import encoded
from oss_exp.models.stages import StageRecord
from oss_exp.report.records import Curve
from oss_exp.schedule import StepSchedule
from oss_exp.schedule_file import Certificate

Color = tuple[float, float, float]
"""Red, green and blue in [0, 1]."""


def palette(name: str) -> list[Color]:
    """Return the colours of one of matplotlib's lists, such as tab10."""
    listed = matplotlib.colormaps[name]
    return [(red, green, blue) for red, green, blue, _ in listed(np.arange(listed.N)).tolist()]


DPI = 130  # of pictures in files
PANELS, ROWS = 12, 60  # of a picture; what is left out is on the page
ANNOTATED = 50  # steps whose orders are written beside them
MUTED = (*palette("tab20b")[::2], *palette("tab20c")[::2])


def schedules(plans: Sequence[tuple[str, StepSchedule]], teacher: Sequence[float]) -> bytes:
    """PNG: time against step, one panel a budget; the teacher's nodes as ticks, per-sample schedules as a band.

    Steps whose order a search chose carry it as a number.
    """
    budgets = sorted({plan.num_steps for _, plan in plans})[:PANELS]
    size = (3.5 + 4.5 * len(budgets), 4.6)
    figure, axes = plt.subplots(
        1, len(budgets), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    color_of, by_hand = colors(plans), _by_hand(plans)
    entries = {}  # one for each strategy, whichever panels it is in
    for axis, k in zip(axes[0], budgets, strict=True):
        ticks = axis.plot(np.full(len(teacher), -0.03 * k), teacher, "_", color="0.6", markersize=6)
        if teacher:
            entries["teacher's nodes"] = ticks[0]
        for name, plan in plans:
            if plan.num_steps != k:
                continue
            steps, times = np.arange(k + 1), plan.times.numpy()
            ours = name not in by_hand
            if times.ndim == 2:
                low, times, high = np.quantile(times, [0.1, 0.5, 0.9], axis=0)
                axis.fill_between(steps, low, high, color=color_of[name], alpha=0.2, lw=0)
                name_shown = f"{name} (median, 10-90 % of {len(plan.times)} samples)"
            else:
                name_shown = name
            style = {
                "marker": "o" if ours else ".",
                "lw": 2 if ours else 1,
                "ls": "-" if ours else "--",
            }
            style["zorder"] = 3 if ours else 2
            entries[escaping.label(name_shown)] = axis.plot(
                steps, times, color=color_of[name], **style
            )[0]
            if (
                plan.orders is not None
                and plan.orders.ndim == 1
                and plan.orders.max() > 1
                and k <= ANNOTATED
            ):
                for step, order in enumerate(plan.orders.tolist()):
                    middle = step + 0.5, times[step : step + 2].mean()
                    axis.annotate(
                        str(order),
                        middle,
                        (3, 3),
                        textcoords="offset points",
                        color=color_of[name],
                        fontsize=8,
                    )
        axis.set(title=f"K = {k}", xlabel="network call")
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time t  (1 noise, 0 data)")
    named = dict(list(entries.items())[:ROWS])
    if more := len(entries) - len(named):
        named[f"and {more} more, on the page"] = Line2D([], [], linestyle="none")
    figure.legend(named.values(), named.keys(), loc="outside right center", frameon=False)
    return png(figure)


def colors(plans: Sequence[tuple[str, StepSchedule]]) -> dict[str, Color]:
    """Of each strategy."""
    by_hand = _by_hand(plans)
    return strong_and_muted({name: name in by_hand for name, _ in plans})


def strong_and_muted(by_hand: Mapping[str, bool]) -> dict[str, Color]:
    """Of each name: muted colours for the schedules made by hand, strong ones for the searched."""
    found = {}
    for kind, known in ((True, MUTED), (False, palette("tab10"))):
        group = sorted(name for name, made in by_hand.items() if made is kind)
        found |= {name: known[i % len(known)] for i, name in enumerate(group)}
    return found


def _by_hand(plans: Sequence[tuple[str, StepSchedule]]) -> set[str]:
    return {name for name, plan in plans if plan.about("strategy").get("baseline", False)}


def moments(frames: int) -> tuple[np.ndarray, int]:
    """At most 24 frames of a video that are shown, and how many milliseconds each."""
    shown = np.linspace(0, frames - 1, min(frames, 24)).round().astype(int)
    return shown, 125 * frames // len(shown)


def ordered(
    pictures: Mapping[str, np.ndarray], results: Sequence[Result]
) -> list[tuple[str, Result]]:
    """(label, result) of the students with pictures, by budget, then best first."""
    pairs = [(f"{result.strategy} K={result.num_steps}", result) for result in results]
    pairs = [pair for pair in pairs if pair[0] in pictures]
    return sorted(pairs, key=lambda pair: (pair[1].num_steps, -pair[1].psnr.mean))


def animation(pictures: Mapping[str, np.ndarray], results: Sequence[Result]) -> bytes | None:
    """GIF: `samples` of at most 24 frames (n, F, H, W, C); None where samples are images."""
    if pictures["teacher"].ndim == 4:
        return None
    shown, milliseconds = moments(pictures["teacher"].shape[1])
    frames = [{label: videos[:, i] for label, videos in pictures.items()} for i in shown]
    figure, panels = _sheet(frames[0], results)
    drawn = []
    for frame in frames:  # one figure for all: making it takes longer than drawing it
        for panel, strip in zip(panels, _strips(frame, results), strict=True):
            panel.set_data(strip)
        figure.canvas.draw()
        drawn.append(np.array(figure.canvas.buffer_rgba())[..., :3])  # pyright: ignore[reportAttributeAccessIssue]  # Agg
    plt.close(figure)
    return encoded(np.stack(drawn), milliseconds)


def samples(pictures: Mapping[str, np.ndarray], results: Sequence[Result]) -> bytes:
    """PNG: the teacher and every schedule on the same noises, each with its absolute error (brighter is worse).

    pictures: (n, H, W, C) bytes of each; of videos (n, F, H, W, C) the middle frame.
    """
    if pictures["teacher"].ndim == 5:
        pictures = {label: videos[:, videos.shape[1] // 2] for label, videos in pictures.items()}
    return png(_sheet(pictures, results)[0])


def _sheet(
    pictures: Mapping[str, np.ndarray], results: Sequence[Result]
) -> tuple[Figure, list[AxesImage]]:
    """Return the figure of `samples` and its panels, which show `_strips`."""
    students = ordered(pictures, results)[:ROWS]
    labels = [
        "teacher",
        *(f"{escaping.label(label)}\n{result.psnr.mean:.2f} dB" for label, result in students),
    ]
    size = 2 + 1.5 * len(pictures["teacher"]), 0.85 * len(labels) + 0.6
    figure, axes = plt.subplots(len(labels), 2, figsize=size, dpi=DPI, squeeze=False)
    places = [axes[0][0], *(axis for row in axes[1:] for axis in row)]
    looks = [("gray", 1), *[("gray", 1), ("inferno", 0.5)] * len(students)]
    panels = [
        axis.imshow(strip, cmap=colours, vmin=0, vmax=top, interpolation="nearest")
        for axis, strip, (colours, top) in zip(
            places, _strips(pictures, results), looks, strict=True
        )
    ]
    for row, label in zip(axes, labels, strict=True):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
    axes[0][1].text(
        0.06, 0.5, "absolute error (0 black, 0.5 and above bright)", va="center", fontsize=9
    )
    axes[0][1].set(xlim=(0, 1), ylim=(0, 1))
    figure.tight_layout(pad=0.3)
    return figure, panels


def _strips(pictures: Mapping[str, np.ndarray], results: Sequence[Result]) -> list[np.ndarray]:
    """Return the teacher's pictures side by side, and each student's, followed by their errors; in [0, 1]."""
    teacher = pictures["teacher"].astype(float) / 255
    strips = [_strip(teacher)]
    for label, _ in ordered(pictures, results)[:ROWS]:
        images = pictures[label].astype(float) / 255
        error = np.abs(images - teacher[: len(images)])
        strips += [_strip(images), _strip(error).clip(0, 0.5)]
    return strips


def training(losses: Sequence[float]) -> bytes:
    """PNG: the loss of every step, and its mean over as many steps as make 50 of them."""
    width = max(1, len(losses) // 50)
    means = np.array(losses[: len(losses) // width * width]).reshape(-1, width).mean(1)
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axis.plot(np.arange(1, len(losses) + 1), losses, color="0.8", lw=0.5, label="each step")
    axis.plot(
        (np.arange(len(means)) + 0.5) * width,
        means,
        color="tab:blue",
        lw=2,
        label=f"mean of {width}",
    )
    axis.set(
        xlabel="step", ylabel="loss", ylim=(0.9 * means.min(), 1.1 * np.quantile(losses, 0.95))
    )
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    return png(figure)


def stages(records: Sequence[StageRecord]) -> bytes:
    """PNG: how hard each stage is before and after its training, and the losses on the way; of finetune.json."""
    figure, (bars, curves) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    places = np.arange(len(records))
    for offset, key, color in ((-0.2, "loss_before", "0.7"), (0.2, "loss_after", "tab:blue")):
        heights = [getattr(record.training, key) for record in records]
        bars.bar(places + offset, heights, 0.4, color=color, label=key.removeprefix("loss_"))
    labels = [
        f"{record.stage}\n{record.times[0]:.3g} to {record.times[1]:.3g}" for record in records
    ]
    bars.set_xticks(places, labels, fontsize=8)
    bars.set(xlabel="stage, and its times (1 noise, 0 data)", ylabel="loss", yscale="log")
    for record in records:
        losses = record.training.losses
        width = max(1, len(losses) // 50)
        means = np.array(losses[: len(losses) // width * width]).reshape(-1, width).mean(1)
        curves.plot((np.arange(len(means)) + 0.5) * width, means, label=f"stage {record.stage}")
    curves.set(xlabel="step", ylabel="loss", yscale="log")
    for axis in (bars, curves):
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    return png(figure)


def amplitude(curves: Sequence[Curve]) -> bytes:
    """PNG: 5 and 95 % quantiles of the state against t, a column a strategy; below, how far off the teacher's.

    curves: of amplitude.json, the teacher's and each student's without and with calibration. A table of each channel is
    drawn as its mean. With calibration a state has two points at a time: as it arrives, and as the network sees it.
    """
    (teacher,) = [c for c in curves if c.strategy == "teacher"]
    students = [c for c in curves if c is not teacher]
    names, budgets = (
        list(dict.fromkeys(getattr(c, key) for c in students))[:PANELS]
        for key in ("strategy", "num_steps")
    )
    students = [c for c in students if c.strategy in names and c.num_steps in budgets]
    times = np.array(teacher.times)
    figure, axes = plt.subplots(
        2 * len(budgets),
        len(names),
        figsize=(1.5 + 4.5 * len(names), 0.8 + 5.6 * len(budgets)),
        height_ratios=(3, 2) * len(budgets),
        squeeze=False,
        sharex=True,
        sharey="row",
        layout="constrained",
    )
    for c in students:
        row, column = 2 * budgets.index(c.num_steps), names.index(c.strategy)
        above, below = axes[row : row + 2, column]
        above.set_title(f"{escaping.label(c.strategy)}, K = {c.num_steps}")
        style = (
            {"color": "tab:blue", "marker": "o"}
            if c.calibrated
            else {"color": "tab:red", "marker": "s"}
        )
        for edge, line in (("high", "-"), ("low", "--")):
            truth, values = (_over_channels(getattr(curve, edge)) for curve in (teacher, c))
            t = np.array(c.times)
            if not c.calibrated:
                above.plot(times, truth, "0.6", lw=5)
            above.plot(t, values, line, **style, ms=4, lw=1.3)
            below.plot(
                t, values - np.interp(t, times[::-1], truth[::-1]), line, **style, ms=4, lw=1.3
            )
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for row in range(0, len(axes), 2):
        axes[row][0].set_ylabel("5 and 95 % quantiles")
        axes[row + 1][0].set_ylabel("student - teacher\n(95 % solid, 5 % dashed)")
        for axis in axes[row + 1]:
            axis.axhline(0, color="0.6", lw=3, zorder=0)
    for axis in axes[-1]:
        axis.set_xlabel("time t  (1 noise, 0 data)")
    axes[0][0].invert_xaxis()
    truth, plain, *_, corrected, _ = axes[0][0].lines  # 95 % before 5 %
    labels = [f"teacher, {teacher.num_steps} steps", "uncalibrated", "calibrated"]
    figure.legend(
        [truth, plain, corrected], labels, loc="outside upper center", ncols=3, frameon=False
    )
    return png(figure)


def certificates(found: Sequence[tuple[str, Certificate]]) -> bytes:
    """PNG: PSNR in every setting of a certificate, a panel a schedule; the shade is what is inside of its range."""
    found = found[:PANELS]
    most = max(min(len(certificate.cells), ROWS) for _, certificate in found)
    size = (1 + 5.5 * len(found), 1.6 + 0.3 * most)
    figure, axes = plt.subplots(1, len(found), figsize=size, squeeze=False, layout="constrained")
    for axis, (name, certificate) in zip(axes[0], found, strict=True):
        cells = certificate.cells[:ROWS]
        rows, psnr = np.arange(len(cells)), np.array([cell.psnr for cell in cells])
        axis.axvspan(
            psnr[0] - certificate.tolerance, psnr.max() + 100, color="tab:green", alpha=0.08, lw=0
        )
        axis.plot(
            [cell.baseline for cell in cells],
            rows,
            "d",
            color="0.6",
            ms=5,
            label=certificate.baseline,
        )
        for inside, color in ((True, "tab:green"), (False, "tab:red")):
            chosen = [row for row in rows if (cells[row].loss <= certificate.tolerance) == inside]
            spread = np.abs(
                np.array([cells[row].psnr_interval for row in chosen]).reshape(-1, 2).T
                - psnr[chosen]
            )
            label = (
                "inside of its range"
                if inside
                else f"outside: loses more than {certificate.tolerance:g} dB"
            )
            axis.errorbar(
                psnr[chosen], chosen, xerr=spread, fmt="o", ms=5, color=color, label=label
            )
        told = [
            str(cell.value) if cell.axis == "base" else f"{cell.axis}={cell.value}"
            for cell in cells
        ]
        axis.set_yticks(rows, [escaping.label(text) for text in told])
        values = [each for cell in cells for each in (*cell.psnr_interval, cell.baseline)]
        axis.set_xlim(min(values) - 0.5, max(values) + 0.5)
        axis.invert_yaxis()
        axis.grid(alpha=0.3, axis="x")
        axis.set_title(escaping.label(name))
        axis.set_xlabel("PSNR to the teacher of the same setting, dB")
        axis.legend(
            frameon=False,
            fontsize=8,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.45 / size[1] * 1.6),
            ncols=3,
        )
    return png(figure)


def _over_channels(values: Sequence) -> np.ndarray:
    """(P,) or (P, C) -> (P,)."""
    return np.array(values, dtype=float).reshape(len(values), -1).mean(1)


def _strip(images: np.ndarray) -> np.ndarray:
    """(n, H, W, C) -> (H, n*W, C), grey images without the channel."""
    strip = np.concatenate(list(images), axis=1)
    return strip[..., 0] if strip.shape[-1] == 1 else strip


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()
