"""The records of the paper (assets/paper) have one form, and agree with each other."""

import json
import re
from pathlib import Path

import pytest

from oss_exp.files import ASSETS

ROOT = Path(__file__).parents[2]
NUMBERS = [
    "table_1",
    "table_2",
    "table_3",
    "table_4",
    "table_5",
    "table_6",
    "table_7",
    "figure_7",
    "figure_8",
]
IDS = [*NUMBERS, "figure_1", "figure_4", "figure_5", "figure_6", "figure_10"]
TEXT = str | None
NUMBER = int | float | None
SETTING = {
    "model": TEXT,
    "dataset": TEXT,
    "noise_schedule": TEXT,
    "num_teacher_steps": int | None,
    "solver": TEXT,
    "guidance": NUMBER,
    "search_samples": int | None,
    "n": int | None,
}
PAPER = {
    "id": str,
    "title": str,
    "source": str,
    "metric": dict | None,
    "setting": dict,
    "doubts": list,
    "rows": list,
    "claims": list,
}
METRIC = {"name": str, "unit": TEXT, "better": str, "doubt": TEXT}
ROW = {
    "label": str,
    "strategy": TEXT,
    "num_steps": int | None,
    "value": NUMBER,
    "as_printed": str,
    "doubt": TEXT,
}
APART = {
    "search_teacher_steps": int | None,
    "distance": str,
    "calibrated": bool,
    "trained": bool,
    "part": str,
}
CLAIM = {
    "text": str,
    "from": str,
    "better": dict | None,
    "than": dict | None,
    "gain": NUMBER,
    "doubt": TEXT,
}
GROUPS = {
    "strategy": "stepsize",
    "model": "model",
    "noise_schedule": "noise_schedule",
    "solver": "solver",
    "distance": "distance",
}


def paper(name: str) -> dict:
    """Return the record of a table or a figure."""
    return json.loads((ASSETS / "paper" / f"{name}.json").read_text())


def require(record: dict, kinds: dict, more: dict | None = None) -> None:
    """Check that a record has all keys of `kinds`, perhaps those of `more`, with their types."""
    allowed = kinds | (more or {})
    assert kinds.keys() <= record.keys() <= allowed.keys(), record
    for key, value in record.items():
        assert isinstance(value, allowed[key]), (key, value)
        assert value != "", (key, record)


def key_of(row: dict) -> str:
    """Return what distinguishes a row from the others."""
    values = ("label", "value", "as_printed", "doubt")
    return json.dumps({key: value for key, value in row.items() if key not in values})


def picked(record: dict, keys: dict) -> list[dict]:
    """Return the rows with these values."""
    return [row for row in record["rows"] if keys.items() <= (record["setting"] | row).items()]


def digits(number: str) -> str:
    """Return the significant digits of a printed number."""
    return re.sub(r"\D", "", number).strip("0")


def test_every_table_and_figure_has_its_file_and_a_readme():
    assert {path.stem for path in (ASSETS / "paper").glob("*.json")} == set(IDS)
    assert [name for name in IDS if not (ROOT / "experiments" / name / "README.md").is_file()] == []


@pytest.mark.parametrize("name", IDS)
def test_a_record_has_its_keys_and_types(name):
    record = paper(name)
    require(record, PAPER)
    require(record["setting"], SETTING)
    assert record["id"] == name
    assert record["source"].startswith(f"arXiv 2503.21774, {name.replace('_', ' ')}")
    assert all(isinstance(doubt, str) for doubt in record["doubts"])
    for claim in record["claims"]:
        require(claim, CLAIM)
        assert claim["from"] in ("abstract", "text", "table")


@pytest.mark.parametrize("name", IDS)
def test_the_rows_of_a_record_are_alike_and_distinct(name):
    record = paper(name)
    rows = record["rows"]
    assert bool(rows) == (name in NUMBERS)
    if rows:
        require(record["metric"], METRIC)
        assert record["metric"]["better"] in ("higher", "lower")
    for row in rows:
        require(row, ROW, SETTING | APART)
        assert row.keys() == rows[0].keys()
    assert len({key_of(row) for row in rows}) == len(rows)


@pytest.mark.parametrize("name", IDS)
def test_names_are_those_of_the_configuration(name):
    record = paper(name)
    for entry in [record["setting"], *record["rows"]]:
        for key, group in GROUPS.items():
            option = entry.get(key)
            assert option is None or (ROOT / "conf" / group / f"{option}.yaml").is_file(), entry


@pytest.mark.parametrize("name", NUMBERS)
def test_values_are_what_is_printed(name):
    marks = {"yes": 1, "no": 0, "-": None}
    for row in paper(name)["rows"]:
        printed, *gain = row["as_printed"].split()
        if printed in marks:
            assert row["value"] == marks[printed]
            assert row["value"] is not None or row["doubt"]
        else:
            assert digits(printed) == digits(str(row["value"])), row
            assert "." in printed or row["doubt"], row  # a lost decimal point is a doubt
        assert not gain or re.fullmatch(r"\(\+\d\.\d+\)", *gain)


@pytest.mark.parametrize("name", IDS)
def test_claims_hold_on_the_printed_numbers_or_are_doubted(name):
    record = paper(name)
    for claim in record["claims"]:
        assert (claim["better"] is None) == (claim["than"] is None), claim
        if claim["better"] is None or not record["rows"]:
            continue

        (better,) = picked(record, claim["better"])
        others = [row for row in picked(record, claim["than"]) if row is not better]
        assert others, claim
        assert all(row["value"] is not None for row in [better, *others])
        sign = 1 if record["metric"]["better"] == "higher" else -1
        leads = [sign * (better["value"] - row["value"]) for row in others]
        assert min(leads) > 0 or claim["doubt"], claim
        if claim["gain"] is not None:
            assert leads == [pytest.approx(claim["gain"], abs=1e-6)]
            assert f"(+{claim['gain']:g})" in better["as_printed"]


def test_the_mean_gain_of_table_2_is_the_one_in_the_text():
    gains = [claim["gain"] for claim in paper("table_2")["claims"]]
    mean, *gains = [gain for gain in gains if gain is not None]
    assert len(gains) == 9
    assert sum(gains) / 9 == pytest.approx(mean, abs=0.005)


def test_the_overall_scores_of_table_7_are_the_means_of_their_parts():
    record = paper("table_7")
    schedules = {(row["strategy"], row["num_steps"]) for row in record["rows"]}
    for strategy, num_steps in schedules:
        rows = picked(record, {"strategy": strategy, "num_steps": num_steps})
        overall, *parts = [row["value"] for row in rows]
        assert len(parts) == 6
        assert sum(parts) / 6 == pytest.approx(overall, abs=0.001)
