"""Pages that need nothing from elsewhere: page.html with its style, page.js, and one JSON block that the script draws.

The page's own policy (CSP) forbids every request. Text of users is escaped here, or
goes in as text in the script.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.colors import to_hex
from PIL import Image

from oss_exp.evaluation.comparison import Line, Result
from oss_exp.report import plots
from oss_exp.report.records import LARGEST, reduced
from oss_exp.report.results import cost_lines, metric_lines
from oss_exp.schedule import StepSchedule

HERE = Path(__file__).parent
MOST_BYTES = 4 * 2**20  # of pictures in a section of a page
FORMS = (
    (LARGEST, "png"),
    (LARGEST, "jpeg"),
    (128, "jpeg"),
    (64, "jpeg"),
    (32, "jpeg"),
)  # pixels a side; the first that fits


def page(title: str, body: Sequence[str], data: Mapping[str, Any]) -> str:
    """title is text, body HTML; data: {"schedules": schedules(...), "samples": samples(...), ...} or parts of it."""
    template, script = ((HERE / name).read_text("utf-8") for name in ("page.html", "page.js"))
    block = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no </script> inside
    return Template(template).substitute(
        title=html.escape(title), body="\n".join(body), data=block, script=script
    )


def table(header: Sequence[str], cells: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    """Cells as text; kinds: the class of each row, where they have one."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    parts = [f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>']
    for row, kind in zip_longest(cells, kinds, fillvalue=""):
        parts.append(
            f'<tr class="{kind}">'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            + "</tr>"
        )
    return "\n".join([*parts, "</tbody></table></div>"])


def url(picture: Image.Image, form: str) -> str:
    """The picture itself, to stand where an address does; form: png or jpeg."""
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=90, subsampling=0)
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def schedules(
    plans: Sequence[tuple[str, StepSchedule]], teacher: Sequence[float]
) -> dict[str, Any]:
    """The lines of the plot: as `plots.schedules`, per-sample schedules as a band around their median."""
    colors, lines = plots.colors(plans), []
    for name, plan in plans:
        times, band = plan.times.numpy(), {}
        if times.ndim == 2:
            low, times, high = np.quantile(times, [0.1, 0.5, 0.9], axis=0)
            band = {"low": _rounded(low), "high": _rounded(high), "samples": len(plan.times)}
        elif plan.orders is not None:
            band = {"orders": plan.orders.tolist()}
        lines.append(
            {
                "name": name,
                "k": plan.num_steps,
                "color": to_hex(colors[name]),
                "baseline": bool(plan.about("strategy").get("baseline", False)),
                "kind": plan.kind,
                "times": _rounded(times),
                **band,
            }
        )
    return {"teacher": _rounded(teacher), "lines": lines}


def measured(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The panels of every metric against K; none where there is one K."""
    if len({line.result.num_steps for line in lines}) < 2:
        return []
    baselines = {line.result.strategy: line.result.baseline for line in lines}
    panels = metric_lines(lines)
    by_hand = {
        name: baselines[name.partition(" (run ")[0]]
        for curves in panels.values()
        for name in curves
    }
    colors = plots.strong_and_muted(by_hand)
    return [
        {
            "title": f"{metric} against K",
            "across": "K",
            "up": metric,
            "lines": _curves(curves, colors, by_hand),
        }
        for metric, curves in panels.items()
    ]


def costs(plans: Sequence[tuple[str, StepSchedule]]) -> list[dict[str, Any]]:
    """The panels, one a K, of what the rounds of the dynamic programs cost."""
    found, colors = cost_lines(plans), plots.colors(plans)
    panels = []
    for k in sorted({k for _, k in found}):
        curves = {name: found[name, own] for name, own in found if own == k}
        lines = _curves(curves, colors, dict.fromkeys(curves, False))
        if max(max(line["y"]) for line in lines) > 0:
            panels.append(
                {"title": f"K = {k}", "across": "round", "up": "cost", "log": True, "lines": lines}
            )
    return panels


def _curves(
    curves: Mapping[str, Mapping[int, float]],
    colors: Mapping[str, plots.Color],
    by_hand: Mapping[str, bool],
) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "color": to_hex(colors[name]),
            "baseline": by_hand[name],
            "x": list(curve),
            "y": _rounded(curve.values()),
        }
        for name, curve in curves.items()
    ]


def samples(pictures: Mapping[str, np.ndarray], results: Sequence[Result]) -> dict[str, Any]:
    """The rows of the grid of samples: each a strip of its n pictures, the frames of videos below each other.

    pictures: (n, H, W, C) bytes of each, or (n, F, H, W, C). Reduced, and of less
    quality, until they fit on a page.
    """
    videos = {label: each if each.ndim == 5 else each[:, None] for label, each in pictures.items()}
    frames, milliseconds = plots.moments(videos["teacher"].shape[1])
    strips, shape = _strips({label: each[:, frames] for label, each in videos.items()})
    rows = [{"label": "teacher", "name": "teacher", "k": None}]
    for label, result in plots.ordered(pictures, results):
        values = [
            f"{result.values[index]:.2f}" for index in sorted(result.values)[: len(pictures[label])]
        ]
        rows.append(
            {"label": label, "name": result.strategy, "k": result.num_steps, "values": values}
        )
        rows[-1]["psnr"] = f"{result.psnr.mean:.2f} dB"
    for row in rows:
        row["strip"] = strips[row["label"]]
    inferno = "".join(to_hex(color)[1:] for color in plots.palette("inferno"))
    return {
        **shape,
        "frames": len(frames),
        "milliseconds": milliseconds,
        "inferno": inferno,
        "rows": rows,
    }


def trajectories(ways: Mapping[str, np.ndarray], results: Sequence[Result]) -> dict[str, Any]:
    """The rows of the predictions on the way: each a strip of n columns, its P steps below each other.

    ways: times/<label> (n, P) and x0/<label> (n, P, H, W, C) bytes, of the teacher and
    schedules (trajectories.npz).
    """
    pictures = {
        key.removeprefix("x0/"): each for key, each in ways.items() if key.startswith("x0/")
    }
    strips, shape = _strips(pictures)
    known = [
        ("teacher", None),
        *((label, result.num_steps) for label, result in plots.ordered(pictures, results)),
    ]
    rows = [
        {
            "label": label,
            "name": label.removesuffix(f" K={k}"),
            "k": k,
            "times": [_rounded(times) for times in ways[f"times/{label}"]],
            "strip": strips[label],
        }
        for label, k in known
    ]
    return {**shape, "rows": rows}


def _strips(videos: Mapping[str, np.ndarray]) -> tuple[dict[str, str], dict[str, Any]]:
    """(n, F, H, W, C) bytes of each, F its own -> a strip of each in the first form in which all fit; its shape."""
    smaller = (_strips_of(videos, side, form) for side, form in FORMS)
    strips = next(smaller)
    while sum(map(len, strips[0].values())) > MOST_BYTES and (following := next(smaller, None)):
        strips = following
    return strips


def _strips_of(
    videos: Mapping[str, np.ndarray], side: int, form: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """As `_strips`, in this form."""
    small = {label: reduced(each, side) for label, each in videos.items()}
    height, width = small["teacher"].shape[2:4]
    strips = {label: _strip(each, form) for label, each in small.items()}
    return strips, {"width": width, "height": height, "form": form}


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _strip(videos: np.ndarray, form: str) -> str:
    """(n, F, H, W, C) bytes -> a picture of F H x n W pixels as a URL."""
    n, frames, height, width, channels = videos.shape
    strip = videos.transpose(1, 2, 0, 3, 4).reshape(frames * height, n * width, channels)
    return url(Image.fromarray(strip[..., 0] if channels == 1 else strip), form)
