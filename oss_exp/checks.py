"""Ranges and choices of parameters, refused in one form. Their types are checked where a configuration is read."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from oss_exp.escaping import OBEYED

LONGEST = 200  # bytes of a name: with an ending it is still a file's name


@dataclass(frozen=True)
class SettingsOf:
    """Annotates a mapping whose entries are arguments of a class: `Annotated[Mapping[str, Any], SettingsOf(VAE)]`."""

    kind: type


def require_range(
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    **values: float | None,
) -> None:
    """ValueError for the first value, called by its name, that is outside of the bounds, nan or infinite.

    None stands for a parameter that is not set, and passes.
    """
    for name, value in values.items():
        if value is None or (
            math.isfinite(value)
            and (above is None or value > above)
            and (at_least is None or value >= at_least)
            and (below is None or value < below)
            and (at_most is None or value <= at_most)
        ):
            continue
        limits = {"above": above, "at least": at_least, "below": below, "at most": at_most}
        words = [f"{word} {limit:g}" for word, limit in limits.items() if limit is not None]
        if at_least is not None and at_most is not None:
            words = [f"from {at_least:g} to {at_most:g}"]
        elif len(words) == 1 and not math.isfinite(value):
            words.append("finite")
        raise ValueError(f"{name} must be {' and '.join(words)}, got {value!r}")


def require_choice(choices: Collection[object], **values: object) -> None:
    """ValueError for the first value, called by its name, that is none of the choices."""
    for name, value in values.items():
        if (type(value), value) not in [
            (type(choice), choice) for choice in choices
        ]:  # true is no 1
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def require_name(**values: str) -> None:
    """ValueError for the first value, called by its name, that cannot be a part of the names of files and columns."""
    for name, value in values.items():
        if fault := _fault(value):
            raise ValueError(f"{name} must be a name {fault}, got {value!r:.80}")


def _fault(name: str) -> str:
    """What a name should be and is not; empty where it is all of it."""
    if not name.strip():
        return "of at least one character"
    if "/" in name or "\\" in name or ".." in name:
        return "without / and \\ and .."
    if OBEYED.search(name) or "\n" in name or "\t" in name:
        return "without control characters"
    return f"of at most {LONGEST} bytes" if len(name.encode()) > LONGEST else ""


def _as_name(value: str) -> str:
    if fault := _fault(value):
        raise ValueError(f"must be a name {fault}, got {value!r:.80}")
    return value


Name = Annotated[str, AfterValidator(_as_name)]
"""A name in a file, of a strategy, a model or a label: one that may become a part of the names of other files."""
