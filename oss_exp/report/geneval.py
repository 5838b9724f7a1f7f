"""GenEval's results as a table in the paper's layout (OSS, arXiv 2503.21774, table 7), and as a page of pictures.

The page shows every prompt with its pictures and what is wrong with them, for one schedule at a time.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from oss_exp.evaluation.psnr import Interval
from oss_exp.files import read_json, write_atomically
from oss_exp.geneval.rules import TASKS, differences, scores
from oss_exp.report import web

HEADER = ["method (steps)", "overall", "single", "two", "counting", "colors", "position", "color attr"]
MINUS = "Minus the teacher, pair by pair:"
PAGE_PICTURES = 1000  # on the page, of prompts spread over the list; all verdicts are in geneval.json
CHOICE = """<p><select id="label">{}</select> <label><input type="checkbox" id="wrong"> failures only</label></p>"""


def rows_of(found: Mapping[str, Any]) -> dict[str, dict[str, Interval]]:
    """What geneval.json holds -> the scores of every schedule."""
    tags = [wish["tag"] for wish in found["prompts"] for _ in range(found["images_per_prompt"])]
    return {row["label"]: scores(tags, right(row)) for row in found["rows"]}


def right(row: Mapping[str, Any]) -> list[bool]:
    return [not each["reasons"] for each in row["verdicts"]]


def cells(rows: Mapping[str, tuple[int, Mapping[str, Interval]]]) -> list[list[str]]:
    """label (may end in _steps) -> (steps, scores), in the layout of table 7; intervals where they are known."""
    found = []
    for label, (steps, scored) in rows.items():
        shares = [scored["overall"], *(scored.get(task) for task in TASKS)]
        name = label.removesuffix(f"_{steps}")
        found.append([f"{name} ({steps})", *("-" if each is None else _share(each) for each in shares)])
    return found


def table(rows: Mapping[str, tuple[int, Mapping[str, Interval]]]) -> str:
    """Those cells as Markdown."""
    lines = [HEADER, ["---"] * len(HEADER), *cells(rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _share(each: Interval) -> str:
    if each.high is None:
        return f"{each.mean:.3f}"
    return f"{each.mean:.3f} ± {(each.high - each.low) / 2:.3f}"


def write(folder: Path) -> list[Path]:
    """geneval.json -> geneval.md and geneval.html."""
    found = read_json(folder / "geneval.json", "GenEval's results")
    known, steps = rows_of(found), {row["label"]: row["num_steps"] for row in found["rows"]}
    tags = [wish["tag"] for wish in found["prompts"] for _ in range(found["images_per_prompt"])]
    teacher, *others = found["rows"]
    gains = {row["label"]: differences(tags, right(row), right(teacher)) for row in others}
    shares, apart = ({label: (steps[label], each) for label, each in rows.items()} for rows in (known, gains))
    note = (
        f"Shares of {len(tags)} pictures, {found['images_per_prompt']} of each prompt, on the same noises; overall "
        "is the mean of the six. Intervals of 95 %."
    )
    text = f"{table(shares)}\n{MINUS}\n\n{table(apart)}\n{note}\n"
    body = [web.table(HEADER, cells(shares)), f"<p>{MINUS}</p>", web.table(HEADER, cells(apart))]
    body += [f'<p class="note">{note} A click on a column sorts.</p>', *_gallery(folder, found)]
    return [
        write_atomically(folder / "geneval.md", text),
        write_atomically(folder / "geneval.html", web.page("GenEval", body, {})),
    ]


def _gallery(folder: Path, found: Mapping[str, Any]) -> Iterator[str]:
    """Every schedule's pictures of the same prompts; the page's script shows one schedule at a time."""
    count, wished = found["images_per_prompt"], found["prompts"]
    most = max(1, PAGE_PICTURES // (count * len(found["rows"])))
    shown = np.linspace(0, len(wished) - 1, min(most, len(wished))).round().astype(int)
    yield CHOICE.format("".join(f"<option>{html.escape(row['label'])}</option>" for row in found["rows"]))
    for row in found["rows"]:
        yield f'<div class="schedule" data-label="{html.escape(row["label"])}" hidden>'
        for number in shown:
            prompt, tag = (html.escape(wished[number][key]) for key in ("prompt", "tag"))
            yield f"<section><b>{prompt}</b> ({tag})<br>"
            for each in row["verdicts"][number * count : (number + 1) * count]:
                yield _figure(folder / "images" / row["label"] / f"{each['number']:06d}.png", each["reasons"])
            yield "</section>"
        yield "</div>"


def _figure(file: Path, reasons: Sequence[str]) -> str:
    picture = Image.open(file).convert("RGB")
    form = "png" if max(picture.size) <= 64 else "jpeg"
    picture.thumbnail((128, 128))
    kind = "wrong" if reasons else "right"
    said = html.escape("; ".join(reasons)) or "as asked"
    return f'<figure class="{kind}"><img src="{web.url(picture, form)}"><figcaption>{said}</figcaption></figure>'
