"""What pydantic finds wrong, in one sentence: which field, what it should be, and what was given.

Used at the two borders, where a configuration becomes an object and where a file becomes a record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

WIDTH = 80  # characters of a value or of a field's name in a message

WORDS = {  # by pydantic's type of error: what the value must be
    "bool_type": "true or false",
    "callable_type": "a function",
    "dataclass_type": "an object",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "int_type": "a whole number",
    "is_instance_of": "of class {class}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "mapping_type": "an object",
    "model_type": "an object",
    "none_required": "null",
    "path_type": "a path",
    "string_pattern_mismatch": "text of the form {pattern}",
    "string_sub_type": "text",
    "string_too_long": "text of at most {max_length} characters",
    "string_too_short": "text of at least {min_length} characters",
    "string_type": "text",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}


ABSENT = (
    "missing",
    "missing_argument",
    "missing_keyword_only_argument",
    "missing_positional_only_argument",
)
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


class Fault(NamedTuple):
    """field: such as times.3, empty for the whole. text: such as `must be a number, got "abc"`. more: other faults."""

    field: str
    text: str
    more: int


def describe(error: ValidationError, prefix: str = "", given: Any = None) -> str:
    """Return '`prefix.times.3` must be a number, got "abc"'; prefix and given as in `find_fault`."""
    field, text, more = find_fault(error, given)
    name = ".".join(part for part in (prefix, field) if part)
    others = f" ({more} more fault{'s' * (more > 1)})" if more else ""
    return (f"`{name}` {text}" if name else text) + others


def find_fault(error: ValidationError, given: Any = None) -> Fault:
    """Return the first fault. given: what was validated, to tell its fields from pydantic's names of a union's types.

    Of a union the type that fits furthest counts; several that fit as far are all named.
    """
    found = error.errors(include_url=False, include_input=given is None)
    if given is not None:  # else pydantic would copy what it looked at for every fault
        for each in found:
            each["input"] = _at(given, each["loc"])
    details = [_by_field(each) for each in found]
    places = [_location(each, given) for each in details]

    # Of a union, the first fault that each of its types finds.
    location, first = details[0]["loc"], places[0]
    depth = next(
        (i for i, part in enumerate(location) if first[i : i + 1] != (part,)), len(location)
    )
    inside = [i for i, each in enumerate(details) if each["loc"][:depth] == location[:depth]]
    by_type: dict[Any, int] = {}
    for i in inside:
        by_type.setdefault(details[i]["loc"][depth : depth + 1], i)

    # Of a list that is too long, all items up to there fit.
    long = [i for i in by_type.values() if details[i]["type"] == "too_long"]
    furthest = max(
        (places[i] for i in long or by_type.values()), key=lambda place: _progress(place[depth:])
    )
    faults = [details[i] for i in by_type.values() if places[i] == furthest]
    others = set(places) - {places[i] for i in inside}
    return Fault(_cut(".".join(map(str, furthest))), _text(faults), len(others))


def shown(value: Any) -> str:
    """A value as JSON has it, at most WIDTH characters; lists and objects show their first entries."""
    if isinstance(value, Mapping):
        entries = [f"{_scalar(key)}: {_scalar(each)}" for key, each in list(value.items())[:4]]
        return _cut("{" + ", ".join(entries + ["..."] * (len(value) > 4)) + "}")
    if isinstance(value, list | tuple):
        entries = [_scalar(each) for each in value[:8]]
        return _cut("[" + ", ".join(entries + ["..."] * (len(value) > 8)) + "]")
    return _cut(_scalar(value))


def _scalar(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{...}" if value else "{}"
    if isinstance(value, list | tuple):
        return "[...]" if value else "[]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        text = value if len(value) <= WIDTH else f"{value[:WIDTH]}..."
        return json.dumps(text, ensure_ascii=False).encode(errors="backslashreplace").decode()
    if isinstance(value, int) and abs(value) >= 10**WIDTH:
        return f"a number of over {WIDTH} digits"
    return repr(value)


def _cut(text: str) -> str:
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def _by_field(fault: ErrorDetails) -> ErrorDetails:
    """A fault of the field that tells the types of a union apart is that field's."""
    if fault["type"] not in ("union_tag_invalid", "union_tag_not_found"):
        return fault
    context = fault.get("ctx", {})
    field = (*fault["loc"], context["discriminator"].strip("'"))
    if "tag" not in context:
        return {**fault, "loc": field, "type": "missing"}
    tags = {"expected": f"one of {context['expected_tags']}"}
    return {**fault, "loc": field, "type": "literal_error", "ctx": tags, "input": context["tag"]}


def _location(fault: ErrorDetails, given: Any) -> tuple[str | int, ...]:
    """The fields of a fault, without the names that pydantic gives to the types of a union."""
    location = fault["loc"]
    if given is None or not location:
        return location
    *outer, last = location
    fields: list[str | int] = []
    for part in outer:
        if _has(given, part):
            fields.append(part)
            given = given[part]
    if fault["type"] in ABSENT or _has(given, last):
        fields.append(last)
    return tuple(fields)


def _at(given: Any, location: tuple[str | int, ...]) -> Any:
    """What lies at a location, in which there may be names of a union's types."""
    for part in location:
        if _has(given, part):
            with suppress(IndexError):
                given = given[part]
    return given


def _progress(place: tuple[str | int, ...]) -> list[int]:
    """Orders places by how far into the value they are."""
    return [part if isinstance(part, int) else 0 for part in place]


def _has(given: Any, part: str | int) -> bool:
    return (
        part in given
        if isinstance(given, Mapping)
        else isinstance(given, list | tuple) and isinstance(part, int)
    )


def _text(faults: list[ErrorDetails]) -> str:
    """What is wrong at one place, where each type of a union may find a fault of its own."""
    kind, value = faults[0]["type"], faults[0]["input"]
    if kind in ABSENT:
        return "is missing"
    if kind in UNKNOWN:
        return "is unknown"
    if kind == "value_error":  # of our own validators, which say all
        return str(faults[0].get("ctx", {})["error"])
    wanted = dict.fromkeys(_wanted(each) for each in faults)
    return f"must be {' or '.join(wanted)}, got {shown(value)}"


def _wanted(fault: ErrorDetails) -> str:
    words = WORDS.get(fault["type"])
    if words is None:
        return fault["msg"].removeprefix("Input should be ")
    return words.format_map(fault.get("ctx", {}))
