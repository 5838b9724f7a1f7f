"""Describe an error of pydantic in one sentence: which field, what it must be, and what it is.

Used at the two borders, where a configuration becomes an object and where a file
becomes a record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

WIDTH = 80  # characters of a value or of a field's name in a message

# What a value must be, by pydantic's type of error.
WORDS = {
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
    """A fault of a value.

    Attributes:
        field: Dotted name, such as `times.3`; empty for the whole value.
        text: The rest of the sentence, such as `must be a number, got "abc"`.
        more: Number of other faults.
    """

    field: str
    text: str
    more: int


Location = tuple[str | int, ...]


def describe(error: ValidationError, prefix: str = "", given: Any = None) -> str:
    """Return the first fault as a sentence, such as '`times.3` must be a number, got "abc"'.

    Args:
        error: Error of pydantic.
        prefix: Dotted name of the value in which the field is.
        given: The value that was validated, as in `find_fault`.
    """
    fault = find_fault(error, given)
    name = ".".join(filter(None, (prefix, fault.field)))
    sentence = f"`{name}` {fault.text}" if name else fault.text
    if not fault.more:
        return sentence
    return f"{sentence} ({fault.more} more fault{'s' * (fault.more > 1)})"


def find_fault(error: ValidationError, given: Any = None) -> Fault:
    """Return the first fault of a value.

    For a union the type that fits furthest counts; if several fit equally far, all are
    named.

    Args:
        error: Error of pydantic.
        given: The value that was validated. It tells its fields apart from the names
            that pydantic gives to the types of a union.
    """
    errors = error.errors(include_url=False, include_input=given is None)
    if given is not None:  # pydantic would copy the whole input for every fault
        for details in errors:
            details["input"] = _at(given, details["loc"])
    faults = [_by_field(details) for details in errors]
    places = [_location(fault, given) for fault in faults]

    # Faults in the same union as the first, and the first of each of its types.
    location = faults[0]["loc"]
    depth = _common_depth(location, places[0])
    in_union = [i for i, fault in enumerate(faults) if fault["loc"][:depth] == location[:depth]]
    by_type: dict[Any, int] = {}
    for i in in_union:
        by_type.setdefault(faults[i]["loc"][depth : depth + 1], i)

    # The type that fits furthest. If a list is too long, all items up to its limit fit.
    too_long = [i for i in by_type.values() if faults[i]["type"] == "too_long"]
    candidates = [places[i] for i in too_long or by_type.values()]
    furthest = max(candidates, key=lambda place: _progress(place[depth:]))

    # Words.
    named = [faults[i] for i in by_type.values() if places[i] == furthest]
    others = set(places) - {places[i] for i in in_union}
    return Fault(_cut(".".join(map(str, furthest))), _text(named), len(others))


def _common_depth(location: Location, place: Location) -> int:
    """Return the number of leading parts that are the same in both."""
    for depth, part in enumerate(location):
        if place[depth : depth + 1] != (part,):
            return depth
    return len(location)


def shown(value: Any) -> str:
    """Return a value as JSON of at most WIDTH characters; of a collection the first entries."""
    if isinstance(value, Mapping):
        items = list(value.items())[:4]
        entries = [f"{_scalar(key)}: {_scalar(entry)}" for key, entry in items]
        return _cut("{" + ", ".join(entries + ["..."] * (len(value) > 4)) + "}")
    if isinstance(value, list | tuple):
        entries = [_scalar(entry) for entry in value[:8]]
        return _cut("[" + ", ".join(entries + ["..."] * (len(value) > 8)) + "]")
    return _cut(_scalar(value))


def _scalar(value: Any) -> str:
    """Return a value as JSON, with the content of a collection left out."""
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
    """Return the fault with the discriminator of a union, if that is wrong, as its field."""
    if fault["type"] not in ("union_tag_invalid", "union_tag_not_found"):
        return fault
    context = fault.get("ctx", {})
    field = (*fault["loc"], context["discriminator"].strip("'"))
    if "tag" not in context:
        return {**fault, "loc": field, "type": "missing"}
    tags = {"expected": f"one of {context['expected_tags']}"}
    return {**fault, "loc": field, "type": "literal_error", "ctx": tags, "input": context["tag"]}


def _location(fault: ErrorDetails, given: Any) -> Location:
    """Return the field of a fault, without the names that pydantic gives to types of a union."""
    location = fault["loc"]
    if given is None or not location:
        return location
    *outer, last = location
    value = given
    fields: list[str | int] = []
    for part in outer:
        if _has(value, part):
            fields.append(part)
            value = value[part]
    if fault["type"] in ABSENT or _has(value, last):
        fields.append(last)
    return tuple(fields)


def _at(given: Any, location: Location) -> Any:
    """Return the value at a location, which may contain names of a union's types."""
    value = given
    for part in location:
        if _has(value, part):
            with suppress(IndexError):
                value = value[part]
    return value


def _progress(place: Location) -> list[int]:
    """Return a sort key that grows with the depth and the index of a place."""
    return [part if isinstance(part, int) else 0 for part in place]


def _has(value: Any, part: str | int) -> bool:
    """Return whether a value has a field, or is a list and the part an index."""
    if isinstance(value, Mapping):
        return part in value
    return isinstance(value, list | tuple) and isinstance(part, int)


def _text(faults: list[ErrorDetails]) -> str:
    """Return the words for the faults at one place, one for each type of a union."""
    kind = faults[0]["type"]
    if kind in ABSENT:
        return "is missing"
    if kind in UNKNOWN:
        return "is unknown"
    if kind == "value_error":  # from our own validators, whose message is complete
        return str(faults[0].get("ctx", {})["error"])
    requirements = dict.fromkeys(map(_requirement, faults))
    return f"must be {' or '.join(requirements)}, got {shown(faults[0]['input'])}"


def _requirement(fault: ErrorDetails) -> str:
    """Return what the value must be."""
    words = WORDS.get(fault["type"])
    if words is None:
        return fault["msg"].removeprefix("Input should be ")
    return words.format_map(fault.get("ctx", {}))
