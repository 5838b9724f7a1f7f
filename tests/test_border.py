"""Configurations of wrong types are refused with their full keys, and never by a traceback."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Le
from omegaconf import OmegaConf

import oss_exp
from experiments.border_fuzz.run import fuzz
from oss_exp.solvers import Solver
from oss_exp.stepsize.oss.band import Band
from oss_exp.tasks import border


@dataclass(frozen=True)
class Thing:
    """A class with one parameter of each kind."""

    whole: int = 1
    share: Annotated[float, Ge(0), Le(1)] = 0.5
    flag: bool = False
    text: str = ""
    path: Path | str | None = None
    choice: Literal["a", "b", "c"] = "a"
    few: Literal[1, 2] = 1
    sizes: list[int] = field(default_factory=list)
    band: Band | None = None
    solver: Solver | None = None
    anything: Any = None

    def __post_init__(self) -> None:
        if self.whole == 13:
            raise ValueError("whole must not be 13")


def node(**values: Any) -> dict[str, Any]:
    """Return the configuration of a `Thing`."""
    return {"_target_": f"{__name__}.Thing", **values}


@pytest.fixture
def _as_ours(monkeypatch):
    """Trust the annotations of this file as those of the package."""
    border.parameters_of.cache_clear()
    monkeypatch.setattr(border, "_is_ours", lambda target: True)
    yield
    border.parameters_of.cache_clear()


WRONG = [
    ({"whole": "abc"}, "top.thing.whole must be a whole number, got 'abc'"),
    ({"whole": True}, "top.thing.whole must be a whole number, got true"),
    ({"whole": 1.5}, "top.thing.whole must be a whole number, got 1.5"),
    ({"whole": None}, "top.thing.whole must be a whole number, got null"),
    ({"share": float("nan")}, "top.thing.share must be a finite number from 0 to 1, got nan"),
    ({"share": 2}, "top.thing.share must be a finite number from 0 to 1, got 2"),
    ({"flag": 1}, "top.thing.flag must be true or false, got 1"),
    ({"text": 1}, "top.thing.text must be text, got 1"),
    ({"path": 1}, "top.thing.path must be a path, text or null, got 1"),
    ({"choice": "d"}, "top.thing.choice must be one of a, b, c, got 'd'"),
    ({"few": True}, "top.thing.few must be one of 1, 2, got true"),
    ({"sizes": [1, "x"]}, "top.thing.sizes must be a list of whole numbers, got [1, 'x']"),
    ({"sizes": 3}, "top.thing.sizes must be a list of whole numbers, got 3"),
    (
        {"band": {"stride": "x", "width": 1}},
        "top.thing.band.stride must be a whole number, got 'x'",
    ),
    (
        {"band": {"strid": 8, "width": 1}},
        "top.thing.band.strid is no option of Band; did you mean top.thing.band.stride?",
    ),
    ({"solver": 3}, "top.thing.solver must be a Solver (a mapping with _target_) or null, got 3"),
    ({"solver": {"_target_": "oss_exp.XtMSE"}}, "top.thing.solver must be a Solver"),
    ({"solver": {"_target_": "oss_exp.Eulr"}}, "got 'oss_exp.Eulr'; did you mean oss_exp.Euler?"),
    ({"solver": {"_target_": "oss_exp.DEIS", "order": "x"}}, "top.thing.solver.order must be"),
    (
        {"anything": [{"_target_": "oss_exp.DEIS", "order": "x"}]},
        "top.thing.anything.0.order must be",
    ),
    ({"chioce": "a"}, "top.thing.chioce is no option of"),
    ({"whole": 13}, "top.thing.whole must not be 13"),
    ({"solver": {"_target_": "oss_exp.DEIS", "order": 7}}, "top.thing.solver.order must be"),
    ({"whole": "???"}, "top.thing.whole is not set"),
]


@pytest.mark.usefixtures("_as_ours")
@pytest.mark.parametrize(("values", "message"), WRONG)
def test_a_wrong_value_is_named_with_its_full_key(values, message):
    with pytest.raises(ValueError) as error:
        border.build(OmegaConf.create(node(**values)), "top.thing")
    assert message in str(error.value)
    assert "Error in call to target" not in str(error.value)


@pytest.mark.usefixtures("_as_ours")
def test_all_faults_are_listed_at_once():
    with pytest.raises(ValueError) as error:
        border.check({"a": node(whole="x", flag=3), "b": {"c": [node(text=1)]}})
    keys = [line.split()[0] for line in str(error.value).splitlines()]
    assert keys == ["a.whole", "a.flag", "b.c.0.text"]


@pytest.mark.usefixtures("_as_ours")
def test_values_are_built_as_they_are_written():
    band = {"stride": 8, "width": 1}
    solver = {"_target_": "oss_exp.Euler"}
    configuration = node(share=1, path="x", sizes=[1, 2], band=band, solver=solver)

    thing = border.build(configuration, "thing", Thing, whole=7)

    assert thing == Thing(7, 1, path="x", sizes=[1, 2], band=Band(8, 1), solver=oss_exp.Euler())
    assert border.build(None, "logger", Thing | None) is None


def test_names_of_an_earlier_version_are_known():
    old = {"_target_": "oss_exp.solvers.euler.Euler"}
    assert border.build(old, "solver", Solver) == oss_exp.Euler()


def test_every_configured_name_has_types():
    for name in {**oss_exp.PUBLIC, **oss_exp.CONFIGURED}:
        border.parameters_of(getattr(oss_exp, name))


@pytest.mark.slow
def test_nonsense_is_refused_by_name_in_one_option_of_every_group(monkeypatch, tmp_path):
    """The whole fuzz is in experiments/border_fuzz."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    chosen = (
        "model/mixture_digits noise_schedule/edm solver/unipc distance/select "
        "stepsize/oss_shared data/noise trainer/cpu evaluation/fashion metric/kid "
        "exporter/diffusers detector/fashion logger/wandb task/compare task/calibrate"
    )
    outcomes = list(fuzz(chosen.split()))
    counts = Counter(outcome.kind for outcome in outcomes)

    assert [outcome for outcome in outcomes if outcome.kind == "fault"] == []
    assert counts["refused"] > 5 * counts["accepted"] > 0
