"""GenEval's results as a table in the layout of the paper, and as a page of pictures.

The table is that of OSS, arXiv 2503.21774, table 7. The page shows every prompt with
its pictures and what is wrong with them, for one schedule at a time.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from oss_exp.escaping import markdown_table
from oss_exp.evaluation.psnr import Interval
from oss_exp.files import LIMIT, inside, read_binary
from oss_exp.geneval.rules import TASKS, differences, scores
from oss_exp.report import web
from oss_exp.report.records import GenEvalRecord, Judged, read_geneval

HEADER = [
    "method (steps)",
    "overall",
    "single",
    "two",
    "counting",
    "colors",
    "position",
    "color attr",
]
MINUS = "Minus the teacher, pair by pair:"
SIDE = 4096  # longest side of a picture that is read, in pixels
PAGE_PICTURES = 1000  # on the page, of prompts spread over the list; geneval.json has all verdicts
CHOICE = (
    '<p><select id="label" aria-label="schedule">{}</select> '
    '<label><input type="checkbox" id="wrong"> failures only</label></p>'
)
FIGURE = '<figure class="{}"><img src="{}" alt=""><figcaption>{}</figcaption></figure>'

Shares = Mapping[str, tuple[int | None, Mapping[str, Interval]]]
"""Steps, if there are any, and scores by label. A label may end in its steps, as `oss_10`."""


def right(row: Judged) -> list[bool]:
    """Return for each picture whether it shows what was asked for."""
    return [not verdict.reasons for verdict in row.verdicts]


def cells(rows: Shares) -> list[list[str]]:
    """Return the rows of table 7, with intervals where there are any."""
    table_rows = []
    for label, (steps, intervals) in rows.items():
        name = label if steps is None else f"{label.removesuffix(f'_{steps}')} ({steps})"
        row = [name, _share(intervals["overall"])]
        row += [_share(intervals.get(task)) for task in TASKS]
        table_rows.append(row)
    return table_rows


def table(rows: Shares) -> str:
    """Return table 7 as Markdown."""
    return markdown_table(HEADER, cells(rows))


def _share(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    half = "" if interval.half is None else f" ± {interval.half:.3f}"
    return f"{interval.mean:.3f}{half}"


def files(folder: Path) -> dict[Path, str]:
    """Return the texts of geneval.md and geneval.html for a folder with geneval.json."""
    record = read_geneval(folder)
    tags = record.tags
    teacher, *students = record.rows

    # Shares, and their differences to the teacher's.
    shares = {row.label: (row.num_steps, scores(tags, right(row))) for row in record.rows}
    gains = {}
    for row in students:
        gains[row.label] = (row.num_steps, differences(tags, right(row), right(teacher)))

    # Markdown.
    note = (
        f"Shares of {len(tags)} pictures, {record.images_per_prompt} of each prompt, on the same "
        "noises; overall is the mean of the six. Intervals of 95 %."
    )
    text = f"{table(shares)}\n{MINUS}\n\n{table(gains)}\n{note}\n"

    # Page.
    body = [
        web.table(HEADER, cells(shares)),
        f"<p>{MINUS}</p>",
        web.table(HEADER, cells(gains)),
        f'<p class="note">{note} A click on a column sorts.</p>',
        *_gallery(folder, record),
    ]
    return {folder / "geneval.md": text, folder / "geneval.html": web.page("GenEval", body, {})}


def _gallery(folder: Path, record: GenEvalRecord) -> Iterator[str]:
    """Yield HTML with each schedule's pictures; the page's script shows one schedule at a time."""
    count = record.images_per_prompt
    prompts = record.prompts

    # The prompts on the page, and the number of pictures of each.
    most = min(max(1, PAGE_PICTURES // (count * len(record.rows))), len(prompts))
    numbers = np.linspace(0, len(prompts) - 1, most).round().astype(int)
    per_prompt = min(count, max(1, PAGE_PICTURES // len(record.rows)))

    # Choice of the schedule.
    options = []
    for row in record.rows:
        label = html.escape(row.label)
        options.append(f'<option value="{label}">{label}</option>')
    yield CHOICE.format("".join(options))

    # Pictures.
    for row in record.rows:
        yield f'<div class="schedule" data-label="{html.escape(row.label)}" hidden>'
        for number in numbers:
            wish = prompts[number]
            yield f"<section><b>{html.escape(wish['prompt'])}</b> ({html.escape(wish['tag'])})<br>"
            for verdict in row.verdicts[number * count : number * count + per_prompt]:
                picture = inside(folder, "images", row.label, f"{verdict.number:06d}.png")
                yield _figure(picture, verdict.reasons)
            yield "</section>"
        yield "</div>"


def _picture(file: Path) -> Image.Image:
    """Read a PNG of at most SIDE pixels a side; raise ValueError for any other file."""
    try:
        data = io.BytesIO(read_binary(file, "picture", LIMIT))
        with Image.open(data, formats=["png"]) as picture:
            if max(picture.size) > SIDE:
                raise ValueError(f"{picture.size[0]} x {picture.size[1]} pixels")
            return picture.convert("RGB")
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever Pillow raises for broken bytes
        raise ValueError(
            f"picture {file} cannot be read ({error!s:.100}); make it again with task=geneval"
        ) from None


def _figure(file: Path, reasons: Sequence[str]) -> str:
    """Return the HTML of a picture with what is wrong with it."""
    picture = _picture(file)
    form = "png" if max(picture.size) <= 64 else "jpeg"
    picture.thumbnail((128, 128))
    caption = html.escape("; ".join(reasons)) or "as asked"
    return FIGURE.format("wrong" if reasons else "right", web.url(picture, form), caption)
