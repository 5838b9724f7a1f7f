"""The page of a large run stays usable by mouse and keyboard, in light, in dark and on a phone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import DARK, PHONE, needs_browser, visited

from oss_exp.evaluation.psnr import Interval
from oss_exp.report import plots, write
from oss_exp.schedule import Pinned, StepSchedule

NAMES = [f"s{number:02d}" for number in range(50)]
SEARCHED = NAMES[:20]
BUDGETS = (4, 10)
SAMPLES = 2000
PICTURES = 64
PER_SAMPLE = NAMES[3]


def plan(name: str, k: int) -> StepSchedule:
    """Return the schedule of a strategy, which is one of 2,000 samples for one of them."""
    times = torch.linspace(1, 0, k + 1, dtype=torch.float64) ** (1 + NAMES.index(name) / 20)
    provenance = {"strategy": {"name": name, "baseline": name not in SEARCHED}}
    if name in SEARCHED:
        provenance["planning"] = {"cost_per_round": np.geomspace(1e-4, 0.1, k).tolist()}
    if name != PER_SAMPLE:
        return StepSchedule(times, Pinned(), provenance=provenance)
    powers = torch.linspace(0.8, 1.25, SAMPLES, dtype=torch.float64)[:, None]
    return StepSchedule(
        times**powers, Pinned(), samples=tuple(range(SAMPLES)), provenance=provenance
    )


def measured(name: str, k: int) -> dict:
    """Return the row of metrics.json of a strategy."""
    values = NAMES.index(name) / 2 + k + np.sin(np.arange(SAMPLES))
    return {
        "strategy": name,
        "num_steps": k,
        "baseline": name not in SEARCHED,
        "start": "pinned",
        "nfe": k,
        "planning": {},
        "metrics": {},
        "psnr": Interval.of(values).to_dict(),
        "spread": Interval.of(np.ones(SAMPLES)).to_dict(),
        "per_image": {"index": list(range(SAMPLES)), "psnr": values.round(4).tolist()},
    }


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A run of 50 strategies at two budgets on 2,000 samples; only its page is drawn."""
    folder = tmp_path_factory.mktemp("large")
    picture = np.arange(PICTURES * 64, dtype=np.uint8).reshape(PICTURES, 8, 8, 1)
    pictures = {"teacher": picture}
    rows = []
    for name in NAMES:
        for k in BUDGETS:
            plan(name, k).save(folder / "schedules" / f"{name}_{k}.json")
            rows.append(measured(name, k))
            pictures[f"{name} K={k}"] = picture
    np.savez(folder / "samples.npz", **pictures)

    teacher = {"noise_schedule": {"name": "FlowSchedule"}, "num_steps": 10}
    run = {"model": {"name": "large"}, "teacher": teacher, "solver": {}, "seed": 0}
    metrics = {**run, "teacher_metrics": {}, "rows": rows}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "teacher.json").write_text(json.dumps({"times": np.linspace(1, 0, 11).tolist()}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "schedules", lambda *_: b"")
        patch.setattr(plots, "samples", lambda *_: b"")
        write(folder)
    return folder


def test_50_strategies_and_2000_samples_fit_on_a_page_below_a_megabyte(large):
    assert (large / "report.html").stat().st_size < 2**20


@pytest.mark.slow
@needs_browser
def test_a_filter_leaves_the_rows_lines_and_pictures_of_the_names_that_match(large):
    result = visited(
        large,
        """async function visit(found) {
          const filter = document.getElementById("filter");
          const visible = query => all(query).filter(each => each.getClientRects().length).length;
          const counts = () => [filter.form.querySelector("output").textContent, visible("tbody tr"),
            visible("#panels .line"), visible("#legend button"), visible("#costs .line"), visible("#grid canvas")];
          found.counts = [];
          for (const text of ["", "S07, s4", "no such name", ""]) {
            filter.value = text;
            filter.oninput();
            found.counts.push(counts());
          }
        }""",
    )

    everything = ["100 of 100 rows", 100, 100, 50, 40, 101]
    assert result.get("error") is None
    assert result["counts"] == [
        everything,
        ["22 of 100 rows", 22, 22, 11, 2, 23],  # and the teacher's pictures
        ["0 of 100 rows", 0, 0, 0, 0, 1],
        everything,
    ]


@pytest.mark.slow
@needs_browser
def test_hide_all_and_show_all_act_on_what_the_filter_leaves(large):
    result = visited(
        large,
        """async function visit(found) {
          const filter = document.getElementById("filter");
          const [show, hide] = all("button", document.getElementById("legend").nextElementSibling);
          const lines = () => all("#panels .line").filter(each => each.getClientRects().length).length;
          const type = text => { filter.value = text; filter.oninput(); };
          type("s1"); hide.click(); type(""); found.hidden = lines();
          type("s11"); show.click(); type(""); found.shown = lines();
        }""",
    )
    assert (result.get("error"), result["hidden"], result["shown"]) == (None, 80, 82)


@pytest.mark.slow
@needs_browser
def test_arrow_keys_walk_through_a_chart(large):
    result = visited(
        large,
        """async function visit(found) {
          const svg = document.querySelector("#panels svg"), tip = document.getElementById("tip");
          const at = () => document.activeElement;
          const press = key => at().dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
          found.chart = [svg.tabIndex, svg.role, svg.ariaLabel];
          svg.focus();
          found.labels = [];
          for (const key of ["ArrowRight", "ArrowRight", "End", "ArrowRight", "ArrowDown", "ArrowUp", "Home"]) {
            press(key);
            found.labels.push(at().ariaLabel);
          }
          found.tip = [tip.hidden, tip.textContent];
          found.near = all(".near", svg).map(group => group.dataset.name);
          press("Escape");
          found.left = [at() === svg, tip.hidden, all(".near", svg).length];
        }""",
    )

    assert result.get("error") is None
    label = "K = 4: time t (1 noise, 0 data) by step, 50 lines. Arrow keys read the points."
    assert result["chart"] == [0, "application", label]
    points = [re.sub(r": t.*", "", text) for text in result["labels"]]
    first, second = "s20, K = 4", "s21, K = 4"  # baselines are below, and come first
    assert points == [
        *(f"{first}, step {step}" for step in (0, 1, 4, 4)),
        f"{second}, step 4",
        f"{first}, step 4",
        f"{first}, step 0",
    ]
    assert result["labels"][0] == "s20, K = 4, step 0: t = 1, pinned start"
    assert result["tip"] == [False, "s20, K = 4\nstep 0: t = 1\npinned start"]
    assert result["near"] == ["s20"]
    assert result["left"] == [True, True, 0]


@pytest.mark.slow
@needs_browser
def test_lists_of_any_length_are_one_tab_stop_and_every_control_has_a_name(large):
    result = visited(
        large,
        """async function visit(found) {
          const controls = all("button, input, summary, canvas, [tabindex]").filter(each => each.getClientRects().length);
          found.stops = controls.filter(each => each.tabIndex >= 0).length;
          const name = each => each.ariaLabel || each.textContent.trim() || each.labels?.[0]?.textContent;
          found.unnamed = controls.filter(each => !name(each) && each.tagName !== "circle").length;

          const legend = document.getElementById("legend"), at = () => document.activeElement;
          const press = key => at().dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
          legend.focus();
          found.legend = ["ArrowRight", "ArrowDown", "ArrowLeft", "ArrowLeft"].map(key => (press(key), at().textContent));
          found.near = [...new Set(all("#panels .near").map(group => group.dataset.name))];

          const dialog = document.querySelector("dialog");
          document.getElementById("grid").focus();
          press("ArrowDown");
          press("ArrowDown");
          found.row = at().ariaLabel;
          press("Enter");
          found.opened = [dialog.open, dialog.querySelector("p").textContent];
        }""",
    )

    assert result.get("error") is None
    assert result["stops"] < 50
    assert result["unnamed"] == 0
    assert result["legend"] == ["s00", "s01", "s00", "s49"]
    assert result["near"] == ["s49"]
    name, value = re.fullmatch(r"(s49 K=4), 64 samples, (.*) dB", result["row"]).groups()
    assert result["opened"][0]
    assert result["opened"][1].startswith(f"{name}, sample 0: ")
    assert float(value) == pytest.approx(28.5, abs=0.1)


@pytest.mark.slow
@needs_browser
def test_a_table_behind_a_chart_has_its_values(large):
    result = visited(
        large,
        """async function visit(found) {
          const details = document.querySelector("#panels details");
          found.before = all("table", details).length;
          details.open = true;
          await wait(100);
          found.rows = all("tr", details).map(row => [...row.cells].map(each => each.textContent));
          all("th button", details)[1].click();
          found.sorted = all("th", details)[1].ariaSort;
        }""",
    )

    assert (result.get("error"), result["before"], result["sorted"]) == (None, 0, "descending")
    header, *rows = result["rows"]
    assert header == ["strategy", *(f"step {step}" for step in range(5))]
    assert [row[0] for row in rows] == NAMES
    times = {name: plan(name, 4).times for name in NAMES}
    for name, *cells in rows:
        if name != PER_SAMPLE:
            assert [float(cell) for cell in cells] == pytest.approx(times[name].tolist(), rel=1e-3)
    low, middle, high = np.quantile(times[PER_SAMPLE], [0.1, 0.5, 0.9], axis=0)[:, 1]
    assert rows[3][2] == f"{middle:.4g} ({low:.4g} to {high:.4g})"


def contrast(first: str, second: str) -> float:
    """Return the contrast of two computed CSS colours (WCAG 2.2, 1.4.3)."""
    luminances = []
    for color in (first, second):
        numbers = np.array([float(number) for number in re.findall(r"[\d.]+", color)[:3]])
        share = numbers if color.startswith("color(") else numbers / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        luminances.append(linear @ [0.2126, 0.7152, 0.0722])
    low, high = sorted(luminances)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(("options", "is_dark"), [((), False), ((DARK,), True)])
def test_text_and_lines_stand_out_in_light_and_dark(large, options, is_dark):
    result = visited(
        large,
        """async function visit(found) {
          const style = (each, name) => getComputedStyle(each)[name];
          found.paper = style(document.body, "backgroundColor");
          found.texts = all("body, .note, th, td, output, #legend button, button.none").map(each => style(each, "color"));
          found.texts.push(...all("#panels text").map(each => style(each, "fill")));
          found.lines = all("#panels .line").map(each => style(each, "stroke"));
        }""",
        *options,
    )

    assert result.get("error") is None
    assert (contrast(result["paper"], "rgb(0, 0, 0)") < 2) == is_dark
    assert min(contrast(color, result["paper"]) for color in result["texts"]) >= 4.5
    assert min(contrast(color, result["paper"]) for color in result["lines"]) >= 3


@pytest.mark.slow
@needs_browser
def test_a_phone_scrolls_only_downwards(large):
    result = visited(
        large,
        """async function visit(found) {
          found.widths = [document.documentElement.scrollWidth, innerWidth];
        }""",
        PHONE,
    )
    assert result["widths"][0] <= result["widths"][1] <= 500
