"""A run whose strategies have names that every border would like to obey: its report, in a browser, and its W&B file.

python -m experiments.hostile_files.shown FOLDER
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from lightning.pytorch.loggers import WandbLogger
from omegaconf import OmegaConf
from wandb.proto.wandb_internal_pb2 import Record

from experiments.hostile_files.names import NAMES
from oss_exp.evaluation.psnr import Interval
from oss_exp.report import log_run, write
from oss_exp.schedule import StepSchedule

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
SCRIPT = """<script>
window.alert = () => document.title = "alerted";
addEventListener("load", () => setTimeout(() => {
  const all = (query, root = document) => [...root.querySelectorAll(query)];
  const column = all("th").findIndex(head => head.textContent === "strategy");
  document.body.dataset.found = JSON.stringify({
    cells: all("tbody tr").map(row => row.cells[column].textContent),
    legend: all("#legend button").map(button => button.textContent),
    rows: all("#grid span").map(row => row.firstChild.textContent),
    odd: all("img, b, a, iframe, object, br + b").length,
    title: document.title,
  });
}, 2000));
</script>"""


def made(folder: Path) -> None:
    """The run folder: a schedule of each name, measured, with a picture."""
    rows, pictures = [], {"teacher": np.zeros((1, 8, 8, 1), np.uint8)}
    for number, name in enumerate(NAMES):
        values = 40 - number / 10 + np.arange(2)
        measured = {
            "psnr": Interval.of(values).to_dict(),
            "spread": Interval.of(np.ones(2)).to_dict(),
        }
        images = {"index": [0, 1], "psnr": values.tolist()}
        row = {
            "strategy": name,
            "num_steps": 2,
            "baseline": number == 0,
            "start": "pinned",
            "nfe": 2,
            "planning": {},
        }
        rows.append(
            {
                **row,
                **measured,
                "metrics": {f"fid {name}": 1.0} if number < 3 else {},
                "per_image": images,
            }
        )
        pictures[f"{name} K=2"] = np.full((1, 8, 8, 1), 4 * number, np.uint8)
        about = {"strategy": {"name": name, "baseline": number == 0}, "model": {"name": NAMES[0]}}
        plan = StepSchedule([1.0, 0.2 + number / 100, 0.0], provenance=about)
        plan.save(folder / "schedules" / f"{number:02}_2.json")
    run = {
        "model": {"name": NAMES[0]},
        "teacher": {"num_steps": 10},
        "solver": {},
        "seed": 0,
        "teacher_metrics": {},
    }
    (folder / "metrics.json").write_text(json.dumps({**run, "rows": rows}))
    (folder / "teacher.json").write_text(json.dumps({"times": np.linspace(1, 0, 11).tolist()}))
    (folder / "config.yaml").write_text("model: " + json.dumps(NAMES[16]) + "\n")
    np.savez(folder / "samples.npz", **pictures)


def browsed(folder: Path) -> dict:
    """What stands on the page, once its script has run."""
    page = folder / "browsed.html"
    page.write_text(SCRIPT + (folder / "report.html").read_text())
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'chromium'}",
    ]
    command = [CHROMIUM, *options, "--virtual-time-budget=20000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    picture = [
        f"--screenshot={folder / 'page.png'}",
        "--window-size=1300,2400",
        (folder / "report.html").as_uri(),
    ]
    subprocess.run([CHROMIUM, *options, *picture], capture_output=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))


def logged(folder: Path) -> tuple[set[str], str]:
    """The keys of the metrics in W&B's offline file, and the name of the artifact."""
    logger = WandbLogger(save_dir=str(folder), mode="offline", project="hostile")
    log_run(logger, OmegaConf.create({"model": "x"}), folder)
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    keys, artifact = set(), ""
    for record in records(file):
        keys |= {".".join(item.nested_key) or item.key for item in record.history.item}
        for each in (record.artifact, record.request.log_artifact.artifact):
            artifact = each.name if each.type == "step_schedules" else artifact
    return keys, artifact


def records(file: Path) -> list[Record]:
    """Of a log in blocks of 32 KiB: records in parts of checksum, length and kind. W&B may still be writing it."""
    found: list[Record] = []
    for _ in range(600):
        data, found, part, place = file.read_bytes(), [], b"", 7
        while place + 7 <= len(data):
            if (left := 2**15 - place % 2**15) < 7:
                place += left
                continue
            length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            part += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4) and place <= len(data):  # whole, or the last part
                found.append(Record.FromString(part))
                part = b""
        if found and found[-1].HasField("exit"):
            break
        time.sleep(0.05)
    return found


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    made(folder)
    write(folder)
    found = browsed(folder)
    assert found["cells"] == NAMES, set(NAMES) ^ set(found["cells"])
    assert sorted(found["legend"]) == sorted(NAMES)
    assert found["rows"] == ["teacher", *NAMES]
    assert (found["odd"], "alerted" in found["title"]) == (0, False)
    print(
        f"{len(NAMES)} names in the table, the legend and the pictures of the page, as they are; nothing else on it"
    )
    keys, artifact = logged(folder)
    assert {f"psnr/{name}/K2" for name in NAMES} <= keys, {
        f"psnr/{name}/K2" for name in NAMES
    } - keys
    print(f"{len(NAMES)} names among W&B's metrics, as they are; the artifact is {artifact}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
