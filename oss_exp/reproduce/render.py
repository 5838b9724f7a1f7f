"""A table of the paper's numbers and ours, with its claims, in five file formats."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from oss_exp import escaping
from oss_exp.escaping import Markup, csv_cell, latex, markdown_table
from oss_exp.files import write_atomically
from oss_exp.report.plots import png
from oss_exp.reproduce.cells import Cell
from oss_exp.reproduce.older_cells import read_cell
from oss_exp.reproduce.paper import Claim, Paper
from oss_exp.reproduce.plans import Plan, Values, Verdict, verdict

ANSWERS = ("holds", "does not hold", "not significant", "not checked")
DIGITS = {"psnr": 2, "fid": 3, "geneval": 3}  # after the point, by metric


@dataclass(frozen=True)
class Reproduction:
    """A table with the paper's numbers and ours.

    Attributes:
        paper: The paper's table.
        plan: Where our numbers come from.
        scale: "small" or "paper".
        values: Our number for each row of the paper's; None where there is none.
    """

    paper: Paper
    plan: Plan
    scale: str
    values: Values

    @property
    def verdicts(self) -> list[tuple[Claim, Verdict]]:
        """The paper's claims, and whether each holds here."""
        return [(claim, self._judge(claim)) for claim in self.paper.claims]

    def _judge(self, claim: Claim) -> Verdict:
        """Check a claim; one row against several is compared with the best of them."""
        if claim.better is None:
            check = self.plan.checks.get(claim.text)
            return check(self.values) if check else Verdict("not checked", "orders no numbers")

        # The rows that it orders.
        better, others = self.paper.ordered(claim)
        if any(self.values[i] is None for i in (better, *others)):
            return Verdict("not checked", "a number is missing here")
        sign = 1 if self.paper.metric["better"] == "higher" else -1
        best = max(others, key=lambda i: sign * self.values[i].interval.mean)

        # Their difference.
        first = self.values[better]
        second = self.values[best]
        difference = first.minus(second) if sign > 0 else second.minus(first)
        what = "difference:"
        if len(others) > 1:
            what = f"to {self.paper.rows[best]['label']}, the best of them:"
        return verdict(difference, what)

    def write(self, folder: Path, cells: Path) -> list[Path]:
        """Write <scale>.md, .tex, .csv, .json and .png.

        Args:
            folder: Folder of the files.
            cells: Folder of the runs, whose versions are in the JSON.

        Returns:
            The files. There is no picture of numbers that mean yes or no.
        """
        texts = {
            "md": self.markdown(),
            "tex": self.latex(),
            "csv": self.csv(),
            "json": self.json(cells),
        }
        files = []
        for kind, text in texts.items():
            files.append(write_atomically(folder / f"{self.scale}.{kind}", text))
        if self.paper.metric["unit"] != "1 yes, 0 no":
            files.append(write_atomically(folder / f"{self.scale}.png", self.picture()))
        return files

    # ----------------------------------------------------------------------------------------------
    # The table in the paper's layout
    # ----------------------------------------------------------------------------------------------

    def grid(self) -> tuple[list[str], list[str], dict[tuple[str, str], int]]:
        """Return the lines, the columns, and the number of the row at each (line, column)."""
        lines: dict[str, None] = {}
        columns: dict[str, None] = {}
        places = {}
        for i, row in enumerate(self.paper.rows):
            line, column = self.plan.place(row)
            lines[line] = columns[column] = None
            places[line, column] = i
        return list(lines), list(columns), places

    @property
    def measure(self) -> str:
        """The metric with its unit."""
        name, unit = self.paper.metric["name"], self.paper.metric["unit"]
        return f"{name}, {unit}" if unit else name

    def text(self, number: int, plus_minus: str = " ± ") -> tuple[str, str]:
        """Return the paper's number and ours as text.

        Args:
            number: Number of the row.
            plus_minus: Text before the half width of our interval.
        """
        # The paper's number; of three digits, the last is left out of large ones.
        value = self.paper.rows[number]["value"]
        digits = DIGITS.get(self.paper.metric["name"], 0)
        theirs = "-"
        if value is not None:
            theirs = f"{value:.{2 if digits == 3 and value >= 1 else digits}f}"

        # Ours.
        ours = self.values[number]
        if ours is None:
            return theirs, "-"
        text = f"{ours.interval.mean:.{digits}f}"
        half = ours.interval.half
        if half:
            text += f"{plus_minus}{half:.{digits}f}"
        return theirs, text

    def _both(self, number: int | None, plus_minus: str = " ± ") -> str:
        """Return the cell of a row; empty without one."""
        return "" if number is None else " / ".join(self.text(number, plus_minus))

    def markdown(self) -> str:
        """Return the table, the claims and the doubts about them as Markdown."""
        # Table.
        lines, columns, places = self.grid()
        rows = []
        for line in lines:
            rows.append([line, *(self._both(places.get((line, column))) for column in columns)])
        table = markdown_table([self.measure, *columns], rows)

        # Claims.
        claims = []
        for claim, checked in self.verdicts:
            claims.append([claim.text, _gain(claim), checked.answer, checked.why])

        # Doubts.
        doubts = [f"- {doubt}" for doubt in self.paper.doubts]
        for row in self.paper.rows:
            if row["doubt"]:
                doubts.append(f"- {row['label']}: {row['doubt']}.")

        parts = [
            f"# {self.paper.name.replace('_', ' ').capitalize()}: {self.paper.title}",
            f"The paper's number / ours at {self.scale} scale, with an interval of 95 % where one "
            f"is known; {self.paper.metric['better']} is better. Ours: {self.plan.standing_for}",
            table,
            "## Claims",
            markdown_table(["the paper's claim", "its gain", "here", "why"], claims),
            "Differences are of the same noises, picture by picture, where there are intervals.",
            "## Doubts about the paper's numbers",
            "\n".join(doubts),
        ]
        return "\n\n".join(part.strip() for part in parts) + "\n"

    def latex(self) -> str:
        """Return the table as a LaTeX tabular for the package booktabs."""
        # Rows.
        lines, columns, places = self.grid()
        rows = []
        for line in lines:
            cells = [self._both(places.get((line, column)), r" $\pm$ ") for column in columns]
            rows.append(" & ".join([latex(line), *cells]) + r" \\")

        # Tabular.
        caption = (
            f"% {self.paper.title}: the paper's number / ours ({self.scale} scale), "
            f"{self.paper.metric['name']}"
        )
        parts = [
            caption,
            rf"\begin{{tabular}}{{l{'c' * len(columns)}}}",
            r"\toprule",
            " & ".join(["", *map(latex, columns)]) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join(parts) + "\n"

    def csv(self) -> str:
        """Return one line for each number as CSV."""
        buffer = io.StringIO()
        table = csv.writer(buffer, lineterminator="\n")
        table.writerow(
            ["line", "column", "strategy", "num_steps", "paper", "ours", "low", "high", "n"]
        )
        for row, value in zip(self.paper.rows, self.values, strict=True):
            # Ours.
            ours: list[Any] = ["", "", "", ""]
            if value is not None:
                interval = value.interval
                ours = [*_rounded(interval.mean, interval.low, interval.high), interval.n]

            # The line.
            theirs = "" if row["value"] is None else row["value"]
            texts = map(csv_cell, (*self.plan.place(row), row["strategy"] or ""))
            table.writerow([*texts, row["num_steps"] or "", theirs, *ours])
        return buffer.getvalue()

    def json(self, cells: Path) -> str:
        """Return numbers, claims, and the runs behind them as JSON.

        Args:
            cells: Folder of the runs.
        """
        # Runs, counted from 0.
        places: dict[Cell, int] = {}
        for source in self.plan.sources:
            for cell in source.cells if source else ():
                for member in cell.lineage():
                    places.setdefault(member, len(places))
        runs = []
        for cell in places:
            run = {
                "overrides": list(cell.overrides),
                "parent": cell.parent and places[cell.parent],
                "packages": read_cell(cell.folder(cells)).packages,
            }
            runs.append(run)

        # Numbers.
        numbers = []
        rows = zip(self.paper.rows, self.values, self.plan.sources, strict=True)
        for row, value, source in rows:
            number = {
                "place": list(self.plan.place(row)),
                "paper": row["value"],
                "ours": value and asdict(value.interval),
                "runs": source and [places[cell] for cell in source.cells],
            }
            numbers.append(number)

        # Claims.
        claims = []
        for claim, checked in self.verdicts:
            claims.append({"claim": claim.text, "gain": claim.gain, **asdict(checked)})

        record = {
            "id": self.paper.name,
            "scale": self.scale,
            "numbers": numbers,
            "claims": claims,
            "runs": runs,
        }
        return json.dumps(record, indent=1) + "\n"

    def picture(self) -> bytes:
        """Plot the table as a PNG, one panel for each column.

        Circles are the paper's numbers, dots with intervals are ours.
        """
        lines, columns, places = self.grid()
        size = (1.6 + 2.1 * len(columns), 1.1 + 0.3 * len(lines))
        figure, axes = plt.subplots(
            1,
            len(columns),
            figsize=size,
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )

        # Panels.
        for axis, column in zip(axes[0], columns, strict=True):
            for height, line in enumerate(lines):
                number = places.get((line, column))
                if number is not None:
                    self._draw(axis, height, number)
            axis.set_title(escaping.label(column), fontsize=9)
            axis.set_xscale("log" if self.paper.metric["name"] == "fid" else "linear")
            axis.grid(alpha=0.3)

        # Axes and legend.
        first = axes[0][0]
        first.set_yticks(range(len(lines)), map(escaping.label, lines))
        first.invert_yaxis()
        figure.supxlabel(self.measure, fontsize=9)
        handles, labels = first.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True))
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside upper right",
            ncols=2,
            frameon=False,
            fontsize=8,
        )
        return png(figure)

    def _draw(self, axis: Axes, height: int, number: int) -> None:
        """Draw the paper's number and ours."""
        theirs = self.paper.rows[number]["value"]
        if theirs is not None:
            axis.plot(theirs, height, "o", mfc="none", mec="0.4", label="paper")

        ours = self.values[number]
        if ours is not None:
            mean, low, high = ours.interval.mean, ours.interval.low, ours.interval.high
            bars = None if high is None else [[mean - low], [high - mean]]
            label = f"ours, {self.scale}"
            axis.errorbar(mean, height, xerr=bars, fmt="o", ms=4, color="C0", label=label)


def summary(made: Sequence[Reproduction]) -> str:
    """Return a Markdown table of how many of the paper's claims hold here, by table."""
    rows = []
    for table in made:
        name = table.paper.name
        answers = Counter(checked.answer for _, checked in table.verdicts)
        counts = [str(answers[answer]) for answer in ANSWERS]
        link = Markup(f"[{name.replace('_', ' ')}]({name}/{table.scale}.md)")
        rows.append([link, table.paper.title, *counts])
    return markdown_table(["", "what it is about", *ANSWERS], rows)


def _gain(claim: Claim) -> str:
    return "" if claim.gain is None else f"{claim.gain:+g}"


def _rounded(*values: float | None) -> list[Any]:
    return ["" if value is None else float(f"{value:.6g}") for value in values]
