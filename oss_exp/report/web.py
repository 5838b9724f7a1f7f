"""Self-contained HTML pages: page.html with its style, two scripts, and a JSON block to draw.

The page's own policy (CSP) forbids every request. Text from users is escaped here, or
inserted as text by the scripts.

The charts are drawn by charts.js, about 260 lines, and not by a library. The page of a
small run has 100 kB; a minified library would add to every page 53 kB (uPlot 1.6), 210 kB
(Chart.js 4.6), 490 kB (Observable Plot 0.6 and D3 7), 832 kB (Vega 6, Vega-Lite 6 and
Vega-Embed 7, whose expressions need `eval`, which the policy forbids) or 1,192 kB (basic
bundle of plotly.js 4.1). It would replace some 90 lines: scales, ticks and lines. uPlot and
Chart.js draw on a canvas, where a screen reader finds nothing, and in none of the five do
the arrow keys walk from point to point, with a table of the values behind each chart. That,
the legend and the filter are the other two thirds, and would be written by hand all the same.
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

# Pixels a side and file format of pictures; the first that fits is used.
FORMS = (
    (LARGEST, "png"),
    (LARGEST, "jpeg"),
    (128, "jpeg"),
    (64, "jpeg"),
    (32, "jpeg"),
)


def page(title: str, body: Sequence[str], data: Mapping[str, Any]) -> str:
    """Return the text of a page.

    Args:
        title: Text.
        body: Pieces of HTML.
        data: Data of the script's drawings, such as {"schedules": schedules(...)}.
    """
    template = (HERE / "page.html").read_text("utf-8")
    scripts = [(HERE / name).read_text("utf-8") for name in ("page.js", "charts.js")]
    block = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no </script> inside
    return Template(template).substitute(
        title=html.escape(title), body="\n".join(body), data=block, script="\n".join(scripts)
    )


def table(header: Sequence[str], cells: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    """Return an HTML table of texts.

    Args:
        header: Names of the columns.
        cells: Rows.
        kinds: CSS class of each row; may be empty.
    """
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    parts = [f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>']
    for row, kind in zip_longest(cells, kinds, fillvalue=""):
        texts = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        parts.append(f'<tr class="{kind}">{texts}</tr>')
    return "\n".join([*parts, "</tbody></table></div>"])


def url(picture: Image.Image, form: str) -> str:
    """Return a picture as a data URL; `form` is png or jpeg."""
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=90, subsampling=0)
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def schedules(
    plans: Sequence[tuple[str, StepSchedule]], teacher: Sequence[float]
) -> dict[str, Any]:
    """Return the data of the plot of schedules, which shows the same as `plots.schedules`."""
    colors = plots.colors(plans)
    lines = []
    for name, plan in plans:
        # Band of per-sample schedules, or orders.
        times = plan.times.numpy()
        band = {}
        if times.ndim == 2:
            low, times, high = np.quantile(times, [0.1, 0.5, 0.9], axis=0)
            band = {"low": _rounded(low), "high": _rounded(high), "samples": len(plan.times)}
        elif plan.orders is not None:
            band = {"orders": plan.orders.tolist()}

        # Line.
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
    """Return the panels of every metric against K; none where there is one K."""
    if len({line.result.num_steps for line in lines}) < 2:
        return []
    baselines = {line.result.strategy: line.result.baseline for line in lines}
    panels = metric_lines(lines)

    # Colours.
    by_hand = {}
    for curves in panels.values():
        for name in curves:
            by_hand[name] = baselines[name.partition(" (run ")[0]]
    colors = plots.strong_and_muted(by_hand)

    # Panels.
    data = []
    for metric, curves in panels.items():
        lines_of_panel = _curves(curves, colors, by_hand)
        title = f"{metric} against K"
        data.append({"title": title, "across": "K", "up": metric, "lines": lines_of_panel})
    return data


def costs(plans: Sequence[tuple[str, StepSchedule]]) -> list[dict[str, Any]]:
    """Return the panels of the costs of the dynamic programs' rounds, one for each K."""
    curves_of: dict[int, dict[str, dict[int, float]]] = {}
    for (name, k), curve in cost_lines(plans).items():
        curves_of.setdefault(k, {})[name] = curve

    colors = plots.colors(plans)
    panels = []
    for k, curves in sorted(curves_of.items()):
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
    """Return the data of the lines of a panel."""
    lines = []
    for name, curve in curves.items():
        line = {
            "name": name,
            "color": to_hex(colors[name]),
            "baseline": by_hand[name],
            "x": list(curve),
            "y": _rounded(curve.values()),
        }
        lines.append(line)
    return lines


def samples(pictures: Mapping[str, np.ndarray], results: Sequence[Result]) -> dict[str, Any]:
    """Return the data of the grid of samples.

    Each row is a strip of n pictures, with the frames of videos below each other.
    Pictures are reduced, and lose quality, until they fit on a page.

    Args:
        pictures: Samples by label, uint8, (n, H, W, C) or (n, F, H, W, C).
        results: Results of the schedules.
    """
    # Strips.
    teacher = pictures["teacher"]
    frames, milliseconds = plots.moments(teacher.shape[1] if teacher.ndim == 5 else 1)
    videos = {}
    for label, images in pictures.items():
        videos[label] = images[:, frames] if images.ndim == 5 else images[:, None]
    strips, shape = _strips(videos)

    # Rows.
    rows: list[dict[str, Any]] = [
        {"label": "teacher", "name": "teacher", "k": None, "strip": strips["teacher"]}
    ]
    for label, result in plots.ordered(pictures, results):
        indices = sorted(result.values)[: len(pictures[label])]
        row = {
            "label": label,
            "name": result.strategy,
            "k": result.num_steps,
            "values": [f"{result.values[index]:.2f}" for index in indices],
            "psnr": f"{result.psnr.mean:.2f} dB",
            "strip": strips[label],
        }
        rows.append(row)

    inferno = "".join(to_hex(color)[1:] for color in plots.palette("inferno"))
    return {
        **shape,
        "frames": len(frames),
        "milliseconds": milliseconds,
        "inferno": inferno,
        "rows": rows,
    }


def trajectories(ways: Mapping[str, np.ndarray], results: Sequence[Result]) -> dict[str, Any]:
    """Return the data of the predictions along the trajectories.

    Each row is a strip of n columns, with its P steps below each other.

    Args:
        ways: The arrays of trajectories.npz: times/<label> (n, P) and x0/<label>,
            uint8, (n, P, H, W, C).
        results: Results of the schedules.
    """
    pictures = {}
    for key, array in ways.items():
        if key.startswith("x0/"):
            pictures[key.removeprefix("x0/")] = array
    strips, shape = _strips(pictures)

    # Rows.
    steps_of: dict[str, int | None] = {"teacher": None}
    for label, result in plots.ordered(pictures, results):
        steps_of[label] = result.num_steps
    rows = []
    for label, k in steps_of.items():
        row = {
            "label": label,
            "name": label.removesuffix(f" K={k}"),
            "k": k,
            "times": [_rounded(times) for times in ways[f"times/{label}"]],
            "strip": strips[label],
        }
        rows.append(row)
    return {**shape, "rows": rows}


def _strips(videos: Mapping[str, np.ndarray]) -> tuple[dict[str, str], dict[str, Any]]:
    """Return a strip of each video (n, F, H, W, C), in the first form in which all fit.

    Returns:
        Data URLs by label, and the shape of their pictures.
    """
    strips, shape = _strips_of(videos, *FORMS[0])
    for side, form in FORMS[1:]:
        if sum(map(len, strips.values())) <= MOST_BYTES:
            break
        strips, shape = _strips_of(videos, side, form)
    return strips, shape


def _strips_of(
    videos: Mapping[str, np.ndarray], side: int, form: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return strips as `_strips`, in one form."""
    small = {label: reduced(video, side) for label, video in videos.items()}
    height, width = small["teacher"].shape[2:4]
    strips = {label: _strip(video, form) for label, video in small.items()}
    return strips, {"width": width, "height": height, "form": form}


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _strip(videos: np.ndarray, form: str) -> str:
    """Return videos (n, F, H, W, C) as a data URL of one picture, F H x n W pixels."""
    n, frames, height, width, channels = videos.shape
    strip = videos.transpose(1, 2, 0, 3, 4).reshape(frames * height, n * width, channels)
    return url(Image.fromarray(strip[..., 0] if channels == 1 else strip), form)
