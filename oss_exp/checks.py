"""Checks of the range of a parameter, with error messages of one form.

Types are not checked here but where a configuration is read.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from oss_exp.escaping import OBEYED

LONGEST = 200  # bytes of a name, so that it is a valid file name with any ending


@dataclass(frozen=True)
class SettingsOf:
    """An annotation of a mapping whose entries are arguments of a class.

    For example `Annotated[Mapping[str, Any], SettingsOf(VAE)]`.
    """

    kind: type


def require_range(
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    **values: float | None,
) -> None:
    """Raise ValueError for the first value that is out of bounds, nan or infinite.

    None, a parameter that is not set, passes.

    Args:
        above: Exclusive lower bound.
        at_least: Inclusive lower bound.
        below: Exclusive upper bound.
        at_most: Inclusive upper bound.
        **values: The values by name; the name is quoted in the message.
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

        # Words for the bounds.
        limits = {"above": above, "at least": at_least, "below": below, "at most": at_most}
        words = [f"{word} {limit:g}" for word, limit in limits.items() if limit is not None]
        if at_least is not None and at_most is not None:
            words = [f"from {at_least:g} to {at_most:g}"]
        elif len(words) == 1 and not math.isfinite(value):
            words.append("finite")

        raise ValueError(f"{name} must be {' and '.join(words)}, got {value!r}")


def require_choice(choices: Collection[object], **values: object) -> None:
    """Raise ValueError for the first of the named values that is not one of the choices."""
    typed_choices = [(type(choice), choice) for choice in choices]  # True is not 1
    for name, value in values.items():
        if (type(value), value) not in typed_choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def require_name(**values: str) -> None:
    """Raise ValueError for the first of the named values that cannot be part of a file's name."""
    for name, value in values.items():
        if fault := _fault(value):
            raise ValueError(f"{name} must be a name {fault}, got {value!r:.80}")


def _fault(name: str) -> str:
    """Return the requirement that a name does not meet; empty for a valid name."""
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
"""A name of a strategy, a model or a label, which may become part of a file's name."""
