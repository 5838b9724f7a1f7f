"""GenEval's results as a table in the paper's layout (OSS, arXiv 2503.21774, table 7), and as a page of pictures.

The page shows every prompt with its pictures and what is wrong with them, for one schedule at a time.
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
SIDE = 4096
PAGE_PICTURES = (
    1000  # on the page, of prompts spread over the list; all verdicts are in geneval.json
)
CHOICE = """<p><select id="label">{}</select> <label><input type="checkbox" id="wrong"> failures only</label></p>"""


def right(row: Judged) -> list[bool]:
    """Which of its pictures show what was asked for."""
    return [not verdict.reasons for verdict in row.verdicts]


def cells(rows: Mapping[str, tuple[int, Mapping[str, Interval]]]) -> list[list[str]]:
    """label (may end in _steps) -> (steps, scores), in the layout of table 7; intervals where they are known."""
    found = []
    for label, (steps, scored) in rows.items():
        shares = [scored["overall"], *(scored.get(task) for task in TASKS)]
        name = label.removesuffix(f"_{steps}")
        found.append(
            [f"{name} ({steps})", *("-" if each is None else _share(each) for each in shares)]
        )
    return found


def table(rows: Mapping[str, tuple[int, Mapping[str, Interval]]]) -> str:
    """Those cells as Markdown."""
    return markdown_table(HEADER, cells(rows))


def _share(each: Interval) -> str:
    return f"{each.mean:.3f}" if each.half is None else f"{each.mean:.3f} ± {each.half:.3f}"


def files(folder: Path) -> dict[Path, str]:
    """geneval.json -> geneval.md and geneval.html, each with its text."""
    record = read_geneval(folder)
    tags, (teacher, *others) = record.tags, record.rows
    shares = {row.label: (row.num_steps, scores(tags, right(row))) for row in record.rows}
    apart = {
        row.label: (row.num_steps, differences(tags, right(row), right(teacher))) for row in others
    }
    note = (
        f"Shares of {len(tags)} pictures, {record.images_per_prompt} of each prompt, on the same noises; overall "
        "is the mean of the six. Intervals of 95 %."
    )
    text = f"{table(shares)}\n{MINUS}\n\n{table(apart)}\n{note}\n"
    body = [web.table(HEADER, cells(shares)), f"<p>{MINUS}</p>", web.table(HEADER, cells(apart))]
    body += [f'<p class="note">{note} A click on a column sorts.</p>', *_gallery(folder, record)]
    return {folder / "geneval.md": text, folder / "geneval.html": web.page("GenEval", body, {})}


def _gallery(folder: Path, record: GenEvalRecord) -> Iterator[str]:
    """Every schedule's pictures of the same prompts; the page's script shows one schedule at a time."""
    count, wished = record.images_per_prompt, record.prompts
    most = max(1, PAGE_PICTURES // (count * len(record.rows)))
    shown = np.linspace(0, len(wished) - 1, min(most, len(wished))).round().astype(int)
    each = max(1, PAGE_PICTURES // len(record.rows))  # of one prompt, at most
    labels = [html.escape(row.label) for row in record.rows]
    yield CHOICE.format("".join(f'<option value="{label}">{label}</option>' for label in labels))
    for row in record.rows:
        yield f'<div class="schedule" data-label="{html.escape(row.label)}" hidden>'
        for number in shown:
            prompt, tag = (html.escape(wished[number][key]) for key in ("prompt", "tag"))
            yield f"<section><b>{prompt}</b> ({tag})<br>"
            for verdict in row.verdicts[number * count : number * count + min(count, each)]:
                picture = inside(folder, "images", row.label, f"{verdict.number:06d}.png")
                yield _figure(picture, verdict.reasons)
            yield "</section>"
        yield "</div>"


def _picture(file: Path) -> Image.Image:
    """A picture of at most SIDE pixels a side; ValueError for any other file."""
    try:
        with Image.open(
            io.BytesIO(read_binary(file, "picture", LIMIT)), formats=["png"]
        ) as picture:
            if max(picture.size) > SIDE:
                raise ValueError(f"{picture.size[0]} x {picture.size[1]} pixels")
            return picture.convert("RGB")
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever broken bytes make Pillow do
        raise ValueError(
            f"picture {file} cannot be read ({error!s:.100}); make it again with task=geneval"
        ) from None


def _figure(file: Path, reasons: Sequence[str]) -> str:
    picture = _picture(file)
    form = "png" if max(picture.size) <= 64 else "jpeg"
    picture.thumbnail((128, 128))
    kind = "wrong" if reasons else "right"
    said = html.escape("; ".join(reasons)) or "as asked"
    return f'<figure class="{kind}"><img src="{web.url(picture, form)}"><figcaption>{said}</figcaption></figure>'
