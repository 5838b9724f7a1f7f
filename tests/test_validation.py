"""The faults that pydantic finds become one sentence."""

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from oss_exp.validation import describe, find_fault, shown


class One(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    kind: Literal["one"]
    rate: Annotated[float, Field(gt=0, le=1)]


class Two(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    kind: Literal["two"]
    pair: tuple[int, int]


class Settings(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    part: Annotated[One | Two, Field(discriminator="kind")] | None = None
    mixed: int | str | list[int] = 0
    names: dict[str, int] = {}


def described(values: dict, prefix: str = "task") -> str:
    """Return the sentence about the faults of these values."""
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(values)
    return describe(caught.value, prefix, values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"part": {"kind": "one"}}, "`task.part.rate` is missing"),
        ({"part": {"kind": "one", "rate": 2.0}}, "`task.part.rate` must be at most 1.0, got 2.0"),
        (
            {"part": {"kind": "one", "rate": 0.0}},
            "`task.part.rate` must be greater than 0.0, got 0.0",
        ),
        (
            {"part": {"kind": "three"}},
            "`task.part.kind` must be one of 'one', 'two', got \"three\"",
        ),
        ({"part": {}}, "`task.part.kind` is missing"),
        ({"part": {"kind": "two", "pair": (1,)}}, "`task.part.pair.1` is missing"),
        ({"mixed": 1.5}, "`task.mixed` must be a whole number or text or a list, got 1.5"),
        ({"mixed": [1, "a"]}, '`task.mixed.1` must be a whole number, got "a"'),
        ({"names": {"int": True}}, "`task.names.int` must be a whole number, got true"),
        ({"nmaes": 1, "names": 2}, "`task.names` must be an object, got 2 (1 more fault)"),
        ({"nmaes": {}}, "`task.nmaes` is unknown"),
        ({"n" * 10_000: {}}, f"`task.{'n' * 77}...` is unknown"),
    ],
)
def test_a_fault_names_the_field_its_rule_and_its_value(values, sentence):
    assert described(values) == sentence


def test_a_fault_of_the_whole_names_the_prefix_alone():
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate([1])
    assert describe(caught.value, "task", [1]) == "`task` must be an object, got [1]"
    assert describe(caught.value) == "must be an object, got [1]"
    assert find_fault(caught.value) == ("", "must be an object, got [1]", 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (False, "false"),
        ("\x1b[31m", '"\\u001b[31m"'),
        ("\ud800", '"\\ud800"'),
        ([1, [2], {}, {"a": 1}], "[1, [...], {}, {...}]"),
        (list(range(1000)), "[0, 1, 2, 3, 4, 5, 6, 7, ...]"),
        ({"a": {"b": 1}, "c": "d"}, '{"a": {...}, "c": "d"}'),
        (10**100, "a number of over 80 digits"),
        ("a" * 1000, '"' + "a" * 76 + "..."),
    ],
)
def test_values_are_shortened(value, text):
    assert shown(value) == text
