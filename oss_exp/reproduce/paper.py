"""The paper's numbers and claims, which are shipped with the program (assets/paper/README.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from oss_exp.files import ASSETS, Record, load_record


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        text: The claim in words.
        better: Values that pick the row which is better; None where the claim orders no
            rows.
        than: Values that pick the rows which it beats.
        gain: The gain that the paper states.
        doubt: Why the claim is in doubt.
    """

    text: str
    better: dict[str, Any] | None
    than: dict[str, Any] | None
    gain: float | None
    doubt: str | None


class PaperRecord(Record):
    """A file of assets/paper; `setting` has the values of all rows that do not replace them."""

    id: str
    title: str
    metric: dict[str, JsonValue] | None
    setting: dict[str, JsonValue]
    doubts: list[str]
    rows: list[dict[str, JsonValue]]
    claims: list[Claim]


@dataclass(frozen=True)
class Paper:
    """A table or figure of the paper.

    Attributes:
        name: Such as table_2.
        title: Its subject.
        metric: The metric's name, unit and better direction; None where there is none.
        rows: The numbers, each with its whole setting.
        claims: The paper's claims about them.
        doubts: Doubts about the numbers.
    """

    name: str
    title: str
    metric: dict[str, Any] | None
    rows: tuple[dict[str, Any], ...]
    claims: tuple[Claim, ...]
    doubts: tuple[str, ...]

    @classmethod
    def load(cls, name: str) -> Paper:
        """Read a table or figure, such as table_2."""
        file = ASSETS / "paper" / f"{name}.json"
        record = load_record(file, PaperRecord, "the paper's numbers", "restore the file")
        return cls(
            name=record.id,
            title=record.title,
            metric=record.metric,
            rows=tuple({**record.setting, **row} for row in record.rows),
            claims=tuple(record.claims),
            doubts=tuple(record.doubts),
        )

    def ordered(self, claim: Claim) -> tuple[int, list[int]]:
        """Return the number of the row that a claim calls better, and of those that it beats."""
        (better,) = self._matching(claim.better)
        others = [i for i in self._matching(claim.than) if i != better]
        return better, others

    def _matching(self, values: dict[str, Any] | None) -> list[int]:
        """Return the numbers of the rows with these values."""
        assert values is not None, "a claim that orders rows names both sides"
        return [i for i, row in enumerate(self.rows) if values.items() <= row.items()]
