"""Measure how the code reads: function lengths, headings, blank lines, names, docstrings, README.

The measures and the anchors' ranges are those of a survey of diffrax, k-diffusion, EDM,
flow_matching, smalldiffusion, lightning-hydra-template, probdiffeq, torchtitan and nanochat.

    python -m experiments.surface.run                     # the package, and the README
    python -m experiments.surface.run oss_exp/stepsize    # a folder with its subfolders
    python -m experiments.surface.run oss_exp/*.py        # the direct files of a folder
"""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

from experiments.common import command_line

LONG = 20  # lines of a function that wants a heading
SPACIOUS = 15  # lines of a function that wants blank lines
NARRATIVE = {
    "found", "made", "told", "said", "kept", "known", "own", "each", "taken", "given", "asked",
    "left", "shown", "how", "such", "thus", "those", "rest", "same", "much", "wanted", "done",
    "gone", "seen", "had", "got", "held", "meant", "goals", "aims", "shadow", "ways",
}  # fmt: skip
NO_SENTENCE = ("Of ", "What ", "Where ", "As ", "Whether ", "How ", "Which ", "None, or ", "That ")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

# Measure -> least and greatest value among the anchors.
ANCHORS = {
    "function length, median": (4, 13),
    "function length, 90th percentile": (15, 51),
    "functions above 60 lines": (0, 295),
    "comment lines, % of non-blank": (1.9, 19.0),
    "long functions without a comment, %": (7, 60),
    "blank lines in long functions, %": (8, 20),
    "line length, 90th percentile": (73, 89),
    "comprehensions per 1,000 lines": (0.9, 13.8),
    "unrelated pairs assigned per 1,000 lines": (0, 10.3),
    "narrative names, % of names stored": (0, 0.5),
    "docstrings that are no sentence": (0, 0),
    "words in README": (315, 4699),
}
LOWER_BOUNDS = ("comment lines, % of non-blank", "blank lines in long functions, %")


@dataclass
class Surface:
    """Counts over some source files."""

    lengths: list[int] = field(default_factory=list)
    long: int = 0
    bare: int = 0
    lines: int = 0
    comments: int = 0
    body_lines: int = 0
    body_blanks: int = 0
    widths: list[int] = field(default_factory=list)
    comprehensions: int = 0
    pairs: int = 0
    names: int = 0
    narrative: int = 0
    fragments: int = 0

    def add(self, source: str) -> None:
        """Count one file."""
        lines = source.splitlines()
        comments = _comment_lines(source)

        # Lines.
        self.lines += len(lines)
        self.comments += len(_comment_lines(source, alone=False))
        self.widths += [len(line) for line in lines if line.strip()]

        # Nodes.
        for node in ast.walk(ast.parse(source)):
            self.comprehensions += isinstance(node, COMPREHENSIONS)
            self.pairs += _is_pair(node)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self.names += 1
                self.narrative += node.id in NARRATIVE
            if isinstance(node, DOCUMENTED):
                self.fragments += _is_fragment(ast.get_docstring(node))
            if isinstance(node, FUNCTIONS):
                self._add_function(node, lines, comments)

    def _add_function(self, node: ast.FunctionDef, lines: list[str], comments: set[int]) -> None:
        first, last = _body(node)
        length = max(last - first + 1, 0)
        self.lengths.append(length)
        if length >= LONG:
            self.long += 1
            self.bare += not any(first <= number <= last for number in comments)
        if length >= SPACIOUS:
            self.body_lines += length
            self.body_blanks += sum(not line.strip() for line in lines[first - 1 : last])

    def measures(self) -> dict[str, float]:
        """Return the measures by name."""
        nonblank = len(self.widths)
        return {
            "function length, median": median(self.lengths),
            "function length, 90th percentile": _ninth_decile(self.lengths),
            "functions above 60 lines": sum(length > 60 for length in self.lengths),
            "comment lines, % of non-blank": 100 * self.comments / nonblank,
            "long functions without a comment, %": 100 * self.bare / max(self.long, 1),
            "blank lines in long functions, %": 100 * self.body_blanks / max(self.body_lines, 1),
            "line length, 90th percentile": _ninth_decile(self.widths),
            "comprehensions per 1,000 lines": 1000 * self.comprehensions / self.lines,
            "unrelated pairs assigned per 1,000 lines": 1000 * self.pairs / self.lines,
            "narrative names, % of names stored": 100 * self.narrative / max(self.names, 1),
            "docstrings that are no sentence": self.fragments,
        }


def _ninth_decile(values: list[int]) -> float:
    return quantiles(values, n=10)[-1] if len(values) > 1 else values[0]


def _body(node: ast.FunctionDef) -> tuple[int, int]:
    """Return the first and last line of a function's body, its docstring left out."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[0].lineno, body[-1].end_lineno or 0) if body else (1, 0)


def _is_pair(node: ast.AST) -> bool:
    """Tell whether a statement is `a, b = x, y`."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
    )


def _is_fragment(docstring: str | None) -> bool:
    """Tell whether a docstring's first line is no sentence of its own."""
    if docstring is None:
        return False
    first = docstring.split("\n\n")[0].replace("\n", " ")
    return not re.search(r"[.!?:]", first) or first.startswith(NO_SENTENCE)


def _comment_lines(source: str, alone: bool = True) -> set[int]:
    """Return the numbers of the lines with a comment; rulers do not count.

    Args:
        source: Python code.
        alone: Count only lines that hold nothing but a comment.
    """
    tokens = tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__)
    numbers = set()
    for token in tokens:
        is_ruler = set(token.string) <= set("# -")
        if token.type != tokenize.COMMENT or is_ruler:
            continue
        if token.line.lstrip().startswith("#") or not alone:
            numbers.add(token.start[0])
    return numbers


def _files(paths: list[str]) -> Iterator[Path]:
    """Yield the files among the paths, and all Python files below the folders."""
    for path in map(Path, paths):
        yield from [path] if path.is_file() else sorted(path.rglob("*.py"))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "paths", nargs="*", metavar="path", help="left out: the package, and the README"
    )
    paths = parser.parse_args().paths
    surface = Surface()
    for path in _files(paths or ["oss_exp"]):
        surface.add(path.read_text())
    measures = surface.measures()
    if not paths:
        measures["words in README"] = len(Path("README.md").read_text().split())

    # One row a measure.
    print("| measure | here | anchors | |\n| --- | --- | --- | --- |")
    for name, value in measures.items():
        low, high = ANCHORS[name]
        is_low = name in LOWER_BOUNDS and value < low
        verdict = "**outside**" if is_low or value > high else ""
        print(f"| {name} | {value:.4g} | {low} to {high} | {verdict} |")


if __name__ == "__main__":
    main()
