"""What we have written down of the paper (assets/paper) has one form, and agrees with itself."""

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
TEXT, NUMBER = str | None, int | float | None
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
} | dict.fromkeys(("doubts", "rows", "claims"), list)
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
CONF = {
    "strategy": "stepsize",
    **{name: name for name in ("model", "noise_schedule", "solver", "distance")},
}


def paper(name: str) -> dict:
    return json.loads((ASSETS / "paper" / f"{name}.json").read_text())


def require(found: dict, kinds: dict, more: dict | None = None) -> None:
    """All keys of `kinds`, none beyond those of `more`, each of its type."""
    allowed = kinds | (more or {})
    assert kinds.keys() <= found.keys() <= allowed.keys(), found
    for key, value in found.items():
        assert isinstance(value, allowed[key]), (key, value)
        assert value != "", (key, found)


def key_of(row: dict) -> dict:
    """What tells a row from the others."""
    return {
        key: value
        for key, value in row.items()
        if key not in ("label", "value", "as_printed", "doubt")
    }


def picked(found: dict, keys: dict) -> list[dict]:
    return [row for row in found["rows"] if keys.items() <= (found["setting"] | row).items()]


def digits(number: str) -> str:
    return re.sub(r"\D", "", number).strip("0")


def test_every_table_and_figure_has_its_file_and_a_readme():
    assert {path.stem for path in (ASSETS / "paper").glob("*.json")} == set(IDS)
    assert [name for name in IDS if not (ROOT / "experiments" / name / "README.md").is_file()] == []


@pytest.mark.parametrize("name", IDS)
def test_form(name):
    found = paper(name)
    require(found, PAPER)
    assert found["id"] == name
    assert found["source"].startswith(f"arXiv 2503.21774, {name.replace('_', ' ')}")
    require(found["setting"], SETTING)
    assert all(isinstance(doubt, str) for doubt in found["doubts"])
    assert bool(found["rows"]) == (name in NUMBERS)
    if found["rows"]:
        require(found["metric"], METRIC)
        assert found["metric"]["better"] in ("higher", "lower")
    for row in found["rows"]:
        require(row, ROW, SETTING | APART)
        assert row.keys() == found["rows"][0].keys()
    for claim in found["claims"]:
        require(claim, CLAIM)
        assert claim["from"] in ("abstract", "text", "table")
    keys = [json.dumps(key_of(row)) for row in found["rows"]]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", IDS)
def test_names_are_those_of_the_configuration(name):
    found = paper(name)
    for each in [found["setting"], *found["rows"]]:
        for key, group in CONF.items():
            assert (
                each.get(key) is None or (ROOT / "conf" / group / f"{each[key]}.yaml").is_file()
            ), each


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
            assert "." in printed or row["doubt"], row  # a lost decimal point is told
        assert not gain or re.fullmatch(r"\(\+\d\.\d+\)", *gain)


@pytest.mark.parametrize("name", IDS)
def test_claims_are_borne_out_by_the_printed_numbers_or_doubted(name):
    found = paper(name)
    for claim in found["claims"]:
        assert (claim["better"] is None) == (claim["than"] is None), claim
        if claim["better"] is None or not found["rows"]:
            continue
        (better,) = picked(found, claim["better"])
        others = [row for row in picked(found, claim["than"]) if row is not better]
        assert others, claim
        assert all(row["value"] is not None for row in [better, *others])
        sign = 1 if found["metric"]["better"] == "higher" else -1
        leads = [sign * (better["value"] - row["value"]) for row in others]
        assert min(leads) > 0 or claim["doubt"], claim
        if claim["gain"] is not None:
            assert leads == [pytest.approx(claim["gain"], abs=1e-6)]
            assert f"(+{claim['gain']:g})" in better["as_printed"]


def test_the_mean_gain_of_table_2_is_the_one_in_the_text():
    mean, *gains = [
        claim["gain"] for claim in paper("table_2")["claims"] if claim["gain"] is not None
    ]
    assert len(gains) == 9
    assert sum(gains) / 9 == pytest.approx(mean, abs=0.005)


def test_the_overall_scores_of_table_7_are_the_means_of_their_parts():
    found = paper("table_7")
    for strategy, num_steps in {(row["strategy"], row["num_steps"]) for row in found["rows"]}:
        rows = picked(found, {"strategy": strategy, "num_steps": num_steps})
        overall, *parts = [row["value"] for row in rows]
        assert len(parts) == 6
        assert sum(parts) / 6 == pytest.approx(overall, abs=0.001)
