"""Every baseline and every search at 5 and 10 calls, with three solvers.

python -m experiments.baselines.run
"""

from __future__ import annotations

from experiments.common import OUTPUTS, command_line, keep, measure


def main() -> None:
    command_line(__doc__).parse_args()
    for solver in ("euler", "dpm_solver_pp", "unipc"):
        measure(f"baselines/{solver}", "experiment=baselines", f"solver={solver}")
        folder = OUTPUTS / "baselines" / solver
        keep(__file__, f"{solver}.md", (folder / "table.md").read_text())
        keep(__file__, f"{solver}.png", (folder / "schedules.png").read_bytes())


if __name__ == "__main__":
    main()
