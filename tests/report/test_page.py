"""The page of a run holds its data, escaped and whole, and does in a browser what it says, without any network."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from browser import needs_browser, visited
from PIL import Image

from oss_exp.evaluation.psnr import Interval
from oss_exp.report import geneval, web, write
from oss_exp.report.results import read_run
from oss_exp.schedule import Free, Pinned, StepSchedule

EVIL = """<script><img src=x onerror="document.title='broken'">&amp;'"""
NAMES = ("edm", "ours", EVIL)
PLANS = {
    ("edm", 2): [1, 0.4, 0],
    ("ours", 2): [1, 0.7, 0],
    (EVIL, 2): [0.9, 0.5, 0],
    ("ours", 3): [1, 0.8, 0.3, 0],
}
VALUES = {("edm", 2): 30.0, ("ours", 2): 9.5, (EVIL, 2): 20.0, ("ours", 3): 40.0}
COUNT = 3
END = f"</script>{EVIL}"  # which no name may hold, for its /


def made(folder: Path, shape: tuple[int, ...]) -> Path:
    """A run of these schedules whose samples are noise of this shape."""
    rng = np.random.default_rng(0)
    rows, pictures = [], {"teacher": rng.integers(0, 256, (COUNT, *shape), dtype=np.uint8)}
    for (name, k), times in PLANS.items():
        values = VALUES[name, k] + np.arange(COUNT)
        measured = {
            "psnr": Interval.of(values).to_dict(),
            "spread": Interval.of(np.ones(COUNT)).to_dict(),
        }
        images = {"index": [100, 101, 102], "psnr": values.tolist()}
        fixed = {"start": "pinned", "nfe": k, "planning": {}, "metrics": {}}
        row = {"strategy": name, "num_steps": k, "baseline": name == "edm"}
        rows.append({**row, **fixed, **measured, "per_image": images})
        pictures[f"{name} K={k}"] = rng.integers(0, 256, (COUNT, *shape), dtype=np.uint8)
        about = {"strategy": {"name": name, "baseline": name == "edm"}}
        if k == 3:
            about["planning"] = {"cost_per_round": [1e-20, 0.01, 0.1]}
        start = Free() if name == EVIL else Pinned()
        plan = StepSchedule(torch.tensor(times), start, provenance=about)
        plan.save(folder / "schedules" / f"{NAMES.index(name)}_{k}.json")
    own = torch.tensor([[1, 0.6, 0.0], [1, 0.8, 0.0]])
    StepSchedule(own, samples=(0, 1), provenance={"strategy": {"name": "own"}}).save(
        folder / "schedules" / "own_2.json"
    )
    teacher = {"noise_schedule": {"name": "FlowSchedule"}, "num_steps": 10}
    run = {
        "model": {"name": f"m {EVIL}"},
        "teacher": teacher,
        "solver": {},
        "seed": 0,
        "teacher_metrics": {},
    }
    (folder / "metrics.json").write_text(json.dumps({**run, "rows": rows}))
    (folder / "config.yaml").write_text(
        "num_teacher_steps: ${oc.env:HOME}\nnoise_schedule: {_target_: os.mkdir, path: made_by_a_report}\n"
        f"model: {json.dumps(END)}\n"
    )
    (folder / "teacher.json").write_text(json.dumps({"times": np.linspace(1, 0, 11).tolist()}))
    np.savez(folder / "samples.npz", **pictures)
    ways = {f"times/{name} K={k}": np.array([times] * 2) for (name, k), times in PLANS.items()}
    ways = {"times/teacher": np.array([[1, 0.25, 0]] * 2), **ways, **{"times/own K=2": own.numpy()}}
    for key, times in list(ways.items()):
        ways[key.replace("times", "x0")] = rng.integers(
            0, 256, (*times.shape, *shape[-3:]), dtype=np.uint8
        )
    np.savez(folder / "trajectories.npz", **ways)
    write(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("run"), (6, 5, 3))


def block(folder: Path) -> dict:
    """What the page's script draws."""
    page = (folder / "report.html").read_text()
    (found,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL
    )
    return json.loads(found)


# --------------------------------------------------------------------------------------------------------------
# What is in it
# --------------------------------------------------------------------------------------------------------------


def test_the_pictures_are_those_of_the_run_bit_for_bit(run):
    found = block(run)["samples"]
    assert (found["width"], found["height"], found["frames"], found["form"]) == (5, 6, 1, "png")
    assert [row["label"] for row in found["rows"]] == [
        "teacher",
        "edm K=2",
        f"{EVIL} K=2",
        "ours K=2",
        "ours K=3",
    ]
    with np.load(run / "samples.npz") as pictures:
        for row in found["rows"]:
            strip = Image.open(io.BytesIO(base64.b64decode(row["strip"].split(",")[1])))
            assert np.array_equal(
                np.asarray(strip), np.concatenate(list(pictures[row["label"]]), axis=1)
            )
    assert found["rows"][2]["values"] == ["20.00", "21.00", "22.00"]


def test_the_ways_are_those_of_the_run_bit_for_bit(run):
    rows = block(run)["trajectories"]["rows"]
    order = [("teacher", None), ("edm", 2), (EVIL, 2), ("ours", 2), ("ours", 3)]
    assert [(row["name"], row["k"]) for row in rows] == order
    with np.load(run / "trajectories.npz") as ways:
        for row in rows:
            found = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["strip"].split(",")[1]))))
            expected = np.concatenate(
                [np.concatenate(list(way)) for way in ways[f"x0/{row['label']}"]], axis=1
            )
            assert np.array_equal(found, expected)
            assert row["times"] == ways[f"times/{row['label']}"].tolist()


def test_the_lines_are_the_schedules(run):
    found = block(run)["schedules"]
    lines = {(line["name"], line["k"]): line for line in found["lines"]}
    assert {key: line["times"] for key, line in lines.items() if key[0] != "own"} == PLANS
    assert [name for (name, _), line in lines.items() if line["baseline"]] == ["edm"]
    own = lines["own", 2]
    assert (own["low"][1], own["times"][1], own["high"][1], own["samples"]) == (0.62, 0.7, 0.78, 2)
    assert found["teacher"] == pytest.approx(np.linspace(1, 0, 11).tolist())
    assert len({line["color"] for line in lines.values()}) == 4
    (psnr,) = block(run)["curves"]["measured"]
    assert {line["name"]: (line["x"], line["y"]) for line in psnr["lines"]} == {
        "edm": ([2], [31.0]),
        EVIL: ([2], [21.0]),
        "ours": ([2, 3], [10.5, 41.0]),
    }
    (costs,) = block(run)["curves"]["costs"]
    assert [(line["name"], line["x"], line["y"]) for line in costs["lines"]] == [
        ("ours", [1, 2, 3], [1e-20, 0.01, 0.1])
    ]


def test_what_users_write_is_text(run):
    page = (run / "report.html").read_text()
    assert "<img" not in page
    assert page.count("</script>") == 2  # the data and the script
    shown = html.escape(EVIL)
    assert page.count(f"<td>{shown}</td>") == 1
    assert page.count(f"m {shown}: few-step") == 2  # title and headline
    assert f"model: {html.escape(json.dumps(END))}" in page


def test_a_configuration_is_only_shown(run):
    assert (
        "num_teacher_steps: ${oc.env:HOME}\nnoise_schedule: {_target_: os.mkdir"
        in (run / "report.html").read_text()
    )
    assert not Path("made_by_a_report").exists()


def test_pictures_are_reduced_until_they_fit(run, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, 80, 40, 3), dtype=np.uint8)
    pictures = {"teacher": noise, **{f"{name} K={k}": noise for name, k in PLANS}}
    seen = []
    for most in (10**6, 150_000, 60_000, 100):
        monkeypatch.setattr(web, "MOST_BYTES", most)
        found = web.samples(pictures, read_run(run))
        seen.append((found["form"], found["width"], found["height"]))
        total = sum(len(row["strip"]) for row in found["rows"])
        assert total <= max(most, 20_000)  # the smallest form is taken whatever its size
    assert seen == [("png", 40, 80), ("jpeg", 40, 80), ("jpeg", 32, 64), ("jpeg", 16, 32)]


def test_genevals_page_escapes_and_keeps_every_budget(tmp_path):
    rows = []
    for label, k in (("teacher", 9), ("oss_2", 2), ("oss_4", 4)):
        picture = tmp_path / "images" / label / "000000.png"
        picture.parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(picture)
        verdict = {"number": 0, "reasons": [END], "objects": {}}
        rows.append({"label": label, "num_steps": k, "nfe": k, "verdicts": [verdict]})
    wish = {
        "tag": "colors",
        "include": [{"class": "dress", "count": 1, "color": "red"}],
        "prompt": END,
    }
    found = {"prompts": [wish], "images_per_prompt": 1, "rows": rows}
    (tmp_path / "geneval.json").write_text(json.dumps(found))
    table, page = geneval.files(tmp_path).values()
    assert re.findall(r"^\| (\S+ \(\d\))", table, re.MULTILINE) == [
        *("teacher (9)", "oss (2)", "oss (4)"),
        *("oss (2)", "oss (4)"),
    ]
    assert 'onerror="' not in page
    assert page.count(html.escape(END)) == 6


# --------------------------------------------------------------------------------------------------------------
# What it does
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_browser
def test_a_page_sorts_hides_names_and_enlarges(run):
    found = visited(
        run,
        """async function visit(found) {
          // Sort.
          const column = number => all("tbody tr").map(row => row.cells[number].textContent);
          const click = number => { all("th")[number].click(); return column(0); };
          found.sorted = [click(0), click(4), click(4), click(5), click(1)];

          // Hide.
          const shown = () => all("#panels svg").map(svg =>
            all("g", svg).filter(group => group.style.display !== "none").map(group => group.dataset.name));
          const buttons = all("#legend button");
          found.legend = buttons.map(button => button.textContent);
          const ours = buttons.find(button => button.textContent === "ours");
          found.shown = [shown()];
          for (const act of ["click", "click", "dblclick", "dblclick"]) {
            ours.dispatchEvent(new MouseEvent(act));
            found.shown.push(shown());
          }

          // Name.
          const tip = document.getElementById("tip");
          const point = all("circle", all("#panels g").find(group => group.dataset.name === "ours"))[1];
          const box = point.getBoundingClientRect();
          const move = { clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, bubbles: true };
          found.silent = tip.hidden;
          point.dispatchEvent(new PointerEvent("pointermove", move));
          found.tip = [tip.hidden, tip.textContent];
          point.closest("svg").dispatchEvent(new PointerEvent("pointerleave"));
          found.left = tip.hidden;

          // Enlarge.
          const rows = all("#grid canvas"), dialog = document.querySelector("dialog");
          found.rows = rows.map(row => pixels(row, 15, 6));
          document.getElementById("errors").click();
          found.errors = rows.map(row => pixels(row, 15, 6));
          rows[3].scrollIntoView();
          const at = rows[3].getBoundingClientRect();
          rows[3].dispatchEvent(new MouseEvent("click", { clientX: at.x + 0.5 * at.width, clientY: at.y + 3 }));
          const large = () => ({ text: dialog.querySelector("p").textContent, open: dialog.open,
            captions: all("dialog figcaption").map(each => each.textContent),
            wide: all("dialog canvas")[0].clientWidth, smooth: getComputedStyle(all("dialog canvas")[0]).imageRendering,
            pixels: all("dialog canvas").map(each => pixels(each, 5, 6)) });
          found.large = large();
          for (const key of ["ArrowLeft", "ArrowDown"]) dialog.dispatchEvent(new KeyboardEvent("keydown", { key }));
          found.moved = large();
          dialog.click();
          found.closed = !dialog.open;

          // No network.
          found.loaded = performance.getEntriesByType("resource").filter(each => !each.name.startsWith("data:")).length;
          let refused = null;
          document.addEventListener("securitypolicyviolation", event => { refused = event.blockedURI; });
          new Image().src = "http://127.0.0.1:9/x.png";
          await wait(100);
          found.refused = refused;
          found.title = document.title;
        }""",
    )
    assert "error" not in found

    assert found["sorted"][0] == [EVIL, "edm", "ours", "ours"]
    assert found["sorted"][1] == ["ours", "edm", EVIL, "ours"]  # PSNR: as numbers, 9.5 is the least
    assert found["sorted"][2] == ["ours", EVIL, "edm", "ours"]
    assert found["sorted"][3] == [
        "edm",
        EVIL,
        "ours",
        "ours",
    ]  # gain: 0 of the best baseline, no value last
    assert found["sorted"][4] == [
        "ours",
        "edm",
        EVIL,
        "ours",
    ]  # budgets, the last order within them

    everything = [["edm", "ours", EVIL, "own"], ["ours"]]
    hidden, alone = [["edm", EVIL, "own"], []], [["ours"], ["ours"]]
    assert sorted(found["legend"]) == sorted([*NAMES, "own"])
    seen = [[sorted(panel) for panel in panels] for panels in found["shown"]]
    expected = [everything, hidden, everything, alone, everything]
    assert seen == [[sorted(panel) for panel in panels] for panels in expected]

    assert found["silent"] is found["left"] is True
    assert found["tip"] == [False, "ours, K = 2\nstep 1: t = 0.7\npinned start"]

    with np.load(run / "samples.npz") as file:
        labels = ["teacher", "edm K=2", f"{EVIL} K=2", "ours K=2", "ours K=3"]
        pictures = [np.concatenate(list(file[label]), axis=1) for label in labels]

    def rgb(values: list[int], width: int) -> np.ndarray:
        return np.array(values).reshape(6, width, 4)[..., :3]

    bright = np.array(matplotlib.colormaps["inferno"].colors)
    errors = [np.abs(picture.astype(float) - pictures[0]).mean(-1) for picture in pictures]
    errors = [
        np.round(255 * bright[np.floor(2 * each + 0.5).clip(0, 255).astype(int)]) for each in errors
    ]
    for row, picture in zip(found["rows"], pictures, strict=True):
        assert np.array_equal(rgb(row, 15), picture)
    assert np.array_equal(rgb(found["errors"][0], 15), pictures[0])
    for row, error in list(zip(found["errors"], errors, strict=True))[1:]:
        assert np.abs(rgb(row, 15) - error).max() <= 1

    large, moved = found["large"], found["moved"]
    assert (large["text"], large["open"]) == ("ours K=2, sample 1: 10.50 dB", True)
    assert large["captions"] == ["teacher", "ours K=2", "error, 0.5 and above bright"]
    assert large["wide"] > 100
    assert large["smooth"] == "pixelated"
    for values, picture in zip(large["pixels"], (pictures[0], pictures[3], errors[3]), strict=True):
        assert np.abs(rgb(values, 5) - picture[:, 5:10]).max() <= 1
    assert moved["text"] == "ours K=3, sample 0: 40.00 dB"
    assert np.array_equal(rgb(moved["pixels"][1], 5), pictures[4][:, :5])
    assert found["closed"]

    assert (found["loaded"], found["title"]) == (
        0,
        f"m {EVIL}: few-step students against the 10-step teacher",
    )
    assert found["refused"] == "http://127.0.0.1:9/x.png"


@pytest.mark.slow
@needs_browser
def test_curves_name_their_points_and_hide(run):
    found = visited(
        run,
        """async function visit(found) {
          const tip = document.getElementById("tip");
          found.said = [];
          for (const circle of all("#measured circle, #costs circle")) {
            circle.scrollIntoView({ block: "center" });
            const box = circle.getBoundingClientRect();
            const move = { clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, bubbles: true };
            circle.dispatchEvent(new PointerEvent("pointermove", move));
            found.said.push(tip.textContent);
          }
          found.ticks = all("#costs text").map(each => each.textContent);
          found.floor = all("#costs circle").map(each => Number(each.getAttribute("cy")));
          const legend = document.getElementById("measured").nextElementSibling;
          all("button", legend)[0].click();
          found.hidden = all("#measured g").filter(each => each.style.display === "none").map(g => g.dataset.name);
        }""",
    )
    assert found.get("error") is None
    assert found["said"] == [
        "edm, psnr against K\nK = 2: psnr 31",
        f"{EVIL}, psnr against K\nK = 2: psnr 21",
        "ours, psnr against K\nK = 2: psnr 10.5",
        "ours, psnr against K\nK = 3: psnr 41",
        *(
            f"ours, K = 3\nround = {i}: cost {cost}"
            for i, cost in [(1, "1e-20"), (2, "0.01"), (3, "0.1")]
        ),
    ]
    assert found["ticks"][3:-3] == ["1e-7", "1e-6", "1e-5", "1e-4", "1e-3", "0.01", "0.1"]
    assert found["floor"] == pytest.approx([264, 64, 24], abs=0.5)
    assert len(found["hidden"]) == 1


@needs_browser
def test_a_sample_is_chosen_and_its_steps_enlarged(run):
    found = visited(
        run,
        """async function visit(found) {
          while (!all("#ways figcaption").length) await wait(10);
          const dialog = document.querySelector("dialog"), ways = all("#ways div");
          const row = way => all("figure", way).map(each => [pixels(each.querySelector("canvas"), 5, 6),
            each.querySelector("figcaption").textContent]);
          found.names = all("#ways span").map(each => each.textContent);
          found.rows = [ways.map(row)];
          const choice = all("#choice button");
          choice[1].click();
          found.rows.push(ways.map(row));
          found.pressed = choice.map(each => each.ariaPressed);
          const large = () => [dialog.querySelector("p").textContent, all("dialog figcaption").map(e => e.textContent),
            all("dialog canvas").map(each => pixels(each, 5, 6))];
          all("canvas", ways[4])[1].click();
          found.large = [large()];
          for (const key of ["ArrowRight", "ArrowRight", "ArrowUp", "ArrowRight", "ArrowDown", "ArrowDown"]) {
            dialog.dispatchEvent(new KeyboardEvent("keydown", { key }));
            found.large.push(large());
          }
        }""",
    )
    names = ["teacher", "edm", EVIL, "ours", "ours"]
    assert (found.get("error"), found["names"], found["pressed"]) == (
        None,
        names,
        ["false", "true"],
    )
    with np.load(run / "trajectories.npz") as file:
        labels = ["teacher", "edm K=2", f"{EVIL} K=2", "ours K=2", "ours K=3"]
        ways = [file[f"x0/{label}"] for label in labels]
    for sample in (0, 1):
        for way, row in zip(ways, found["rows"][sample], strict=True):
            for picture, (values, _) in zip(way[sample], row, strict=True):
                assert np.array_equal(np.array(values).reshape(6, 5, 4)[..., :3], picture)
    assert [[caption for _, caption in row] for row in found["rows"][0]][::4] == [
        ["1", "0.25", "0"],
        ["1", "0.8", "0.3", "0"],
    ]

    last = ["the sample"]
    assert [(text.split(",")[0], captions) for text, captions, _ in found["large"]] == [
        ("ours K=3", ["predicted at t = 0.8", *last]),
        ("ours K=3", ["predicted at t = 0.3", *last]),
        ("ours K=3", last),
        ("ours K=2", last),  # a shorter way
        ("ours K=2", ["predicted at t = 1", *last]),
        ("ours K=3", ["predicted at t = 1", *last]),
        ("teacher", ["predicted at t = 1", *last]),
    ]
    assert np.array_equal(
        np.array(found["large"][0][2][0]).reshape(6, 5, 4)[..., :3], ways[4][1, 1]
    )


@pytest.mark.slow
@needs_browser
def test_videos_move(tmp_path):
    folder = made(tmp_path, (3, 6, 5, 1))
    found = visited(
        folder,
        """async function visit(found) {
          const strips = new Set(), row = all("#grid canvas")[1];
          for (let i = 0; i < 60; i++) {
            strips.add(JSON.stringify(pixels(row, 15, 6).filter((_, place) => place % 4 === 0)));
            await wait(25);
          }
          found.strips = [...strips].map(each => JSON.parse(each));
        }""",
    )
    with np.load(folder / "samples.npz") as file:
        frames = [
            np.concatenate(list(frame), axis=1)[..., 0] for frame in file["edm K=2"].swapaxes(0, 1)
        ]
    assert sorted(found["strips"]) == sorted(frame.ravel().tolist() for frame in frames)
