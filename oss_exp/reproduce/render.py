"""A table of the paper's numbers and ours, and what becomes of its claims: Markdown, LaTeX, CSV, JSON, a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from oss_exp import escaping
from oss_exp.escaping import Markup, csv_cell, latex, markdown_table
from oss_exp.files import write_atomically
from oss_exp.report.plots import png
from oss_exp.reproduce.older_cells import read_cell
from oss_exp.reproduce.paper import Claim, Paper
from oss_exp.reproduce.plans import Plan, Values, Verdict, verdict

ANSWERS = ("holds", "does not hold", "not significant", "not checked")


@dataclass(frozen=True)
class Reproduction:
    """A table with our values in the place of those of the paper's rows."""

    paper: Paper
    plan: Plan
    scale: str
    values: Values

    @property
    def verdicts(self) -> list[tuple[Claim, Verdict]]:
        return [(claim, self._judge(claim)) for claim in self.paper.claims]

    def _judge(self, claim: Claim) -> Verdict:
        """A claim of one row against several is as good as against the best of them."""
        if claim.better is None:
            check = self.plan.checks.get(claim.text)
            return check(self.values) if check else Verdict("not checked", "orders no numbers")
        better, others = self.paper.ordered(claim)
        if any(self.values[i] is None for i in (better, *others)):
            return Verdict("not checked", "a number is missing here")
        sign = 1 if self.paper.metric["better"] == "higher" else -1
        best = max(others, key=lambda i: sign * self.values[i].interval.mean)
        first, second = self.values[better], self.values[best]
        difference = first.minus(second) if sign > 0 else second.minus(first)
        rival = (
            f"to {self.paper.rows[best]['label']}, the best of them:"
            if len(others) > 1
            else "difference:"
        )
        return verdict(difference, rival)

    def write(self, folder: Path, cells: Path) -> list[Path]:
        """<scale>.md, .tex, .csv, .json and .png of `folder`; the JSON says which runs the numbers are of."""
        texts = {
            "md": self.markdown(),
            "tex": self.latex(),
            "csv": self.csv(),
            "json": self.json(cells),
        }
        files = [
            write_atomically(folder / f"{self.scale}.{kind}", text) for kind, text in texts.items()
        ]
        if self.paper.metric["unit"] != "1 yes, 0 no":
            files.append(write_atomically(folder / f"{self.scale}.png", self.picture()))
        return files

    # ----------------------------------------------------------------------------------------------------------
    # The table in the paper's layout
    # ----------------------------------------------------------------------------------------------------------

    def grid(self) -> tuple[list[str], list[str], dict[tuple[str, str], int]]:
        """Names of the lines and columns, and the number of the row that stands in a place."""
        places = {self.plan.place(row): i for i, row in enumerate(self.paper.rows)}
        lines, columns = (list(dict.fromkeys(names)) for names in zip(*places, strict=True))
        return lines, columns, places

    @property
    def measure(self) -> str:
        """What the numbers are, with their unit."""
        name, unit = self.paper.metric["name"], self.paper.metric["unit"]
        return f"{name}, {unit}" if unit else name

    def text(self, number: int, plus_minus: str = " ± ") -> tuple[str, str]:
        """The paper's number and ours."""
        value, ours = self.paper.rows[number]["value"], self.values[number]
        digits = {"psnr": 2, "fid": 3, "geneval": 3}.get(self.paper.metric["name"], 0)
        theirs = "-" if value is None else f"{value:.{digits if digits != 3 or value < 1 else 2}f}"
        if ours is None:
            return theirs, "-"
        half = "" if ours.interval.high is None else (ours.interval.high - ours.interval.low) / 2
        return theirs, f"{ours.interval.mean:.{digits}f}" + (
            f"{plus_minus}{half:.{digits}f}" if half else ""
        )

    def markdown(self) -> str:
        lines, columns, places = self.grid()
        header = [self.measure, *columns]
        rows = [
            [line, *(self._both(places.get((line, column))) for column in columns)]
            for line in lines
        ]
        claims = [
            [claim.text, _gain(claim), each.answer, each.why] for claim, each in self.verdicts
        ]
        doubts = [f"- {doubt}" for doubt in self.paper.doubts]
        doubts += [f"- {row['label']}: {row['doubt']}." for row in self.paper.rows if row["doubt"]]
        parts = [
            f"# {self.paper.name.replace('_', ' ').capitalize()}: {self.paper.title}",
            f"The paper's number / ours at {self.scale} scale, with an interval of 95 % where one is known; "
            f"{self.paper.metric['better']} is better. Ours: {self.plan.standing_for}",
            markdown_table(header, rows),
            "## Claims",
            markdown_table(["the paper's claim", "its gain", "here", "why"], claims),
            "Differences are of the same noises, picture by picture, where there are intervals.",
            "## Doubts about the paper's numbers",
            "\n".join(doubts),
        ]
        return "\n\n".join(part.strip() for part in parts) + "\n"

    def _both(self, number: int | None) -> str:
        return "" if number is None else " / ".join(self.text(number))

    def latex(self) -> str:
        """A tabular for the package booktabs."""
        lines, columns, places = self.grid()
        rows = []
        for line in lines:
            numbers = [places.get((line, column)) for column in columns]
            both = ["" if n is None else " / ".join(self.text(n, r" $\pm$ ")) for n in numbers]
            rows.append(" & ".join([latex(line), *both]) + r" \\")
        head = " & ".join(["", *map(latex, columns)]) + r" \\"
        body = [
            rf"\begin{{tabular}}{{l{'c' * len(columns)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *rows,
        ]
        caption = f"% {self.paper.title}: the paper's number / ours ({self.scale} scale), {self.paper.metric['name']}"
        return "\n".join([caption, *body, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def csv(self) -> str:
        """One number a line."""
        buffer = io.StringIO()
        table = csv.writer(buffer, lineterminator="\n")
        table.writerow(
            ["line", "column", "strategy", "num_steps", "paper", "ours", "low", "high", "n"]
        )
        for row, value in zip(self.paper.rows, self.values, strict=True):
            ours = (
                [""] * 4
                if value is None
                else [*_rounded(value.interval.mean, value.interval.low, value.interval.high)]
            )
            ours = ours if value is None else [*ours, value.interval.n]
            theirs = "" if row["value"] is None else row["value"]
            texts = map(csv_cell, (*self.plan.place(row), row["strategy"] or ""))
            table.writerow([*texts, row["num_steps"] or "", theirs, *ours])
        return buffer.getvalue()

    def json(self, cells: Path) -> str:
        """Numbers, claims, and the runs behind them, counted from 0: overrides and versions of packages."""
        sources = [source for source in self.plan.sources if source]
        used = dict.fromkeys(
            member for source in sources for cell in source.cells for member in cell.lineage()
        )
        places = {cell: place for place, cell in enumerate(used)}
        runs = [
            {
                "overrides": list(cell.overrides),
                "parent": cell.parent and places[cell.parent],
                "packages": read_cell(cell.folder(cells)).packages,
            }
            for cell in used
        ]
        numbers = [
            {
                "place": list(self.plan.place(row)),
                "paper": row["value"],
                "ours": value and asdict(value.interval),
                "runs": source and [places[cell] for cell in source.cells],
            }
            for row, value, source in zip(
                self.paper.rows, self.values, self.plan.sources, strict=True
            )
        ]
        claims = [
            {"claim": claim.text, "gain": claim.gain, **asdict(each)}
            for claim, each in self.verdicts
        ]
        found = {
            "id": self.paper.name,
            "scale": self.scale,
            "numbers": numbers,
            "claims": claims,
            "runs": runs,
        }
        return json.dumps(found, indent=1) + "\n"

    def picture(self) -> bytes:
        """PNG: a panel a column, a line a row of the table; circles the paper's numbers, dots with intervals ours."""
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
        for axis, column in zip(axes[0], columns, strict=True):
            for height, line in enumerate(lines):
                if (number := places.get((line, column))) is None:
                    continue
                theirs, ours = self.paper.rows[number]["value"], self.values[number]
                if theirs is not None:
                    axis.plot(theirs, height, "o", mfc="none", mec="0.4", label="paper")
                if ours is not None:
                    mean, low, high = ours.interval.mean, ours.interval.low, ours.interval.high
                    bars = None if high is None else [[mean - low], [high - mean]]
                    axis.errorbar(
                        mean,
                        height,
                        xerr=bars,
                        fmt="o",
                        ms=4,
                        color="C0",
                        label=f"ours, {self.scale}",
                    )
            axis.set_title(escaping.label(column), fontsize=9)
            axis.set_xscale("log" if self.paper.metric["name"] == "fid" else "linear")
            axis.grid(alpha=0.3)
        axes[0][0].set_yticks(range(len(lines)), map(escaping.label, lines))
        axes[0][0].invert_yaxis()
        figure.supxlabel(self.measure, fontsize=9)
        shown = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))
        figure.legend(
            shown.values(),
            shown.keys(),
            loc="outside upper right",
            ncols=2,
            frameon=False,
            fontsize=8,
        )
        return png(figure)


def summary(made: Sequence[Reproduction]) -> str:
    """Markdown: of every table how many of the paper's claims hold here, and its claims."""
    rows = []
    for each in made:
        answers = [found.answer for _, found in each.verdicts]
        link = Markup(f"[{each.paper.name.replace('_', ' ')}]({each.paper.name}/{each.scale}.md)")
        rows.append([link, each.paper.title, *(str(answers.count(answer)) for answer in ANSWERS)])
    return markdown_table(["", "what it is about", *ANSWERS], rows)


def _gain(claim: Claim) -> str:
    return "" if claim.gain is None else f"{claim.gain:+g}"


def _rounded(*values: float | None) -> list[Any]:
    return ["" if value is None else float(f"{value:.6g}") for value in values]
