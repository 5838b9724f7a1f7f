"""Files of prompts: lists, tables with a column of prompts, GenEval's metadata, COCO's captions."""

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
CAPTIONS = 1 << 27  # 128 MiB: largest JSON file; COCO's largest has 92 million bytes

# Names of a table's column of prompts, whatever their case; the first one that is there counts.
COLUMNS = ("prompt", "prompts", "caption", "text")

# Delimiters by the ending of a table's name, the likely one first.
DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}

# Control characters, without white space that does not end a line.
CONTROL = re.compile(r"[\x00-\x08\r\x0e-\x1b\x7f-\x84\x86-\x9f]")
LINES_OF_JSON = re.compile(r"\s*\{.*\}[ \t]*\n\s*\{")
JSON_STARTS = ('{"', "{\n", '["', "[{", "[\n")


def read_prompts(file: str | Path) -> list[str]:
    """Read the prompts of a file.

    The formats are:

    - one prompt a line (.txt, or any other ending),
    - a table whose first line names a column `prompt` (.csv, .tsv),
    - a JSON object with a "prompt" a line (.jsonl, as GenEval's metadata),
    - COCO's captions, the first one of every image, or a JSON list of texts or of objects with a
      "prompt" (.json).

    JSON and a table with tabs may have any other ending too. Lines end at line feeds
    only. For models that take images, a prompt is the path of one, and an image file is
    its own prompt.

    Args:
        file: A path, or the name of a shipped file.

    Returns:
        At least one prompt.

    Raises:
        ValueError: If there is no prompt, the text is not UTF-8, or a table has no such
            column; the message names the file and the line.
    """
    path = find_asset(file, "prompts")
    ending = path.suffix.casefold()
    if ending in ENDINGS:
        return [str(path)]

    # Text.
    limit = CAPTIONS if ending == ".json" else LIMIT
    text = read_text(path, "prompts", limit).replace("\r\n", "\n")
    if "\0" in text:
        raise ValueError(f"prompts {path} has null characters, as UTF-16 has; save it as UTF-8")

    # Prompts.
    prompts = list(filter(None, map(str.strip, _parse(path, ending, text))))
    if not prompts:
        raise ValueError(f"prompts {path} has 0 prompts; {REMEDY}")
    for prompt in prompts:
        if CONTROL.search(prompt):
            raise ValueError(
                f"prompts {path} has control characters in {shown(prompt)}; take them out, "
                "and end lines by line feeds"
            )
    return prompts


def _parse(path: Path, ending: str, text: str) -> list[str]:
    """Return the prompts in a text, by the ending of its file and its first characters."""
    # Tables by name.
    if ending in DELIMITERS:
        return _table(path, text, DELIMITERS[ending])

    # JSON.
    start = text.lstrip()
    if ending in (".jsonl", ".ndjson") and not start.startswith("["):
        return _metadata(path, text)
    if ending.startswith((".json", ".ndjson")) or start.startswith(JSON_STARTS):
        return _metadata(path, text) if LINES_OF_JSON.match(text) else _json(path, text)

    # Tables with tabs, or a prompt a line.
    head = text.partition("\n")[0]
    if "\t" in head and _column(head.split("\t")) is not None:
        return _table(path, text, "\t")
    return text.split("\n")


# --------------------------------------------------------------------------------------------------
# JSON
# --------------------------------------------------------------------------------------------------


class PromptRecord(Record):
    """A line of a .jsonl file."""

    prompt: str


class CaptionsRecord(Record):
    """COCO's captions_*.json, with several captions of each image."""

    class Annotation(Record):
        """A caption of an image."""

        image_id: int | str
        caption: str

    annotations: Annotated[list[Annotation], FailFast()]


LIST = TypeAdapter(Annotated[list[str], FailFast()])
RECORDS = TypeAdapter(Annotated[list[PromptRecord], FailFast()])


def _metadata(path: Path, text: str) -> list[str]:
    """Return the prompts of a text with a JSON object a line."""
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            name = f"prompts {path}, line {number}"
            prompts.append(parse_record(line, PromptRecord, name, REMEDY).prompt)
    return prompts


def _json(path: Path, text: str) -> list[str]:
    """Return the prompts of a JSON text: a list of texts or objects, or COCO's captions."""
    name = f"prompts {path}"
    start = "".join(text.split(maxsplit=2)[:2])
    if start.startswith("[{"):
        return [record.prompt for record in parse_record(text, RECORDS, name, REMEDY)]
    if start.startswith("["):
        return parse_record(text, LIST, name, REMEDY)

    # The first caption of each image.
    captions: dict[int | str, str] = {}
    for annotation in parse_record(text, CaptionsRecord, name, REMEDY).annotations:
        captions.setdefault(annotation.image_id, annotation.caption)
    return list(captions.values())


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def _table(path: Path, text: str, delimiters: str) -> list[str]:
    """Return the column of prompts.

    Args:
        path: The file.
        text: Its text.
        delimiters: Delimiters that the table may have, the likely one first.
    """
    # The delimiter with which the first line names the column.
    delimiter = delimiters[0]
    head = text.partition("\n")[0]
    for candidate in delimiters:
        if _column(_cells(head, candidate)) is not None:
            delimiter = candidate
            break

    # Rows; a file of tabs whose quotes are no CSV is read as it stands.
    try:
        rows = _rows(text, delimiter, csv.QUOTE_MINIMAL)
    except csv.Error as error:
        if delimiter != "\t":
            raise ValueError(f"prompts {path} is no table: {error}; {REMEDY}") from None
        rows = _rows(text, delimiter, csv.QUOTE_NONE)
    header = rows[0][1] if rows else []

    # The column.
    column = _column(header)
    if column is None:
        raise ValueError(
            f"prompts {path} has no column {' or '.join(COLUMNS)} in its first line, but "
            f"{shown(header)}; name the column of the prompts so, or give a text file (.txt) "
            "with one prompt a line"
        )
    names = _lower(header)
    count = names.count(names[column])
    if count > 1:
        raise ValueError(
            f"prompts {path} has {count} columns {names[column]} in its first line; "
            "rename those that are not to be read"
        )

    # Its cells.
    prompts = []
    for number, cells in rows[1:]:
        if len(cells) != len(header):
            raise ValueError(
                f"prompts {path}, line {number} has {len(cells)} fields and the first line "
                f"{len(header)}; put texts with {delimiter!r} or line ends in them in quotes"
            )
        prompts.append(cells[column])
    return prompts


def _rows(text: str, delimiter: str, quoting: Literal[0, 3]) -> list[tuple[int, list[str]]]:
    """Return the number of the last line of every row, and its cells, without empty lines."""
    lines = (f"{line}\n" for line in text.split("\n"))
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    rows = []
    for cells in reader:
        if any(map(str.strip, cells)):
            rows.append((reader.line_num, cells))
    return rows


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader(io.StringIO(line), delimiter=delimiter), [])


def _lower(header: list[str]) -> list[str]:
    return [name.strip().casefold() for name in header]


def _column(header: list[str]) -> int | None:
    """Return the number of the column of prompts; None if there is none."""
    names = _lower(header)
    for column in COLUMNS:
        if column in names:
            return names.index(column)
    return None
