"""GenEval's results as a table in the paper's layout (OSS, arXiv 2503.21774, table 7), and as a page of pictures.

The page shows every prompt with its pictures and what is wrong with them, for one schedule at a time.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from oss_exp.evaluation.geneval import TASKS, differences, scores
from oss_exp.evaluation.pictures import encoded
from oss_exp.evaluation.psnr import Interval
from oss_exp.files import read_json, write_atomically

HEADER = ["method (steps)", "overall", "single", "two", "counting", "colors", "position", "color attr"]
PAGE_PROMPTS = 120  # on the page, spread over the list; all verdicts are in geneval.json
STYLE = """body{font:14px/1.4 system-ui,sans-serif;margin:2em;color:#222}
img{image-rendering:pixelated;width:96px;height:96px}td,th{padding:.2em .7em;text-align:right}
figure{display:inline-block;margin:.3em;width:130px;vertical-align:top;font-size:12px}
.wrong img{outline:3px solid #d33}.right img{outline:3px solid #3a3}section{border-top:1px solid #ddd;padding:.5em 0}
body[data-only=wrong] figure.right{display:none}"""


def rows_of(found: Mapping[str, Any]) -> dict[str, dict[str, Interval]]:
    """What geneval.json holds -> the scores of every schedule."""
    tags = [wish["tag"] for wish in found["prompts"] for _ in range(found["images_per_prompt"])]
    return {row["label"]: scores(tags, right(row)) for row in found["rows"]}


def right(row: Mapping[str, Any]) -> list[bool]:
    return [not each["reasons"] for each in row["verdicts"]]


def table(rows: Mapping[str, tuple[int, Mapping[str, Interval]]]) -> str:
    """label -> (steps, scores) as Markdown in the layout of table 7; intervals where they are known."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for label, (steps, found) in rows.items():
        shares = [found["overall"], *(found.get(task) for task in TASKS)]
        lines.append([f"{label} ({steps})", *("-" if each is None else _share(each) for each in shares)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _share(each: Interval) -> str:
    if each.high is None:
        return f"{each.mean:.3f}"
    return f"{each.mean:.3f} ± {(each.high - each.low) / 2:.3f}"


def write(folder: Path) -> list[Path]:
    """geneval.json -> geneval.md and geneval.html."""
    found = read_json(folder / "geneval.json", "GenEval's results")
    known = rows_of(found)
    steps = {row["label"]: row["num_steps"] for row in found["rows"]}
    names = {label: label.removesuffix(f"_{count}") for label, count in steps.items()}
    text = table({names[label]: (steps[label], each) for label, each in known.items()})
    tags = [wish["tag"] for wish in found["prompts"] for _ in range(found["images_per_prompt"])]
    teacher, *others = found["rows"]
    gains = {row["label"]: differences(tags, right(row), right(teacher)) for row in others}
    text += "\nMinus the teacher, pair by pair:\n\n" + table(
        {names[label]: (steps[label], each) for label, each in gains.items()}
    )
    text += (
        f"\nShares of {len(tags)} pictures, {found['images_per_prompt']} of each prompt, on the same noises; overall "
        "is the mean of the six. Intervals of 95 %.\n"
    )
    return [
        write_atomically(folder / "geneval.md", text),
        write_atomically(folder / "geneval.html", _page(folder, found, text)),
    ]


def _page(folder: Path, found: Mapping[str, Any], text: str) -> str:
    count, wished = found["images_per_prompt"], found["prompts"]
    shown = sorted({round(i * (len(wished) - 1) / max(PAGE_PROMPTS - 1, 1)) for i in range(PAGE_PROMPTS)})
    parts = ["<!doctype html><meta charset=utf-8><title>GenEval</title>", f"<style>{STYLE}</style><h1>GenEval</h1>"]
    parts.append(f"<pre>{html.escape(text)}</pre>")
    choices = "".join(f"<option>{html.escape(row['label'])}</option>" for row in found["rows"])
    parts.append(
        f"<p><select id=label>{choices}</select> <label><input type=checkbox id=wrong> failures only</label></p>"
    )
    for row in found["rows"]:
        parts.append(f'<div class=schedule data-label="{html.escape(row["label"])}" hidden>')
        for number in shown:
            parts.append(f"<section><b>{html.escape(wished[number]['prompt'])}</b> ({wished[number]['tag']})<br>")
            for each in row["verdicts"][number * count : (number + 1) * count]:
                parts.append(_figure(folder / "images" / row["label"] / f"{each['number']:06d}.png", each["reasons"]))
            parts.append("</section>")
        parts.append("</div>")
    parts.append(
        "<script>const s=document.getElementById('label'),w=document.getElementById('wrong');"
        "const f=()=>{for(const d of document.querySelectorAll('.schedule'))d.hidden=d.dataset.label!==s.value;"
        "document.body.dataset.only=w.checked?'wrong':''};s.onchange=w.onchange=f;f()</script>"
    )
    return "\n".join(parts)


def _figure(file: Path, reasons: Sequence[str]) -> str:
    picture = Image.open(file).convert("RGB")
    picture.thumbnail((256, 256))
    data = base64.b64encode(encoded(np.asarray(picture))).decode()
    kind = "wrong" if reasons else "right"
    said = html.escape("; ".join(reasons)) or "as asked"
    return f'<figure class={kind}><img src="data:image/png;base64,{data}"><figcaption>{said}</figcaption></figure>'
