"""Escape text for a terminal, Markdown, LaTeX, a spreadsheet or matplotlib.

A name, a prompt or a message may hold characters that one of these would obey. Each
output has its function here, so that text is shown as it is; HTML has Python's
`html.escape`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

SCREEN = 60, 4000  # lines and characters of a message
# Control characters except tabs and line feeds, other line ends, and marks of writing direction.
OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
MARKDOWN = re.compile(
    # Code, links, HTML, cells, entities, struck-out text, formulas.
    r"[\\`\[\]<>|&~$]"
    # Emphasis. A lone * and a _ within a word are not.
    r"|\*(?=\S)|(?<=\S)\*|(?<![^\W_])_|_(?![^\W_])"
    # Links, emoji, people.
    r"|:(?=//|[\w+-]+:)|(?<=www)\.|@(?=\w)"
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
    **{letter: f"{{{letter}}}" for letter in "[*"},  # an argument of \\\\ at the end of a row
}


class Markup(str):
    """A text that is Markdown already and is not escaped."""


def visible(text: str) -> str:
    """Return the text with control characters written out, such as character 27 as \\x1b."""

    def written_out(match: re.Match[str]) -> str:
        return match[0].encode("unicode_escape", "surrogatepass").decode()

    return OBEYED.sub(written_out, text)


def line(text: str, most: int = 300) -> str:
    """Return the first line of a text, visible and cut to `most` characters."""
    first = visible(text.strip().partition("\n")[0]).replace("\t", " ")
    return first if len(first) <= most else f"{first[: most - 3]}..."


def on_a_screen(text: str) -> str:
    """Return a message, visible and cut to 60 lines and 4000 characters."""
    max_lines, max_characters = SCREEN
    lines = visible(text[: max_characters + 1]).split("\n")
    message = "\n".join(lines[:max_lines])[:max_characters]
    fits = len(text) <= max_characters and text.count("\n") < max_lines
    return message if fits else f"{message}\n... (cut)"


def plain(text: str) -> Text:
    """Return the text for a rich table or panel of any console: visible, without markup."""
    return Text(visible(text))


class PlainConsole(Console):
    """A console that shows text as it is, without [markup], :emoji: and control characters.

    In a file or a pipe it is 120 columns wide, so that a table fits.
    """

    def __init__(self, stderr: bool = False, **options: Any):
        stream = sys.stderr if stderr else sys.stdout
        options = {"width": None if stream.isatty() else 120, **options}
        super().__init__(markup=False, emoji=False, stderr=stderr, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


def markdown(text: str) -> str:
    """Return the text escaped as one line of Markdown; `Markup` is returned unchanged."""
    if isinstance(text, Markup):
        return text
    return MARKDOWN.sub(r"\\\g<0>", " ".join(visible(text).splitlines()))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with escaped cells."""
    lines = [_markdown_row(header), "| " + " | ".join(["---"] * len(header)) + " |"]
    lines += map(_markdown_row, rows)
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(markdown, cells)) + " |"


def latex(text: str) -> str:
    """Return the text escaped as one line of LaTeX."""
    one_line = " ".join(visible(text).splitlines())
    escaped = "".join(LATEX.get(letter, letter) for letter in one_line)
    # Two of these in a row would be a ligature.
    return re.sub("([-',!?])(?=[-',])", r"\1{}", escaped)


def csv_cell(text: str) -> str:
    """Return the text for a CSV cell, so that no spreadsheet takes it for a formula."""
    text = visible(text)
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@") else text


def label(text: str) -> str:
    """Return the text for matplotlib, with every $ escaped, since two would enclose a formula."""
    return visible(text).replace("$", r"\$")
