"""The dashboard of a project, or of one sweep in it, as a W&B Report that anybody can build again:

    python -m oss_exp.report.wandb_report ENTITY/PROJECT [--group NAME] [--metrics psnr fid ...]

Its panels are of what `logging` sends. Saving it needs the network and a login; offline, `task=report sweep=FOLDER`
shows the same from the run folders.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from oss_exp.report.logging import COSTS, PICTURES, TABLE, against

OFFLINE = "without W&B, `oss-exp task=report sweep=FOLDER` makes a page of the same"
LINE_SERIES = "wandb/lineseries/v0"  # the chart that wandb.plot.line_series logs, and its columns
FIELDS = {"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"}


def build(entity: str, project: str, group: str | None, metrics: Sequence[str]) -> Any:
    """The unsaved `Report`, made without the network. metrics: those whose curves against K it shows."""
    try:
        import wandb_workspaces.reports.v2 as wr
        from wandb_workspaces import expr
        from wandb_workspaces.reports.v2.interface import Layout, Report, Runset
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{error.name} is not installed: pip install 'oss_exp[wandb-report]'; {OFFLINE}"
        ) from None

    def curves(key: str, x: str) -> Any:
        query, strings = {"summaryTable": {"tableKey": f"{key}_table"}}, {"title": key, "xname": x}
        return wr.CustomChart(
            query=query, chart_name=LINE_SERIES, chart_fields=FIELDS, chart_strings=strings
        )

    def grid(*panels: Any) -> Any:
        filters = [] if group is None else [expr.Metric("Group") == group]
        runs = Runset(entity=entity, project=project, name=group or "all runs", filters=filters)
        width = 24 // len(panels)
        for place, panel in enumerate(panels):
            panel.layout = Layout(x=place * width, y=0, w=width, h=10)
        return wr.PanelGrid(runsets=[runs], panels=list(panels))

    return Report(
        entity=entity,
        project=project,
        title=f"Step schedules: {group or project}",
        description="Few-step students against their teacher, on the same noises.",
        width="fluid",
        blocks=[
            wr.H1("Measured"),
            grid(*(curves(against(metric), "K") for metric in metrics)),
            grid(wr.WeavePanelSummaryTable(table_name=TABLE)),
            wr.H1("Samples and step schedules"),
            *(
                grid(wr.MediaBrowser(title=name, media_keys=[name], num_columns=1))
                for name in PICTURES
            ),
            wr.H1("Search: cost after each round of the dynamic program"),
            grid(curves(COSTS, "round")),
            wr.H1("Runs"),
            grid(wr.RunComparer(diff_only="split")),
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").partition(":")[0]
    parser = argparse.ArgumentParser("python -m oss_exp.report.wandb_report", description=about)
    parser.add_argument("path", metavar="ENTITY/PROJECT")
    parser.add_argument("--group", help="of the sweep; default: all runs of the project")
    parser.add_argument("--metrics", nargs="+", default=["psnr", "fid"], help="default: psnr fid")
    given = parser.parse_args(arguments)
    entity, _, project = given.path.partition("/")
    if not entity or not project or "/" in project:
        parser.error(
            f"ENTITY/PROJECT is wanted, as in the address of the project's page, got {given.path!r}"
        )
    report = build(entity, project, given.group, given.metrics)
    import wandb

    try:
        if not wandb.login(prompt=False):
            raise PermissionError("nobody is logged in")
        report.save()
    except Exception as error:  # whatever the network, the server or the library says
        raise SystemExit(
            f"the report cannot be saved to {given.path}: {error}\nIt needs the network and a login (`wandb login`); "
            f"{OFFLINE}."
        ) from None
    print(report.url)


if __name__ == "__main__":
    main()
