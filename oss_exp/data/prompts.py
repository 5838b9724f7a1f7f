"""Files of prompts: lists, GenEval's metadata and COCO's captions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import FailFast

from oss_exp.files import TABLE_LIMIT, Record, find_asset, load_record, load_records, read_text

REMEDY = "give a text file (.txt) with one prompt a line"


def read_prompts(file: str | Path) -> list[str]:
    """Return the prompts of a path or a shipped file, at least one.

    One a line (.txt); a JSON object with a "prompt" a line (.jsonl, as GenEval's metadata); or COCO's captions (.json),
    the first of every image.
    """
    path = find_asset(file, "prompts")
    read = {".json": _captions, ".jsonl": _metadata}.get(path.suffix, _lines)
    prompts = [prompt.strip() for prompt in read(path)]
    if not any(prompts):
        raise ValueError(f"prompts {path} has 0 prompts; {REMEDY}")
    return [prompt for prompt in prompts if prompt]


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


def _lines(path: Path) -> list[str]:
    return read_text(path, "prompts", TABLE_LIMIT).splitlines()


def _metadata(path: Path) -> list[str]:
    return [line.prompt for line in load_records(path, PromptRecord, "prompts", REMEDY, TABLE_LIMIT)]


def _captions(path: Path) -> list[str]:
    first: dict[int | str, str] = {}
    for annotation in load_record(path, CaptionsRecord, "prompts", REMEDY, TABLE_LIMIT).annotations:
        first.setdefault(annotation.image_id, annotation.caption)
    return list(first.values())
