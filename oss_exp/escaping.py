"""Text on its way out: shown as it is, and read as nothing but text, wherever it comes from.

A name, a prompt or a message may hold what a terminal, Markdown, LaTeX, a spreadsheet or matplotlib would obey. Each of
these borders has its function here; HTML has Python's `html.escape`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

SCREEN = 60, 4000  # lines and characters of a message
# Control characters but for tabs and line feeds, other ends of lines, and what turns the direction of writing.
OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
MARKDOWN = re.compile(
    r"[\\`\[\]<>|&~$]"  # code, links, HTML, cells, entities, struck out, formulas
    r"|\*(?=\S)|(?<=\S)\*|(?<![^\W_])_|_(?![^\W_])"  # emphasis, which a lone * and the _ within a word are not
    r"|:(?=//|[\w+-]+:)|(?<=www)\.|@(?=\w)"  # links, emoji, people
)
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    **{letter: f"\\{letter}" for letter in "_%&#{}$"},
    **{letter: f"{{{letter}}}" for letter in "[*"},  # which \\\\ at the end of a row would take
}


class Markup(str):
    """Text that is Markdown already."""


def visible(text: str) -> str:
    """Return the text with what a terminal would obey written out: the character 27 as \\x1b."""
    return OBEYED.sub(
        lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text
    )


def line(text: str, most: int = 300) -> str:
    """Return the first line of a text, visible and cut to so many characters."""
    first = visible(text.strip().partition("\n")[0]).replace("\t", " ")
    return first if len(first) <= most else f"{first[: most - 3]}..."


def on_a_screen(text: str) -> str:
    """Return a message, visible, and cut to what a screen holds."""
    lines, characters = SCREEN
    shown = "\n".join(visible(text[: characters + 1]).split("\n")[:lines])[:characters]
    return shown if len(text) <= characters and text.count("\n") < lines else f"{shown}\n... (cut)"


def plain(text: str) -> Text:
    """Return text for a rich table or panel of anybody's console: visible, without markup."""
    return Text(visible(text))


class PlainConsole(Console):
    """A console that shows text as it is: no [markup], no :emoji:, no control characters.

    In a file or a pipe it is wide enough for a table.
    """

    def __init__(self, stderr: bool = False, **options: Any):
        stream = sys.stderr if stderr else sys.stdout
        options = {"width": None if stream.isatty() else 120, **options}
        super().__init__(markup=False, emoji=False, stderr=stderr, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


def markdown(text: str) -> str:
    """Return the text as Markdown, for a cell or within a line."""
    return (
        text
        if isinstance(text, Markup)
        else MARKDOWN.sub(r"\\\g<0>", " ".join(visible(text).splitlines()))
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown whose cells are text."""
    lines = [map(markdown, header), ["---"] * len(header), *(map(markdown, row) for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def latex(text: str) -> str:
    """Return the text as LaTeX."""
    letters = "".join(LATEX.get(letter, letter) for letter in " ".join(visible(text).splitlines()))
    return re.sub("([-',!?])(?=[-',])", r"\1{}", letters)  # two of them are another sign


def csv_cell(text: str) -> str:
    """Return the text for a cell that a spreadsheet must not take for a formula."""
    text = visible(text)
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@") else text


def label(text: str) -> str:
    """Return the text for matplotlib, which takes what is between two $ for a formula."""
    return visible(text).replace("$", r"\$")
