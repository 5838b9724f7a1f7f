"""The paper's numbers and claims, which are shipped with the program (assets/paper/README.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oss_exp.files import ASSETS, read_json


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
    def load(cls, name: str) -> Paper:
        """Return what the paper says in a table or figure, such as table_2."""
        content = read_json(ASSETS / "paper" / f"{name}.json", "the paper's numbers")
        return cls(
            name=content["id"],
            title=content["title"],
            metric=content["metric"],
            rows=tuple({**content["setting"], **row} for row in content["rows"]),
            claims=tuple(Claim(**{key: each[key] for key in Claim.__annotations__}) for each in content["claims"]),
            doubts=tuple(content["doubts"]),
        )

    def ordered(self, claim: Claim) -> tuple[int, list[int]]:
        """Numbers of the row that is better by the claim, and of those that it beats."""
        picked = [
            [i for i, row in enumerate(self.rows) if keys.items() <= row.items()] for keys in (claim.better, claim.than)
        ]
        ((better,), others) = picked
        return better, [i for i in others if i != better]
