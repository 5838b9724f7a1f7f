"""Files of prompts: lists, tables with a column of prompts, GenEval's metadata and COCO's captions."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import FailFast, TypeAdapter

from oss_exp.files import LIMIT, Record, find_asset, parse_record, read_text
from oss_exp.image_files import ENDINGS
from oss_exp.validation import shown

REMEDY = (
    "give a text file (.txt) with one prompt a line, or a table (.csv, .tsv) with a column `prompt`"
)
CAPTIONS = 1 << 27  # 128 MiB: bytes of a JSON file; COCO's largest has 92 million
COLUMNS = (
    "prompt",
    "prompts",
    "caption",
    "text",
)  # of tables, whatever their case; the first one counts
DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}  # by the ending of a table's name, the likely one first
CONTROL = re.compile(
    r"[\x00-\x08\r\x0e-\x1b\x7f-\x84\x86-\x9f]"
)  # but white space, which ends no line here
LINES_OF_JSON = re.compile(r"\s*\{.*\}[ \t]*\n\s*\{")


def read_prompts(file: str | Path) -> list[str]:
    """Return the prompts of a path or a shipped file, at least one.

    One a line (.txt, or any other ending); a table whose first line names a column `prompt` (.csv, .tsv); a JSON object
    with a "prompt" a line (.jsonl, as GenEval's metadata); COCO's captions, the first of every image, or a list of
    either (.json). JSON and a table with tabs may have any other ending too. Lines end at line feeds only. For models
    of images, a prompt is the path of one; that of an image is its own.

    ValueError names the file and its line: for text that is not UTF-8, a table without such a column, and the like.
    """
    path = find_asset(file, "prompts")
    ending = path.suffix.casefold()
    if ending in ENDINGS:
        return [str(path)]
    text = read_text(path, "prompts", CAPTIONS if ending == ".json" else LIMIT).replace(
        "\r\n", "\n"
    )
    if "\0" in text:
        raise ValueError(f"prompts {path} has null characters, as UTF-16 has; save it as UTF-8")
    if ending in DELIMITERS:
        prompts = _table(path, text, DELIMITERS[ending])
    elif ending in (".jsonl", ".ndjson") and not text.lstrip().startswith("["):
        prompts = _metadata(path, text)
    elif ending.startswith((".json", ".ndjson")) or text.lstrip().startswith(
        ('{"', "{\n", '["', "[{", "[\n")
    ):
        prompts = _metadata(path, text) if LINES_OF_JSON.match(text) else _json(path, text)
    elif "\t" in (head := text.partition("\n")[0]) and _column(head.split("\t")) is not None:
        prompts = _table(path, text, "\t")
    else:
        prompts = text.split("\n")

    prompts = [prompt for prompt in map(str.strip, prompts) if prompt]
    if not prompts:
        raise ValueError(f"prompts {path} has 0 prompts; {REMEDY}")
    for prompt in prompts:
        if CONTROL.search(prompt):
            raise ValueError(
                f"prompts {path} has control characters in {shown(prompt)}; take them out, and end lines by line feeds"
            )
    return prompts


class PromptRecord(Record):
    """A line of a .jsonl file."""

    prompt: str


class CaptionsRecord(Record):
    """COCO's captions_*.json: several captions of each image."""

    class Annotation(Record):
        """A caption of an image."""

        image_id: int | str
        caption: str

    annotations: Annotated[list[Annotation], FailFast()]


LIST = TypeAdapter(Annotated[list[str], FailFast()])
RECORDS = TypeAdapter(Annotated[list[PromptRecord], FailFast()])


def _metadata(path: Path, text: str) -> list[str]:
    lines = enumerate(text.split("\n"), start=1)
    return [
        parse_record(line, PromptRecord, f"prompts {path}, line {number}", REMEDY).prompt
        for number, line in lines
        if line.strip()
    ]


def _json(path: Path, text: str) -> list[str]:
    name, start = f"prompts {path}", text.split(maxsplit=2)[:2]
    if "".join(start).startswith("[{"):
        return [record.prompt for record in parse_record(text, RECORDS, name, REMEDY)]
    if "".join(start).startswith("["):
        return parse_record(text, LIST, name, REMEDY)
    first: dict[int | str, str] = {}
    for annotation in parse_record(text, CaptionsRecord, name, REMEDY).annotations:
        first.setdefault(annotation.image_id, annotation.caption)
    return list(first.values())


# --------------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------------


def _table(path: Path, text: str, delimiters: str) -> list[str]:
    """The column of prompts. Without quotes by the rules of CSV, a file of tabs is read as it stands."""
    head = text.partition("\n")[0]
    delimiter = next(
        (each for each in delimiters if _column(_cells(head, each)) is not None), delimiters[0]
    )
    try:
        rows = _rows(text, delimiter, csv.QUOTE_MINIMAL)
    except csv.Error as error:
        if delimiter != "\t":
            raise ValueError(f"prompts {path} is no table: {error}; {REMEDY}") from None
        rows = _rows(text, delimiter, csv.QUOTE_NONE)
    header = rows[0][1] if rows else []
    column = _column(header)
    if column is None:
        raise ValueError(
            f"prompts {path} has no column {' or '.join(COLUMNS)} in its first line, but {shown(header)}; name the "
            "column of the prompts so, or give a text file (.txt) with one prompt a line"
        )
    names = [name.strip().casefold() for name in header]
    if names.count(names[column]) > 1:
        raise ValueError(
            f"prompts {path} has {names.count(names[column])} columns {names[column]} in its first line; rename those "
            "that are not to be read"
        )
    for number, cells in rows:
        if len(cells) != len(header):
            raise ValueError(
                f"prompts {path}, line {number} has {len(cells)} fields and the first line {len(header)}; "
                f"put texts with {delimiter!r} or line ends in them in quotes"
            )
    return [cells[column] for _, cells in rows[1:]]


def _rows(text: str, delimiter: str, quoting: Literal[0, 3]) -> list[tuple[int, list[str]]]:
    """The number of the last line of every row, and its cells; empty lines are passed over."""
    lines = (f"{line}\n" for line in text.split("\n"))
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    return [(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))]


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader(io.StringIO(line), delimiter=delimiter), [])


def _column(header: list[str]) -> int | None:
    names = [name.strip().casefold() for name in header]
    return next((names.index(column) for column in COLUMNS if column in names), None)
