"""The table of finetuned stages."""

from __future__ import annotations

from rich.table import Table

from oss_exp.escaping import plain
from oss_exp.models.stages import FinetuneRecord

COLUMNS = (
    "stage",
    "times",
    "steps",
    "parameters",
    "loss before",
    "after",
    "seconds",
    "peak memory",
)


def stages(record: FinetuneRecord) -> Table:
    """Return a table with a row for each stage of finetune.json."""
    table = Table(title=plain(f"{record.name}, finetuned by stages"))
    for name in COLUMNS:
        table.add_column(name, justify="right")

    for stage in record.stages:
        first, last = stage.times
        training = stage.training
        table.add_row(
            str(stage.stage),
            f"{first:.4f} to {last:.4f}",
            str(stage.steps),
            f"{stage.parameters:,}",
            f"{training.loss_before:.3g}",
            f"{training.loss_after:.3g}",
            f"{training.seconds:.0f}",
            f"{training.peak_bytes / 2**30:.2f} GiB",
        )
    return table
