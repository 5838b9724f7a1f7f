"""Build a W&B report of a project, or of one of its sweeps, so that anybody can build it again.

    python -m oss_exp.report.wandb_report ENTITY/PROJECT [--group NAME] [--metrics psnr fid ...]

Its panels show what `logging` logs. Saving it needs the network and a login; offline,
`task=report sweep=FOLDER` makes a page of the same from the run folders.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from oss_exp.report.logging import COSTS, PICTURES, TABLE, against

OFFLINE = "without W&B, `oss-exp task=report sweep=FOLDER` makes a page of the same"

# The chart that wandb.plot.line_series logs, and its columns.
LINE_SERIES = "wandb/lineseries/v0"
FIELDS = {"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"}


def build(entity: str, project: str, group: str | None, metrics: Sequence[str]) -> Any:
    """Return the unsaved `Report`, without using the network.

    Args:
        entity: The W&B user or team.
        project: The project.
        group: The sweep; None for all runs.
        metrics: The metrics whose curves against K are shown.

    Raises:
        SystemExit: If wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        from wandb_workspaces import expr
        from wandb_workspaces.reports.v2.interface import Layout, Report, Runset
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{error.name} is not installed: pip install 'oss_exp[wandb-report]'; {OFFLINE}"
        ) from None

    def curves(key: str, x: str) -> Any:
        """Return a panel of the curves that were logged under `key`."""
        query = {"summaryTable": {"tableKey": f"{key}_table"}}
        strings = {"title": key, "xname": x}
        return wr.CustomChart(
            query=query, chart_name=LINE_SERIES, chart_fields=FIELDS, chart_strings=strings
        )

    def grid(*panels: Any) -> Any:
        """Return a row of panels of equal width."""
        filters = [] if group is None else [expr.Metric("Group") == group]
        runs = Runset(entity=entity, project=project, name=group or "all runs", filters=filters)
        width = 24 // len(panels)
        for place, panel in enumerate(panels):
            panel.layout = Layout(x=place * width, y=0, w=width, h=10)
        return wr.PanelGrid(runsets=[runs], panels=list(panels))

    # Panels of metrics and pictures.
    metric_panels = [curves(against(metric), "K") for metric in metrics]
    picture_grids = []
    for name in PICTURES:
        picture_grids.append(grid(wr.MediaBrowser(title=name, media_keys=[name], num_columns=1)))

    return Report(
        entity=entity,
        project=project,
        title=f"Step schedules: {group or project}",
        description="Few-step students against their teacher, on the same noises.",
        width="fluid",
        blocks=[
            wr.H1("Measured"),
            grid(*metric_panels),
            grid(wr.WeavePanelSummaryTable(table_name=TABLE)),
            wr.H1("Samples and step schedules"),
            *picture_grids,
            wr.H1("Search: cost after each round of the dynamic program"),
            grid(curves(COSTS, "round")),
            wr.H1("Runs"),
            grid(wr.RunComparer(diff_only="split")),
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the report that the command line names, save it and print its address."""
    # Arguments.
    parser = argparse.ArgumentParser(
        "python -m oss_exp.report.wandb_report", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("path", metavar="ENTITY/PROJECT")
    parser.add_argument("--group", help="the sweep; default: all runs of the project")
    parser.add_argument("--metrics", nargs="+", default=["psnr", "fid"], help="default: psnr fid")
    options = parser.parse_args(arguments)
    entity, _, project = options.path.partition("/")
    if not entity or not project or "/" in project:
        parser.error(
            "ENTITY/PROJECT is wanted, as in the address of the project's page, "
            f"got {options.path!r}"
        )

    # Report.
    report = build(entity, project, options.group, options.metrics)
    import wandb

    try:
        if not wandb.login(prompt=False):
            raise PermissionError("nobody is logged in")
        report.save()
    except Exception as error:  # whatever the network, the server or the library raises
        raise SystemExit(
            f"the report cannot be saved to {options.path}: {error}\n"
            f"It needs the network and a login (`wandb login`); {OFFLINE}."
        ) from None
    print(report.url)


if __name__ == "__main__":
    main()
