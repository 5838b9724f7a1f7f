"""A run whose strategies have odd names: its report in a browser, and its W&B file.

python -m experiments.hostile_files.shown FOLDER
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
from lightning.pytorch.loggers import WandbLogger
from omegaconf import OmegaConf
from wandb.proto.wandb_internal_pb2 import Record

from experiments.common import command_line
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


def write_run(folder: Path) -> None:
    """Write a run folder: a schedule of each name, measured, with a picture."""
    rows = []
    pictures = {"teacher": np.zeros((1, 8, 8, 1), np.uint8)}
    for number, name in enumerate(NAMES):
        rows.append(_row(number, name))
        pictures[f"{name} K=2"] = np.full((1, 8, 8, 1), 4 * number, np.uint8)
        provenance = {
            "strategy": {"name": name, "baseline": number == 0},
            "model": {"name": NAMES[0]},
        }
        steps = StepSchedule([1.0, 0.2 + number / 100, 0.0], provenance=provenance)
        steps.save(folder / "schedules" / f"{number:02}_2.json")

    # The files of the run.
    metrics = {
        "model": {"name": NAMES[0]},
        "teacher": {"num_steps": 10},
        "solver": {},
        "seed": 0,
        "teacher_metrics": {},
        "rows": rows,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "teacher.json").write_text(json.dumps({"times": np.linspace(1, 0, 11).tolist()}))
    (folder / "config.yaml").write_text("model: " + json.dumps(NAMES[16]) + "\n")
    np.savez(folder / "samples.npz", **pictures)


def _row(number: int, name: str) -> dict:
    """Return the measurements of a strategy."""
    psnr = 40 - number / 10 + np.arange(2)
    return {
        "strategy": name,
        "num_steps": 2,
        "baseline": number == 0,
        "start": "pinned",
        "nfe": 2,
        "planning": {},
        "psnr": Interval.of(psnr).to_dict(),
        "spread": Interval.of(np.ones(2)).to_dict(),
        "metrics": {f"fid {name}": 1.0} if number < 3 else {},
        "per_image": {"index": [0, 1], "psnr": psnr.tolist()},
    }


def browsed(folder: Path) -> dict:
    """Return the texts on the page once its script has run, and take a screenshot."""
    page = folder / "browsed.html"
    page.write_text(SCRIPT + (folder / "report.html").read_text())
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"]
    command.append(f"--user-data-dir={folder / 'chromium'}")

    # Texts.
    dump = [*command, "--virtual-time-budget=20000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(dump, capture_output=True, text=True, timeout=120, check=True).stdout
    texts = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))

    # Screenshot.
    picture = [f"--screenshot={folder / 'page.png'}", "--window-size=1300,2400"]
    picture.append((folder / "report.html").as_uri())
    subprocess.run([*command, *picture], capture_output=True, timeout=120, check=True)
    return texts


def logged(folder: Path) -> tuple[set[str], str]:
    """Return the keys of the metrics in W&B's offline file, and the name of the artifact."""
    logger = WandbLogger(save_dir=str(folder), mode="offline", project="hostile")
    log_run(logger, OmegaConf.create({"model": "x"}), folder)
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")

    keys = set()
    name = ""
    for record in records(file):
        keys |= {".".join(item.nested_key) or item.key for item in record.history.item}
        for artifact in (record.artifact, record.request.log_artifact.artifact):
            if artifact.type == "step_schedules":
                name = artifact.name
    return keys, name


def records(file: Path) -> list[Record]:
    """Read the records of a W&B file, once it is complete: W&B may still be writing it."""
    complete: list[Record] = []
    for _ in range(600):
        complete = _records_of(file.read_bytes())
        if complete and complete[-1].HasField("exit"):
            break
        time.sleep(0.05)
    return complete


def _records_of(data: bytes) -> list[Record]:
    """Parse a log in blocks of 32 KiB.

    Records are in parts of checksum (4 bytes), length (2), kind (1) and content.
    """
    complete = []
    part = b""
    place = 7  # after the file's header
    while place + 7 <= len(data):
        # No part begins in the last bytes of a block.
        remaining = 2**15 - place % 2**15
        if remaining < 7:
            place += remaining
            continue

        # One part.
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        kind = data[place + 6]
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4) and place <= len(data):  # a whole record, or its last part
            complete.append(Record.FromString(part))
            part = b""
    return complete


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "folder", type=Path, help="a new one, for the run, the page and the pictures"
    )
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)
    write_run(folder)
    write(folder)

    # The page.
    texts = browsed(folder)
    assert texts["cells"] == NAMES, set(NAMES) ^ set(texts["cells"])
    assert sorted(texts["legend"]) == sorted(NAMES)
    assert texts["rows"] == ["teacher", *NAMES]
    assert (texts["odd"], "alerted" in texts["title"]) == (0, False)
    print(f"{len(NAMES)} names in the table, the legend and the pictures of the page, unchanged")

    # W&B.
    keys, artifact = logged(folder)
    missing = {f"psnr/{name}/K2" for name in NAMES} - keys
    assert not missing, missing
    print(f"{len(NAMES)} names among W&B's metrics, unchanged; the artifact is {artifact}")


if __name__ == "__main__":
    main()
