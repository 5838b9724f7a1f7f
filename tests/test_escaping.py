"""Names with special characters appear unchanged in every output, and nothing obeys them."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from helpers import result, run_cli
from markdown_it import MarkdownIt

from experiments.hostile_files.names import NAMES
from oss_exp.checks import require_name
from oss_exp.escaping import (
    PlainConsole,
    csv_cell,
    label,
    latex,
    line,
    markdown,
    on_a_screen,
    visible,
)
from oss_exp.evaluation import comparison
from oss_exp.evaluation.comparison import with_gains
from oss_exp.report import plots, web
from oss_exp.schedule import StepSchedule


@pytest.fixture(scope="module")
def lines():
    """Results of a strategy for every name."""
    results = []
    for i, name in enumerate(NAMES):
        results.append(result(name, {0: 30.0 - i, 1: 31.0 - i}, metrics={name: 1.0}))
    return with_gains(results)


def test_the_names_are_allowed():
    assert len(set(NAMES)) > 60
    for name in NAMES:
        require_name(strategy=name)


@pytest.mark.parametrize(
    "name", ["../x", "..", "a/b", "a\\b", "a\0", "\x1b[31m", "a\nb", "a\u202eb", " ", "x" * 201]
)
def test_names_with_paths_or_control_characters_are_refused_in_a_short_message(name):
    with pytest.raises(ValueError, match=r"^strategy must be a name ") as caught:
        require_name(strategy=name)
    assert len(str(caught.value)) < 200
    assert visible(str(caught.value)) == str(caught.value)


# --------------------------------------------------------------------------------------------------
# The terminal
# --------------------------------------------------------------------------------------------------


def printed(*parts) -> str:
    """Return what a terminal shows."""
    file = io.StringIO()
    console = PlainConsole(file=file, width=4000, force_terminal=True, color_system=None)
    console.print(*parts, soft_wrap=True)
    return file.getvalue()


def test_a_terminal_shows_names_and_obeys_nothing(lines):
    table = printed(comparison.terminal(lines, "[bold]title\x1b]0;x\x07"))
    for name in NAMES:
        assert re.search(rf"│ {re.escape(name)} *│", table)
        assert printed(name) == f"{name}\n"
    assert "[bold]title\\x1b]0;x\\x07" in table
    assert printed("a\x1b[31mb\rc\u202ed") == "a\\x1b[31mb\\rc\\u202ed\n"


def test_messages_are_cut_to_a_screen():
    assert on_a_screen("x\ny") == "x\ny"
    assert len(on_a_screen("x" * 10**6)) < 4100
    assert on_a_screen("x\n" * 1000).count("\n") == 60
    assert line("a\x1b[31m\nb") == "a\\x1b[31m"
    assert line("x" * 1000) == "x" * 297 + "..."


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


class Text(HTMLParser):
    """The texts of a table's cells, and all tags of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


TABLE = {"table", "thead", "tbody", "tr", "td", "th", "p", "caption", "div"}


def test_markdown_shows_names_and_obeys_nothing(lines):
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    page = Text(reader.render(comparison.markdown(lines)))
    width = len(comparison.columns(lines)[0])
    cells = [page.cells[i : i + width] for i in range(0, len(page.cells), width)]

    assert [cell.strip() for cell in cells[0][8:-2]] == NAMES
    assert [row[0].strip() for row in cells[1:]] == NAMES
    assert page.tags <= TABLE


def test_markdown_has_no_emojis_formulas_mentions_or_links():
    text = "".join(map(markdown, NAMES))
    assert not re.search(r"(?<!\\):[\w+-]+:|(?<!\\)\$|(?<!\\)@\w|www\.", text)


def test_pages_show_names_and_obey_nothing(lines):
    for page in (comparison.html(lines, "<b>title"), web.table(*comparison.columns(lines))):
        text = Text(page)
        assert text.tags <= TABLE
        assert [cell for cell in text.cells if cell in NAMES][: len(NAMES)] == NAMES


def test_the_data_and_the_title_of_a_page_contain_no_tags():
    data = {"name": NAMES}
    page = web.page(NAMES[16], [], data)
    block = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert "<" not in block
    assert json.loads(block) == data
    assert f"<h1>{html.escape(NAMES[16])}</h1>" in web.page(NAMES[16], [], {})


def read_latex(text: str) -> str:
    """Return what TeX prints of a text whose only commands are these."""
    commands = {
        "textbackslash": "\\",
        "textasciitilde": "~",
        "textasciicircum": "^",
        "textless": "<",
        "textgreater": ">",
        "textbar": "|",
        "textasciigrave": "`",
    }
    parts = re.compile(r"\\([a-z]+)\{\}|\\([_%&#{}$])|\{([\[*])\}|(\{\})|([^\\{}_%&#$~^<>|`\[*])")
    printed = ""
    place = 0
    while place < len(text):
        match = parts.match(text, place)
        assert match, f"TeX would obey {text[place:]!r}"
        command, escaped, braced, _, letter = match.groups()
        printed += commands[command] if command else escaped or braced or letter or ""
        place = match.end()
    return printed


def test_latex_shows_names_and_obeys_nothing():
    for name in [*NAMES, r"\input{x}"]:
        assert read_latex(latex(name)) == name
        assert not re.search("--|''|,,", latex(name))  # ligatures


def test_a_spreadsheet_shows_names_and_computes_nothing():
    buffer = io.StringIO()
    csv.writer(buffer).writerows([csv_cell(name), -1.5] for name in NAMES)
    for name, (cell, number) in zip(NAMES, csv.reader(io.StringIO(buffer.getvalue())), strict=True):
        assert cell == (f"'{name}" if name[0] in "=+-@" else name)
        assert number == "-1.5"
    assert csv_cell("\t=1") == "'\t=1"


@pytest.fixture
def figures(monkeypatch):
    """The figures that the plots draw."""
    drawn = []
    monkeypatch.setattr(plots, "png", lambda figure: drawn.append(figure) or b"")
    return drawn


@pytest.mark.parametrize(
    "part", [slice(plots.ROWS), slice(plots.ROWS, None)], ids=["first", "rest"]
)
def test_a_legend_shows_every_name_and_no_formulas(figures, part):
    """A legend has at most `plots.ROWS` entries."""
    names = NAMES[part]
    plans = []
    for i, name in enumerate(names):
        plans.append((name, StepSchedule(torch.tensor([1, 0.5 + i / 200, 0]))))

    plots.schedules(plans, [])

    texts = figures[0].legends[0].get_texts()
    labels = [text._preprocess_math(text.get_text()) for text in texts]
    assert labels == [(name, False) for name in names]


def test_pictures_show_names_and_no_formulas(figures):
    results = [result(name, {0: 1.0}, num_steps=2) for name in NAMES[:30]]
    image = np.zeros((1, 2, 2, 1), np.uint8)
    pictures = {"teacher": image, **{f"{name} K=2": image for name in NAMES[:30]}}

    plots.samples(pictures, results)

    texts = [axis.yaxis.label for axis in figures[0].axes if axis.yaxis.label.get_text()]
    labels = {text._preprocess_math(text.get_text()) for text in texts[1:]}
    assert labels == {(f"{name} K=2\n1.00 dB", False) for name in NAMES[:30]}
    assert label("$") == r"\$"


def test_a_run_of_such_a_schedule_shows_its_name_everywhere(tmp_path, capsys):
    name = "v1.5|[bold]"
    folder = tmp_path / "run"
    StepSchedule([1.0, 0.5, 0.0], provenance={"strategy": {"name": name}}).save(tmp_path / "x.json")
    run_cli(
        "task=evaluate",
        f"task.schedule={tmp_path / 'x.json'}",
        "task.allow_other_model=true",
        "model=mixture_digits",
        "num_steps=[2]",
        "num_teacher_steps=4",
        "data.eval_samples=2",
        "evaluation.save_images=png",
        "logger=none",
        f"hydra.run.dir={folder}",
    )

    assert f"│ {name} " in capsys.readouterr().out
    assert "| v1.5\\|\\[bold\\] | 2 |" in (folder / "table.md").read_text()
    assert f"<td>{name}</td>" in (folder / "report.html").read_text()
    assert f"{name}_2" in {path.name for path in (folder / "images").iterdir()}
    with np.load(folder / "samples.npz") as pictures:
        assert set(pictures) == {"teacher", f"{name} K=2"}
