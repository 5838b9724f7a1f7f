"""What amplitude calibration does to the PSNR of few-step students (the paper's section 4.2.1 and figures 4 and 8).

python -m experiments.calibration.run
"""

from __future__ import annotations

import subprocess
import sys

from experiments.common import OUTPUTS, keep, measure, table

STRATEGIES = ("fm", "ddim", "oss", "oss_ave", "oss_shared")


def main() -> None:
    files = {"no calibration": "null"}
    for name, last in (("before every call", "false"), ("before the last call", "true")):
        folder = OUTPUTS / f"calibration/table_{last}"
        if not (folder / "calibration.json").exists():
            command = [
                sys.executable,
                "-m",
                "oss_exp",
                "task=calibrate",
                f"task.last_step_only={last}",
                "logger=none",
            ]
            subprocess.run([*command, f"hydra.run.dir={folder}"], check=True)
        files[name] = str(folder / "calibration.json")
    rows = []
    for name, file in files.items():
        chosen = [f"stepsize=[{','.join(STRATEGIES)}]", f"solver.calibration={file}"]
        found = {
            (r.strategy, r.num_steps): r
            for r in measure(f"calibration/{name.replace(' ', '_')}", *chosen)
        }
        for k in (5, 10):
            cells = [f"{found[s, k].psnr} / {found[s, k].spread.mean:.3f}" for s in STRATEGIES]
            rows.append([name, str(k), *cells])
    keep(
        __file__,
        "table.md",
        table(["calibration", "K", *(f"{s}: PSNR / spread" for s in STRATEGIES)], rows),
    )
    keep(
        __file__, "amplitude.png", (OUTPUTS / "calibration/table_false/amplitude.png").read_bytes()
    )


if __name__ == "__main__":
    main()
