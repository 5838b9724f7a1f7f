"""Pictures of a run: step schedules, samples, training losses, amplitudes and certificates.

All functions return an encoded file: PNG, or GIF for videos.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
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
from oss_exp.schedule_file import Cell, Certificate

Color = tuple[float, float, float]
"""Red, green and blue in [0, 1]."""


def palette(name: str) -> list[Color]:
    """Return the colours of one of matplotlib's colour maps, such as tab10."""
    colormap = matplotlib.colormaps[name]
    return [tuple(rgba[:3]) for rgba in colormap(np.arange(colormap.N)).tolist()]


DPI = 130
PANELS, ROWS = 12, 60  # most in a picture; the page has all
ANNOTATED = 50  # most steps whose orders are written beside them
MUTED = (*palette("tab20b")[::2], *palette("tab20c")[::2])


# --------------------------------------------------------------------------------------------------
# Step schedules
# --------------------------------------------------------------------------------------------------


def schedules(plans: Sequence[tuple[str, StepSchedule]], teacher: Sequence[float]) -> bytes:
    """Plot time against step as a PNG, one panel for each budget.

    The teacher's nodes are ticks on the left. Per-sample schedules are a band around
    their median. Steps whose order a search chose are labelled with it.

    Args:
        plans: Names of strategies and their schedules.
        teacher: Times of the teacher's nodes; may be empty.
    """
    budgets = sorted({plan.num_steps for _, plan in plans})[:PANELS]
    size = (3.5 + 4.5 * len(budgets), 4.6)
    figure, axes = plt.subplots(
        1, len(budgets), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    color_of = colors(plans)
    baselines = _baselines(plans)
    entries = {}  # of the legend: one for each strategy, whichever panels it is in

    for axis, k in zip(axes[0], budgets, strict=True):
        # Teacher's nodes.
        ticks = axis.plot(np.full(len(teacher), -0.03 * k), teacher, "_", color="0.6", markersize=6)
        if teacher:
            entries["teacher's nodes"] = ticks[0]

        # Schedules.
        for name, plan in plans:
            if plan.num_steps == k:
                label, line = _draw_schedule(axis, name, plan, color_of[name], name in baselines)
                entries[label] = line

        # Axes.
        axis.set(title=f"K = {k}", xlabel="network call")
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axis.grid(alpha=0.3)

    axes[0][0].set_ylabel("time t  (1 noise, 0 data)")
    named = dict(list(entries.items())[:ROWS])
    if more := len(entries) - len(named):
        named[f"and {more} more, on the page"] = Line2D([], [], linestyle="none")
    figure.legend(named.values(), named.keys(), loc="outside right center", frameon=False)
    return png(figure)


def _draw_schedule(
    axis: Axes, name: str, plan: StepSchedule, color: Color, baseline: bool
) -> tuple[str, Line2D]:
    """Draw one schedule and return its entry of the legend."""
    steps = np.arange(plan.num_steps + 1)
    times = plan.times.numpy()

    # Band of per-sample schedules.
    if times.ndim == 2:
        low, times, high = np.quantile(times, [0.1, 0.5, 0.9], axis=0)
        axis.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
        name = f"{name} (median, 10-90 % of {len(plan.times)} samples)"

    # Line.
    if baseline:
        (line,) = axis.plot(steps, times, color=color, marker=".", lw=1, ls="--", zorder=2)
    else:
        (line,) = axis.plot(steps, times, color=color, marker="o", lw=2, ls="-", zorder=3)

    # Orders.
    orders = plan.orders
    if orders is not None and orders.ndim == 1 and orders.max() > 1 and len(orders) <= ANNOTATED:
        for step, order in enumerate(orders.tolist()):
            middle = step + 0.5, times[step : step + 2].mean()
            axis.annotate(
                str(order), middle, (3, 3), textcoords="offset points", color=color, fontsize=8
            )
    return escaping.label(name), line


def colors(plans: Sequence[tuple[str, StepSchedule]]) -> dict[str, Color]:
    """Return a colour for each strategy: muted for baselines, strong for the searched ones."""
    baselines = _baselines(plans)
    return strong_and_muted({name: name in baselines for name, _ in plans})


def strong_and_muted(by_hand: Mapping[str, bool]) -> dict[str, Color]:
    """Return a colour for each name.

    Args:
        by_hand: True for names of schedules made by hand, which get muted colours.
    """
    muted = cycle(MUTED)
    strong = cycle(palette("tab10"))
    return {name: next(muted if by_hand[name] else strong) for name in sorted(by_hand)}


def _baselines(plans: Sequence[tuple[str, StepSchedule]]) -> set[str]:
    return {name for name, plan in plans if plan.about("strategy").get("baseline", False)}


# --------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------


def moments(frames: int) -> tuple[np.ndarray, int]:
    """Return the frames of a video that are drawn, at most 24, and the milliseconds of each."""
    numbers = np.linspace(0, frames - 1, min(frames, 24)).round().astype(int)
    return numbers, 125 * frames // len(numbers)


def ordered(
    pictures: Mapping[str, np.ndarray], results: Sequence[Result]
) -> list[tuple[str, Result]]:
    """Return labels and results of the students with pictures, by budget, then best first."""
    pairs = [(f"{result.strategy} K={result.num_steps}", result) for result in results]
    pairs = [pair for pair in pairs if pair[0] in pictures]
    return sorted(pairs, key=lambda pair: (pair[1].num_steps, -pair[1].psnr.mean))


def animation(pictures: Mapping[str, np.ndarray], results: Sequence[Result]) -> bytes | None:
    """Return a GIF of `samples` for videos (n, F, H, W, C); None where samples are images."""
    if pictures["teacher"].ndim == 4:
        return None
    numbers, milliseconds = moments(pictures["teacher"].shape[1])
    figure, panels = _sheet(_frame(pictures, 0), results)
    figure.set_dpi(DPI / 2)
    strips = (_strips(_frame(pictures, number), results) for number in numbers)
    return gif(figure, panels, strips, milliseconds)


def gif(
    figure: Figure,
    panels: Sequence[AxesImage],
    frames: Iterable[Iterable[np.ndarray]],
    milliseconds: int,
) -> bytes:
    """Return a GIF of a figure whose panels show other pictures in every frame, and close it.

    Args:
        figure: One figure for all frames, since making it takes longer than drawing it.
        panels: The panels that change.
        frames: For each frame the picture of every panel.
        milliseconds: How long a frame is shown.
    """
    drawn = []
    for pictures in frames:
        for panel, picture in zip(panels, pictures, strict=True):
            panel.set_data(picture)
        figure.canvas.draw()
        buffer = figure.canvas.buffer_rgba()  # pyright: ignore[reportAttributeAccessIssue]  # Agg
        drawn.append(np.array(buffer)[..., :3])
    plt.close(figure)
    return encoded(np.stack(drawn), milliseconds)


def samples(pictures: Mapping[str, np.ndarray], results: Sequence[Result]) -> bytes:
    """Draw the teacher's and every schedule's samples, with their absolute errors, as a PNG.

    Args:
        pictures: Samples from the same noises by label, uint8, (n, H, W, C); of videos
            (n, F, H, W, C) the middle frame is drawn.
        results: Results of the schedules, whose PSNR stands beside them.
    """
    if pictures["teacher"].ndim == 5:
        pictures = {label: videos[:, videos.shape[1] // 2] for label, videos in pictures.items()}
    return png(_sheet(pictures, results)[0])


def _frame(videos: Mapping[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """Return one frame of every video, (n, H, W, C)."""
    return {label: frames[:, number] for label, frames in videos.items()}


def _sheet(
    pictures: Mapping[str, np.ndarray], results: Sequence[Result]
) -> tuple[Figure, list[AxesImage]]:
    """Return the figure of `samples` and its panels, which show `_strips`."""
    # Labels of the rows.
    labels = ["teacher"]
    for label, result in ordered(pictures, results)[:ROWS]:
        labels.append(f"{escaping.label(label)}\n{result.psnr.mean:.2f} dB")

    # Panels: the teacher, then pairs of samples and errors.
    size = 2 + 1.5 * len(pictures["teacher"]), 0.85 * len(labels) + 0.6
    figure, axes = plt.subplots(
        len(labels), 2, figsize=size, dpi=DPI, squeeze=False, layout="compressed"
    )
    panels = []
    for number, strip in enumerate(_strips(pictures, results)):
        row, column = divmod(number + 1, 2) if number else (0, 0)
        cmap, top = ("inferno", 0.5) if number and column else ("gray", 1)
        panel = axes[row][column].imshow(
            strip, cmap=cmap, vmin=0, vmax=top, interpolation="nearest"
        )
        panels.append(panel)

    # Axes.
    for row, label in zip(axes, labels, strict=True):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)

    # Explanation in the teacher's second panel.
    corner = axes[0][1]
    corner.text(
        0.06, 0.5, "absolute error (0 black, 0.5 and above bright)", va="center", fontsize=9
    )
    corner.set(xlim=(0, 1), ylim=(0, 1))
    return figure, panels


def _strips(pictures: Mapping[str, np.ndarray], results: Sequence[Result]) -> list[np.ndarray]:
    """Return the teacher's strip, then each student's strip and its errors; in [0, 1]."""
    teacher = pictures["teacher"].astype(float) / 255
    strips = [_strip(teacher)]
    for label, _ in ordered(pictures, results)[:ROWS]:
        images = pictures[label].astype(float) / 255
        error = np.abs(images - teacher[: len(images)])
        strips += [_strip(images), _strip(error).clip(0, 0.5)]
    return strips


def _strip(images: np.ndarray) -> np.ndarray:
    """Put images (n, H, W, C) side by side, (H, n W, C); grey ones become (H, n W)."""
    strip = np.concatenate(list(images), axis=1)
    return strip[..., 0] if strip.shape[-1] == 1 else strip


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def training(losses: Sequence[float]) -> bytes:
    """Plot the loss of every step as a PNG, with about 50 means over consecutive steps."""
    steps, means, width = _means(losses)
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")

    # Lines.
    axis.plot(np.arange(1, len(losses) + 1), losses, color="0.8", lw=0.5, label="each step")
    axis.plot(steps, means, color="tab:blue", lw=2, label=f"mean of {width}")

    # Axes.
    limits = (0.9 * means.min(), 1.1 * np.quantile(losses, 0.95))
    axis.set(xlabel="step", ylabel="loss", ylim=limits)
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    return png(figure)


def stages(records: Sequence[StageRecord]) -> bytes:
    """Plot the finetuning of stages as a PNG: losses before and after, and on the way."""
    figure, (bars, curves) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")

    # Bars before and after.
    places = np.arange(len(records))
    before, after, labels = [], [], []
    for record in records:
        before.append(record.training.loss_before)
        after.append(record.training.loss_after)
        first, last = record.times
        labels.append(f"{record.stage}\n{first:.3g} to {last:.3g}")
    bars.bar(places - 0.2, before, 0.4, color="0.7", label="before")
    bars.bar(places + 0.2, after, 0.4, color="tab:blue", label="after")
    bars.set_xticks(places, labels, fontsize=8)
    bars.set(xlabel="stage, and its times (1 noise, 0 data)", ylabel="loss", yscale="log")

    # Curves.
    for record in records:
        steps, means, _ = _means(record.training.losses)
        curves.plot(steps, means, label=f"stage {record.stage}")
    curves.set(xlabel="step", ylabel="loss", yscale="log")

    for axis in (bars, curves):
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    return png(figure)


def _means(losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray, int]:
    """Average about 50 groups of consecutive losses.

    Returns:
        The middle step of each group, its mean loss, and the number of steps in a
        group.
    """
    width = max(1, len(losses) // 50)
    count = len(losses) // width
    means = np.array(losses[: count * width]).reshape(count, width).mean(1)
    return (np.arange(count) + 0.5) * width, means, width


# --------------------------------------------------------------------------------------------------
# Amplitudes
# --------------------------------------------------------------------------------------------------


def amplitude(curves: Sequence[Curve]) -> bytes:
    """Plot the 5 and 95 % quantiles of states against t as a PNG, one column for each strategy.

    Below them are the differences to the teacher's quantiles. Quantiles of single
    channels are averaged. A calibrated student has two points at a time: the state
    before and after its calibration.

    Args:
        curves: The curves of amplitude.json: the teacher's, and each student's without
            and with calibration.
    """
    (teacher,) = [curve for curve in curves if curve.strategy == "teacher"]
    students = [curve for curve in curves if curve is not teacher]
    names = list(dict.fromkeys(curve.strategy for curve in students))[:PANELS]
    budgets = list(dict.fromkeys(curve.num_steps for curve in students))[:PANELS]

    # Two panels for each strategy and budget.
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
    for student in students:
        if student.strategy in names and student.num_steps in budgets:
            row = 2 * budgets.index(student.num_steps)
            above, below = axes[row : row + 2, names.index(student.strategy)]
            above.set_title(f"{escaping.label(student.strategy)}, K = {student.num_steps}")
            _draw_amplitude(above, below, teacher, student)

    # Axes.
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for above, below in zip(axes[::2], axes[1::2], strict=True):
        above[0].set_ylabel("5 and 95 % quantiles")
        below[0].set_ylabel("student - teacher\n(95 % solid, 5 % dashed)")
        for axis in below:
            axis.axhline(0, color="0.6", lw=3, zorder=0)
    for axis in axes[-1]:
        axis.set_xlabel("time t  (1 noise, 0 data)")
    axes[0][0].invert_xaxis()

    # Legend.
    truth, uncalibrated, *_, calibrated, _ = axes[0][0].lines  # 95 % before 5 %
    labels = [f"teacher, {teacher.num_steps} steps", "uncalibrated", "calibrated"]
    handles = [truth, uncalibrated, calibrated]
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return png(figure)


def _draw_amplitude(above: Axes, below: Axes, teacher: Curve, student: Curve) -> None:
    """Draw a student's quantiles above, and their differences to the teacher's below."""
    color, marker = ("tab:blue", "o") if student.calibrated else ("tab:red", "s")
    style = {"color": color, "marker": marker, "ms": 4, "lw": 1.3}
    teacher_times = np.array(teacher.times)
    times = np.array(student.times)
    quantiles = ((teacher.high, student.high, "-"), (teacher.low, student.low, "--"))

    for teacher_values, student_values, line in quantiles:
        truth = _over_channels(teacher_values)
        values = _over_channels(student_values)
        if not student.calibrated:
            above.plot(teacher_times, truth, "0.6", lw=5)
        above.plot(times, values, line, **style)
        truth_there = np.interp(times, teacher_times[::-1], truth[::-1])
        below.plot(times, values - truth_there, line, **style)


def _over_channels(values: Sequence) -> np.ndarray:
    """Average values (P,) or (P, C) over channels, (P,)."""
    return np.array(values, dtype=float).reshape(len(values), -1).mean(1)


# --------------------------------------------------------------------------------------------------
# Certificates
# --------------------------------------------------------------------------------------------------


def certificates(found: Sequence[tuple[str, Certificate]]) -> bytes:
    """Plot the PSNR in every setting of certificates as a PNG, one panel for each schedule.

    The shade covers the PSNR inside the certified range.

    Args:
        found: Names of schedules and their certificates.
    """
    panels = found[:PANELS]
    most = max(min(len(certificate.cells), ROWS) for _, certificate in panels)
    width, height = 1 + 5.5 * len(panels), 1.6 + 0.3 * most
    figure, axes = plt.subplots(
        1, len(panels), figsize=(width, height), squeeze=False, layout="constrained"
    )

    for axis, (name, certificate) in zip(axes[0], panels, strict=True):
        _draw_certificate(axis, certificate)
        axis.set_title(escaping.label(name))
        axis.set_xlabel("PSNR to the teacher of the same setting, dB")
        axis.legend(
            frameon=False,
            fontsize=8,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.45 / height * 1.6),
            ncols=3,
        )
    return png(figure)


def _draw_certificate(axis: Axes, certificate: Certificate) -> None:
    """Draw a row for each setting: the baseline, and the schedule with its interval."""
    cells = certificate.cells[:ROWS]
    rows = np.arange(len(cells))
    values = np.array([(cell.psnr, cell.baseline, cell.loss) for cell in cells])
    psnr, baseline, loss = values.T
    intervals = np.array([cell.psnr_interval for cell in cells])
    inside = loss <= certificate.tolerance

    # Shade and baseline.
    least = psnr[0] - certificate.tolerance
    axis.axvspan(least, psnr.max() + 100, color="tab:green", alpha=0.08, lw=0)
    axis.plot(baseline, rows, "d", color="0.6", ms=5, label=certificate.baseline)

    # Settings inside and outside of the range.
    outside_label = f"outside: loses more than {certificate.tolerance:g} dB"
    groups = (
        (inside, "tab:green", "inside of its range"),
        (~inside, "tab:red", outside_label),
    )
    for group, color, label in groups:
        spread = np.abs(intervals[group].T - psnr[group])
        axis.errorbar(
            psnr[group], rows[group], xerr=spread, fmt="o", ms=5, color=color, label=label
        )

    # Axes.
    axis.set_yticks(rows, [escaping.label(setting(cell)) for cell in cells])
    lowest = min(intervals.min(), baseline.min())
    highest = max(intervals.max(), baseline.max())
    axis.set_xlim(lowest - 0.5, highest + 0.5)
    axis.invert_yaxis()
    axis.grid(alpha=0.3, axis="x")


def setting(cell: Cell) -> str:
    """Return the name of a cell's setting, such as guidance=3."""
    return str(cell.value) if cell.axis == "base" else f"{cell.axis}={cell.value}"


def png(figure: Figure) -> bytes:
    """Encode a figure as PNG and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()
