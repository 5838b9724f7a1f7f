"""The effect of amplitude calibration on the PSNR of few-step students.

The paper's section 4.2.1 and figures 4 and 8.

python -m experiments.calibration.run
"""

from __future__ import annotations

from experiments.common import OUTPUTS, command_line, keep, measure, run_program, table

STRATEGIES = ("fm", "ddim", "oss", "oss_ave", "oss_shared")


def main() -> None:
    command_line(__doc__).parse_args()
    files = {
        "no calibration": "null",
        "before every call": calibration(last_step_only=False),
        "before the last call": calibration(last_step_only=True),
    }

    # Measure.
    rows = []
    for name, file in files.items():
        settings = [f"stepsize=[{','.join(STRATEGIES)}]", f"solver.calibration={file}"]
        results = measure(f"calibration/{name.replace(' ', '_')}", *settings)
        by_key = {(result.strategy, result.num_steps): result for result in results}
        for k in (5, 10):
            row = [name, str(k)]
            for strategy in STRATEGIES:
                result = by_key[strategy, k]
                row.append(f"{result.psnr} / {result.spread.mean:.3f}")
            rows.append(row)

    # Table and picture.
    header = ["calibration", "K", *(f"{name}: PSNR / spread" for name in STRATEGIES)]
    keep(__file__, "table.md", table(header, rows))
    picture = OUTPUTS / "calibration/table_false/amplitude.png"
    keep(__file__, "amplitude.png", picture.read_bytes())


def calibration(last_step_only: bool) -> str:
    """Return the file of a calibration, which is made unless it is there."""
    setting = str(last_step_only).lower()
    folder = OUTPUTS / f"calibration/table_{setting}"
    file = folder / "calibration.json"
    if not file.exists():
        overrides = ["task=calibrate", f"task.last_step_only={setting}"]
        run_program(*overrides, f"hydra.run.dir={folder}")
    return str(file)


if __name__ == "__main__":
    main()
