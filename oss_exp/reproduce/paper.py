"""The paper's numbers and claims: `paper.json` of a table or figure (experiments/paper.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oss_exp.files import read_json


@dataclass(frozen=True)
class Claim:
    """better, than: keys of the rows that it orders; both None where it orders none."""

    text: str
    better: dict[str, Any] | None
    than: dict[str, Any] | None
    gain: float | None
    doubt: str | None


@dataclass(frozen=True)
class Paper:
    """rows: each with all that holds of it, the table's setting included."""

    name: str
    title: str
    metric: dict[str, Any] | None
    rows: tuple[dict[str, Any], ...]
    claims: tuple[Claim, ...]
    doubts: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path) -> Paper:
        """ValueError where <folder>/paper.json is missing or not of the form."""
        found = read_json(folder / "paper.json", "the paper's numbers")
        try:
            return cls(
                name=found["id"],
                title=found["title"],
                metric=found["metric"],
                rows=tuple({**found["setting"], **row} for row in found["rows"]),
                claims=tuple(Claim(**{key: each[key] for key in Claim.__annotations__}) for each in found["claims"]),
                doubts=tuple(found["doubts"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / 'paper.json'} is not of the form of experiments/paper.md: {error!r}") from None

    def ordered(self, claim: Claim) -> tuple[int, list[int]]:
        """Numbers of the row that is better by the claim, and of those that it beats."""
        picked = [
            [i for i, row in enumerate(self.rows) if keys.items() <= row.items()] for keys in (claim.better, claim.than)
        ]
        ((better,), others) = picked
        return better, [i for i in others if i != better]
