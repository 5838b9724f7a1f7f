"""The paper's numbers and claims, which are shipped with the program (assets/paper/README.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from oss_exp.files import ASSETS, Record, load_record


@dataclass(frozen=True)
class Claim:
    """better, than: keys of the rows that it orders; both None where it orders none."""

    text: str
    better: dict[str, Any] | None
    than: dict[str, Any] | None
    gain: float | None
    doubt: str | None


class PaperRecord(Record):
    """assets/paper/*.json. setting: what holds of all rows; a row may replace it."""

    id: str
    title: str
    metric: dict[str, JsonValue] | None
    setting: dict[str, JsonValue]
    doubts: list[str]
    rows: list[dict[str, JsonValue]]
    claims: list[Claim]


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
        record = load_record(
            ASSETS / "paper" / f"{name}.json",
            PaperRecord,
            "the paper's numbers",
            "restore the file",
        )
        return cls(
            name=record.id,
            title=record.title,
            metric=record.metric,
            rows=tuple({**record.setting, **row} for row in record.rows),
            claims=tuple(record.claims),
            doubts=tuple(record.doubts),
        )

    def ordered(self, claim: Claim) -> tuple[int, list[int]]:
        """Numbers of the row that is better by the claim, and of those that it beats."""
        picked = [
            [i for i, row in enumerate(self.rows) if keys.items() <= row.items()]
            for keys in (claim.better, claim.than)
        ]
        ((better,), others) = picked
        return better, [i for i in others if i != better]
