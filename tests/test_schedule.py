"""Step schedules refuse wrong values, survive a file, and start where they should."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from oss_exp.schedule import (
    Analytic,
    FittedSteps,
    Free,
    Pinned,
    SolverSteps,
    StepSchedule,
    analytic_jump,
    group_mean,
)
from oss_exp.schedule_file import json_schema
from oss_exp.solvers import named_solver
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def shared() -> StepSchedule:
    return StepSchedule(
        float64([0.97, 1 / 3, 0.1, 0]), Free(), provenance={"model": "é", "n": [1, 2]}
    )


def per_sample() -> StepSchedule:
    return StepSchedule(
        float64([[1, 0.7, 0], [0.9, 0.1, 0], [0.8, 1e-9, 0]]), Free(), samples=(3, 11, 5)
    )


def analytic() -> StepSchedule:
    mean = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    return StepSchedule(float64([0.9, 0.4, 0]), Analytic(mean, 0.99))


def ordered() -> StepSchedule:
    return StepSchedule(float64([0.9, 0.5, 0.1, 0]), steps=SolverSteps(torch.tensor([1, 2, 1])))


def ordered_per_sample() -> StepSchedule:
    orders = torch.tensor([[1, 2], [1, 1], [1, 2]])
    return StepSchedule(per_sample().times, Free(), SolverSteps(orders), samples=(3, 11, 5))


def fitted() -> StepSchedule:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    return StepSchedule(
        float64([1, 0.4, 0]), steps=FittedSteps(weights, torch.randn(2, 3, generator=generator))
    )


def test_a_printed_schedule_fits_on_a_line():
    assert repr(shared()) == "StepSchedule(times=[0.97, 0.3333, 0.1, 0], start=free)"
    assert repr(per_sample()) == "StepSchedule(times=shape (3, 3), start=free)"
    ordered = StepSchedule([1.0, 0.5, 0.0], steps=SolverSteps(torch.tensor([1, 2])))
    assert repr(ordered) == "StepSchedule(times=[1, 0.5, 0], start=pinned, orders=[1, 2])"
    fitted = StepSchedule([1.0, 0.0], steps=FittedSteps())
    assert repr(fitted) == "StepSchedule(times=[1, 0], start=pinned, steps=fitted)"


# --------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(StepSchedule)])
def test_no_field_can_be_set(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(shared(), name, None)


def test_changing_a_tensor_does_not_change_the_schedule_built_from_it():
    times = float64([1, 0.5, 0])
    orders = torch.tensor([1, 2])
    weights = float64([[1, 2, 3, 4], [5, 6, 7, 8]])
    schedule = StepSchedule(times)
    steps = SolverSteps(orders)
    fitted_steps = FittedSteps(weights)
    before = times.tolist(), orders.tolist(), weights.tolist()
    for tensor in (times, orders, weights):
        tensor[1] = 3

    assert (schedule.times.tolist(), steps.orders.tolist(), fitted_steps.weights.tolist()) == before


ONE = [[1.0] * 4]
TWO = [[1.0] * 4] * 2


@pytest.mark.parametrize(
    ("times", "fields", "words"),
    [
        ([], {}, "at least two times"),
        ([0.0], {}, "at least two times"),
        (1.0, {}, "at least two times"),
        ([[[1.0, 0.0]]], {}, "at least two times"),
        ([1.0, math.nan, 0.0], {}, "finite"),
        ([math.inf, 0.5, 0.0], {}, "finite"),
        ([0.0, 0.5, 1.0], {}, "strictly decrease .*; sort them in decreasing order"),
        ([1.0, 0.5, 0.5, 0.0], {}, "strictly decrease"),
        ([[1.0, 0.5, 0.0], [0.5, 0.6, 0.0]], {"samples": (0, 1)}, "strictly decrease"),
        ([1.0, 0.5, 0.1], {}, "last step time must be 0"),
        ([1.0, 0.5, -0.1], {}, "last step time must be 0"),
        ([1.5, 0.5, 0.0], {}, "must not exceed start_time=1.5"),
        ([0.95, 0.0], {"start": Free(0.9)}, "must not exceed start_time=0.9"),
        ([0.5, 0.0], {"start": Free(1.1)}, "start_time=1.1"),
        ([0.5, 0.0], {"start": Free(math.nan)}, "start_time=nan"),
        ([0.5, 0.0], {"start": Analytic(torch.zeros(1, 2), math.nan)}, "start_time=nan"),
        ([[1.0, 0.0], [0.9, 0.0]], {}, "indices of their samples"),
        ([1.0, 0.0], {"samples": (0,)}, "indices of their samples"),
        (
            [[1.0, 0.0], [0.9, 0.0]],
            {"start": Free(), "samples": (0, 1, 2)},
            "indices of their samples",
        ),
        ([[1.0, 0.0], [0.9, 0.0]], {"start": Free(), "samples": ()}, "indices of their samples"),
        ([[1.0, 0.0], [0.9, 0.0]], {"samples": (0, 1)}, "start pinned have one first time"),
        ([1.0, 0.5, 0.0], {"steps": SolverSteps([1])}, "2 steps need an order each"),
        ([1.0, 0.5, 0.0], {"steps": SolverSteps([1, 2, 1])}, "2 steps need an order each"),
        ([1.0, 0.5, 0.0], {"steps": SolverSteps([[1, 2]])}, "2 steps need an order each"),
        (
            [[1.0, 0.5, 0.0]],
            {"samples": (0,), "steps": SolverSteps([1, 2])},
            "2 steps need an order each",
        ),
        ([1.0, 0.5, 0.0], {"steps": FittedSteps(ONE)}, "1 fitted steps are for 2 times"),
        (
            [[1.0, 0.5, 0.0]],
            {"samples": (0,), "steps": FittedSteps(TWO)},
            "2 fitted steps are for 3 times of all",
        ),
        (
            [0.9, 0.5, 0.0],
            {"start": Analytic(), "steps": FittedSteps(TWO, torch.ones(1))},
            "need the same mean",
        ),
    ],
)
def test_the_constructor_refuses_wrong_fields(times, fields, words):
    with pytest.raises(ValueError, match=words):
        StepSchedule(float64(times), **fields)


@pytest.mark.parametrize(
    ("orders", "words"),
    [
        ([1.0, 2.0], "whole orders of at least 1"),
        ([1, 0], "whole orders of at least 1"),
        (1, "whole orders of at least 1"),
        ([2, 1], "cannot exceed the calls made so far"),
        ([1, 3], "cannot exceed the calls made so far"),
        ([[1, 3]], "cannot exceed the calls made so far"),
    ],
)
def test_impossible_orders_are_refused(orders, words):
    with pytest.raises(ValueError, match=words):
        SolverSteps(orders)


@pytest.mark.parametrize("weights", [[1.0] * 4, [[1.0] * 3] * 2, [[1.0, 1.0, 1.0, math.nan]]])
def test_weights_of_another_shape_or_not_finite_are_refused(weights):
    with pytest.raises(ValueError, match="a row of at least 4 finite weights"):
        FittedSteps(weights)


def test_rows_selects_samples_by_index_in_the_given_order():
    schedule = per_sample()
    cut = schedule.rows([5, 3])
    assert cut.samples == (5, 3)
    assert cut.times.tolist() == [schedule.times[2].tolist(), schedule.times[0].tolist()]
    assert cut.start == Free()
    assert ordered_per_sample().rows([5, 11]).orders.tolist() == [[1, 2], [1, 1]]


# --------------------------------------------------------------------------------------------------
# The first state
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [Free(), Pinned()])
def test_without_a_mean_the_noise_is_the_first_state(start):
    noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(StepSchedule(float64([0.8, 0]), start=start).initial_state(noise), noise)


def test_an_analytic_start_is_the_exact_euler_jump_from_pure_noise(gmm, velocity):
    z = gmm["z"]
    t = 0.93
    mean = (gmm["weights"][:, None] * gmm["means"]).sum(0, keepdim=True)
    jumped = StepSchedule(float64([t, 0.5, 0]), start=Analytic(mean)).initial_state(z)
    expected = z + (t - 1) * velocity(z, torch.ones(len(z), dtype=torch.float64))
    torch.testing.assert_close(jumped, expected, rtol=0, atol=1e-12)


def test_an_analytic_start_uses_each_samples_own_condition_and_time(gmm, mixture):
    z = gmm["z"]
    label = torch.arange(16) % 10
    first = torch.linspace(0.9, 0.99, 16, dtype=torch.float64)
    times = torch.stack([first, torch.zeros(16, dtype=torch.float64)], dim=1)
    schedule = StepSchedule(times, start=Analytic(gmm["means"]), samples=tuple(range(16)))
    v = mixture.velocity(label)(z, torch.ones(16, dtype=torch.float64))
    expected = z + (first[:, None] - 1) * v

    torch.testing.assert_close(schedule.initial_state(z, label), expected, rtol=0, atol=1e-12)


def test_a_mean_without_event_dims_is_the_same_everywhere():
    noise = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    group = torch.tensor([1, 0, 1])
    assert group_mean(torch.tensor([2.0, 7.0]), noise, group)[:, 0, 0].tolist() == [7.0, 2.0, 7.0]
    assert torch.equal(StepSchedule([0.5, 0.0], Analytic()).initial_state(noise), 0.5 * noise)


def test_an_analytic_jump_from_below_1_is_euler_with_the_mean_as_clean_prediction():
    generator = torch.Generator().manual_seed(0)
    noise, mean = torch.randn(2, 3, 1, 4, 2, dtype=torch.float64, generator=generator)
    start_time, t = 0.9, 0.6
    v = (noise - mean) / start_time  # x0 = x - t v
    jumped = analytic_jump(noise, mean, start_time, float64(t))
    torch.testing.assert_close(jumped, noise + (t - start_time) * v, rtol=0, atol=1e-14)


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [shared, per_sample, analytic, ordered, ordered_per_sample, fitted]
)
def test_a_file_gives_back_the_same_schedule_bit_for_bit(make, tmp_path):
    schedule = make()
    loaded = StepSchedule.load(schedule.save(tmp_path / "new folder" / "oss.K5.json"))
    assert torch.equal(loaded.times, schedule.times)
    assert loaded.times.dtype == torch.float64
    for name in ("kind", "start_time", "samples", "provenance", "num_steps"):
        assert getattr(loaded, name) == getattr(schedule, name)

    for name in ("mean", "orders"):
        assert_equal(getattr(loaded, name), getattr(schedule, name))
    weights = [getattr(steps.steps, "weights", None) for steps in (loaded, schedule)]
    assert_equal(*weights)


def assert_equal(value: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    """Assert that two tensors are equal with their types, or both None."""
    assert (value is None) == (expected is None)
    if expected is not None:
        assert torch.equal(value, expected)
        assert value.dtype == expected.dtype


def edit(**changes):
    """Return a function that rewrites a record with these fields; ... removes one."""

    def change(path):
        record = json.loads(path.read_text()) | changes
        record = {key: value for key, value in record.items() if value is not ...}
        path.write_text(json.dumps(record))

    return change


MEAN = {"file": "x.safetensors", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda path: path.unlink(), FileNotFoundError, "does not exist"),
        (lambda path: path.write_text(""), ValueError, "is empty"),
        (lambda path: path.write_text(path.read_text()[:60]), ValueError, "not complete JSON"),
        (lambda path: path.write_text("0.9, 0.5, 0"), ValueError, "not complete JSON"),
        (lambda path: path.write_bytes(b"\x89PNG\xff"), ValueError, "not complete JSON"),
        (
            lambda path: path.write_text('{"sigmas": [1, 0]}'),
            ValueError,
            "`version` is missing|must be an object",
        ),
        (
            lambda path: path.write_text("[1, 0.5, 0]"),
            ValueError,
            "`version` is missing|must be an object",
        ),
        (edit(version=1), ValueError, "another version: `version` must be one of 2, 3, got"),
        (edit(version=...), ValueError, "`version` is missing"),
        (edit(times=...), ValueError, "times"),
        (edit(start=...), ValueError, "start"),
        (edit(samples=...), ValueError, "samples"),
        (edit(provenance=...), ValueError, "provenance"),
        (edit(times=[0, 0.5, 1]), ValueError, "strictly decrease"),
        (edit(times=[1, math.nan, 0]), ValueError, "times"),
        (edit(times=[[1, 0.5, 0], [1, 0]]), ValueError, "length"),
        (edit(times="1, 0"), ValueError, "times"),
        (edit(times=None), ValueError, "times"),
        (edit(start="warm"), ValueError, "start"),
        (edit(start={"kind": "warm"}), ValueError, "start"),
        (edit(start={"kind": "free", "start_time": None}), ValueError, "start_time"),
        (edit(start={"kind": "pinned", "mean": MEAN}), ValueError, "mean"),
        (edit(start={"kind": "analytic", "start_time": 1.0}), ValueError, "mean"),
        (
            edit(start={"kind": "analytic", "start_time": 1.0, "mean": MEAN | {"file": "../x"}}),
            ValueError,
            "file",
        ),
        (edit(provenance=None), ValueError, "provenance"),
        (edit(samples=[0]), ValueError, "samples"),
        (edit(steps=...), ValueError, "steps"),
        (
            edit(steps={"kind": "solver", "orders": [1, 2]}),
            ValueError,
            "3 steps need an order each",
        ),
        (edit(steps={"kind": "solver", "orders": [1.5, 1, 1]}), ValueError, "orders"),
        (
            edit(steps={"kind": "solver", "orders": [1, 3, 1]}),
            ValueError,
            "cannot exceed the calls made so far",
        ),
        (edit(steps={"kind": "solver", "orders": "1, 1, 1"}), ValueError, "orders"),
        (
            edit(steps={"kind": "solver", "orders": None, "weights": [[1, 0, 0, 0]] * 3}),
            ValueError,
            "weights",
        ),
        (edit(steps={"kind": "fitted", "weights": [[1, 0, 0, 0]] * 3}), ValueError, "mean"),
    ],
)
def test_a_damaged_file_is_refused_by_name(damage, error, words, tmp_path):
    path = shared().save(tmp_path / "schedule.json")
    damage(path)
    with pytest.raises(error, match=words) as caught:
        StepSchedule.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([[1, 0, 0, 0]], "1 fitted steps are for 2 times"),
        ([[1, 0, 0, 0], [1, 0, 0]], "expected sequence of length"),
        ([[1, 0, 0, math.inf]] * 2, "weights"),
        ("1, 0", "weights"),
        (None, "weights"),
    ],
)
def test_damaged_weights_are_refused(weights, words, tmp_path):
    path = fitted().save(tmp_path / "schedule.json")
    steps = json.loads(path.read_text())["steps"]
    edit(steps=steps | {"weights": weights})(path)
    with pytest.raises(ValueError, match=words):
        StepSchedule.load(path)


def test_a_mean_file_with_one_changed_byte_is_refused_by_name(tmp_path):
    path = analytic().save(tmp_path / "schedule.json")
    mean = tmp_path / "schedule.mean.safetensors"
    data = bytearray(mean.read_bytes())
    data[-1] ^= 1
    mean.write_bytes(data)

    with pytest.raises(ValueError, match="damaged or was replaced") as caught:
        StepSchedule.load(path)
    assert str(mean) in str(caught.value)


def test_a_missing_mean_file_is_named(tmp_path):
    path = analytic().save(tmp_path / "schedule.json")
    (tmp_path / "schedule.mean.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"schedule\.mean\.safetensors does not exist"):
        StepSchedule.load(path)


def test_the_file_of_a_mean_says_whose_it_is(tmp_path):
    analytic().save(tmp_path / "oss_4.json")
    with pytest.raises(ValueError, match=r"belongs to the one beside it; give .*/oss_4\.json"):
        StepSchedule.load(tmp_path / "oss_4.mean.json")


def test_a_schedule_of_too_many_steps_is_refused_by_its_field(tmp_path):
    with pytest.raises(
        ValueError, match=r"cannot be saved as .*: field `times` must be a list of at most 10001"
    ):
        StepSchedule(torch.linspace(1, 0, 10_002, dtype=torch.float64)).save(tmp_path / "x.json")


def test_the_documented_schema_is_that_of_the_code():
    documented = json.loads(
        (Path(__file__).parents[1] / "docs" / "step_schedule.schema.json").read_text()
    )
    assert documented == json_schema()


def test_a_provenance_is_json_also_where_it_has_no_number(tmp_path):
    steps = StepSchedule(
        float64([1.0, 0.5, 0.0]), provenance={"a": [float("nan"), float("inf"), 1.0]}
    )
    path = steps.save(tmp_path / "x.json")
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["provenance"] == {
        "a": [None, None, 1.0]
    }


def test_an_order_in_a_provenance_is_a_number():
    with pytest.raises(ValueError, match="order=True, which is no number"):
        named_solver({"_target_": "oss_exp.DPMSolverPP", "order": True})


def test_a_file_that_a_provenance_names_is_not_read():
    record = {"_target_": "oss_exp.DPMSolverPP", "order": 2, "calibration": "none.json"}
    assert named_solver(record) == DPMSolverPP(order=2)
