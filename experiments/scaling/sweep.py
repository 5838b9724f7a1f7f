"""The time and memory of the report of a sweep of 1,000 runs.

python -m experiments.scaling.sweep

The runs are copies of two real ones (five and ten steps) with other names, seeds and values.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.common import OUTPUTS, command_line, finished, keep, table
from oss_exp.report.page import gather

STRATEGIES = 10  # names; other copies differ by their seeds
RUN = [
    "model=mixture_fashion",
    "stepsize=oss_shared",
    "num_teacher_steps=20",
    "data.search_samples=8",
]


def copies(sources: Sequence[Path], sweep: Path, count: int) -> None:
    """Fill the folder of a sweep with `count` runs."""
    shutil.rmtree(sweep, ignore_errors=True)
    for number in range(count):
        source = sources[number % len(sources)]
        place = number // len(sources)
        run = sweep / str(number)
        name = f"strategy_{place % STRATEGIES}"
        shutil.copytree(source, run, ignore=shutil.ignore_patterns("*.png", "*.html", ".lock"))

        # Other metrics.
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["seed"] = place // STRATEGIES
        for row in metrics["rows"]:
            row["strategy"] = name
            row["baseline"] = place % STRATEGIES == 0
            row["psnr"]["mean"] += 1e-3 * number
            row["per_image"]["psnr"] = [value + 1e-3 * number for value in row["per_image"]["psnr"]]
        (run / "metrics.json").write_text(json.dumps(metrics))

        # Other names in its schedules.
        for file in (run / "schedules").glob("*[0-9].json"):
            schedule = json.loads(file.read_text())
            schedule["provenance"]["strategy"]["name"] = name
            file.write_text(json.dumps(schedule))


def main() -> None:
    command_line(__doc__).parse_args()
    sources = [finished(f"scaling/run_{k}", *RUN, f"num_steps=[{k}]") for k in (5, 10)]
    rows = []
    for count in (250, 500, 1000):
        sweep = OUTPUTS / "scaling" / f"sweep_{count}"
        copies(sources, sweep, count)
        before = peak()
        started = time.monotonic()
        clock = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            gather(sweep)
        wall = time.monotonic() - started
        busy = time.process_time() - clock
        rows.append(
            [f"{count:,}", f"{wall:.1f}", f"{busy:.1f}", f"{peak() - before:.0f}", f"{before:.0f}"]
        )
    header = ["runs", "seconds", "seconds of a core", "memory, MB", "of the program before, MB"]
    keep(__file__, "sweep.md", table(header, rows))


def peak() -> float:
    """Return the peak of this process's memory, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
