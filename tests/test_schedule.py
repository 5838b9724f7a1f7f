"""Step schedules: what they refuse, what survives a file, and where an analytic start lands."""

import dataclasses
import json
import math

import pytest
import torch

from oss_exp.schedule import StepSchedule, analytic_jump


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def shared() -> StepSchedule:
    return StepSchedule(float64([0.97, 1 / 3, 0.1, 0]), start="free", provenance={"model": "é", "n": [1, 2]})


def per_sample() -> StepSchedule:
    return StepSchedule(float64([[1, 0.7, 0], [0.9, 0.1, 0], [0.8, 1e-9, 0]]), start="free", samples=(3, 11, 5))


def analytic() -> StepSchedule:
    mean = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    return StepSchedule(float64([0.9, 0.4, 0]), start="analytic", start_time=0.99, mean=mean)


def ordered() -> StepSchedule:
    return StepSchedule(float64([0.9, 0.5, 0.1, 0]), orders=torch.tensor([1, 2, 1]))


def ordered_per_sample() -> StepSchedule:
    return StepSchedule(
        per_sample().times, start="free", samples=(3, 11, 5), orders=torch.tensor([[1, 2], [1, 1]] * 2)[:3]
    )


def fitted() -> StepSchedule:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    return StepSchedule(float64([1, 0.4, 0]), mean=torch.randn(2, 3, generator=generator), weights=weights)


# --------------------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(StepSchedule)])
def test_no_field_can_be_set(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(shared(), name, None)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("times", float64([1, 0.5, 0])),
        ("orders", torch.tensor([1, 2])),
        ("weights", float64([[1, 2, 3, 4], [5, 6, 7, 8]])),
    ],
)
def test_changing_the_tensor_it_was_made_from_changes_nothing(name, tensor):
    before = tensor.tolist()
    mean = torch.zeros(1, 2) if name == "weights" else None
    schedule = StepSchedule(**{"times": float64([1, 0.5, 0]), "mean": mean} | {name: tensor})
    tensor[1] = 3
    assert getattr(schedule, name).tolist() == before


FITTED = {"times": [1.0, 0.5, 0.0], "mean": torch.zeros(1, 2)}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"times": []}, "at least two times"),
        ({"times": [0.0]}, "at least two times"),
        ({"times": 1.0}, "at least two times"),
        ({"times": [[[1.0, 0.0]]]}, "at least two times"),
        ({"times": [1.0, math.nan, 0.0]}, "finite"),
        ({"times": [math.inf, 0.5, 0.0]}, "finite"),
        ({"times": [0.0, 0.5, 1.0]}, "strictly decrease"),
        ({"times": [1.0, 0.5, 0.5, 0.0]}, "strictly decrease"),
        ({"times": [[1.0, 0.5, 0.0], [0.5, 0.6, 0.0]], "samples": (0, 1)}, "strictly decrease"),
        ({"times": [1.0, 0.5, 0.1]}, "last step time must be 0"),
        ({"times": [1.0, 0.5, -0.1]}, "last step time must be 0"),
        ({"times": [1.5, 0.5, 0.0]}, "must not exceed start_time=1.0"),
        ({"times": [0.95, 0.0], "start_time": 0.9}, "must not exceed start_time=0.9"),
        ({"times": [0.5, 0.0], "start_time": 1.1}, "start_time=1.1"),
        ({"times": [0.5, 0.0], "start_time": math.nan}, "start_time=nan"),
        ({"times": [1.0, 0.0], "start": "warm"}, "start must be one of free, pinned, analytic, got 'warm'"),
        ({"times": [0.9, 0.0], "start": "analytic"}, "needs a mean"),
        ({"times": [1.0, 0.0], "mean": torch.zeros(1, 2)}, "takes no mean"),
        ({"times": [[1.0, 0.0], [0.9, 0.0]]}, "indices of their samples"),
        ({"times": [1.0, 0.0], "samples": (0,)}, "indices of their samples"),
        ({"times": [[1.0, 0.0], [0.9, 0.0]], "samples": (0, 1, 2)}, "indices of their samples"),
        ({"times": [[1.0, 0.0], [0.9, 0.0]], "samples": ()}, "indices of their samples"),
        ({"times": [1.0, 0.5, 0.0], "orders": [1]}, "2 steps need whole orders"),
        ({"times": [1.0, 0.5, 0.0], "orders": [1, 2, 1]}, "2 steps need whole orders"),
        ({"times": [1.0, 0.5, 0.0], "orders": [[1, 2]]}, "2 steps need whole orders"),
        ({"times": [1.0, 0.5, 0.0], "orders": [1.0, 2.0]}, "2 steps need whole orders"),
        ({"times": [1.0, 0.5, 0.0], "orders": [1, 0]}, "2 steps need whole orders"),
        ({"times": [1.0, 0.5, 0.0], "orders": [2, 1]}, "cannot exceed the calls made so far"),
        ({"times": [1.0, 0.5, 0.0], "orders": [1, 3]}, "cannot exceed the calls made so far"),
        ({"times": [[1.0, 0.5, 0.0]], "samples": (0,), "orders": [1, 2]}, "2 steps need whole orders"),
        ({"times": [[1.0, 0.5, 0.0]], "samples": (0,), "orders": [[1, 3]]}, "cannot exceed the calls made so far"),
        ({"times": [1.0, 0.5, 0.0], "weights": [[1.0] * 4] * 2}, "with weights needs a mean"),
        (FITTED | {"weights": [[1.0] * 4]}, "2 steps need a row of at least 4 finite weights"),
        (FITTED | {"weights": [1.0] * 4}, "2 steps need a row of at least 4 finite weights"),
        (FITTED | {"weights": [[1.0] * 3] * 2}, "2 steps need a row of at least 4 finite weights"),
        (FITTED | {"weights": [[1.0, 1.0, 1.0, math.nan]] * 2}, "2 steps need a row of at least 4 finite weights"),
        (FITTED | {"weights": [[1.0] * 4] * 2, "orders": [1, 1]}, "weights are for all samples and take no orders"),
        (
            FITTED | {"times": [[1.0, 0.5, 0.0]], "samples": (0,), "weights": [[1.0] * 4] * 2},
            "weights are for all samples and take no orders",
        ),
    ],
)
def test_the_constructor_refuses_what_is_not_a_schedule(fields, words):
    with pytest.raises(ValueError, match=words):
        StepSchedule(**fields | {"times": float64(fields["times"])})


def test_rows_selects_by_sample_index_in_the_order_asked_for():
    schedule = per_sample()
    cut = schedule.rows([5, 3])
    assert cut.samples == (5, 3)
    assert cut.times.tolist() == [schedule.times[2].tolist(), schedule.times[0].tolist()]
    assert cut.start == "free"
    assert ordered_per_sample().rows([5, 11]).orders.tolist() == [[1, 2], [1, 1]]


# --------------------------------------------------------------------------------------------------------------
# The first state
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["free", "pinned"])
def test_without_a_mean_the_noise_is_the_first_state(start):
    noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(StepSchedule(float64([0.8, 0]), start=start).initial_state(noise), noise)


def test_an_analytic_start_is_the_exact_euler_jump_from_pure_noise(gmm, velocity):
    z, t = gmm["z"], 0.93
    mean = (gmm["weights"][:, None] * gmm["means"]).sum(0, keepdim=True)
    jumped = StepSchedule(float64([t, 0.5, 0]), start="analytic", mean=mean).initial_state(z)
    expected = z + (t - 1) * velocity(z, torch.ones(len(z), dtype=torch.float64))
    torch.testing.assert_close(jumped, expected, rtol=0, atol=1e-12)


def test_an_analytic_start_uses_each_samples_own_condition_and_time(gmm, mixture):
    z, label = gmm["z"], torch.arange(16) % 10
    first = torch.linspace(0.9, 0.99, 16, dtype=torch.float64)
    times = torch.stack([first, torch.zeros(16, dtype=torch.float64)], dim=1)
    schedule = StepSchedule(times, start="analytic", mean=gmm["means"], samples=tuple(range(16)))
    v = mixture.velocity(label)(z, torch.ones(16, dtype=torch.float64))
    expected = z + (first[:, None] - 1) * v
    torch.testing.assert_close(schedule.initial_state(z, label), expected, rtol=0, atol=1e-12)


def test_an_analytic_jump_from_below_1_is_euler_with_the_mean_as_clean_prediction():
    generator = torch.Generator().manual_seed(0)
    noise, mean = torch.randn(2, 3, 1, 4, 2, dtype=torch.float64, generator=generator)
    start_time, t = 0.9, 0.6
    v = (noise - mean) / start_time  # x0 = x - t v
    jumped = analytic_jump(noise, mean, start_time, float64(t))
    torch.testing.assert_close(jumped, noise + (t - start_time) * v, rtol=0, atol=1e-14)


# --------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [shared, per_sample, analytic, ordered, ordered_per_sample, fitted])
def test_a_file_gives_back_the_same_schedule_bit_for_bit(make, tmp_path):
    schedule = make()
    loaded = StepSchedule.load(schedule.save(tmp_path / "new folder" / "oss.K5.json"))
    assert torch.equal(loaded.times, schedule.times)
    assert loaded.times.dtype == torch.float64
    for name in ("start", "start_time", "samples", "provenance", "num_steps"):
        assert getattr(loaded, name) == getattr(schedule, name)
    for name in ("mean", "orders", "weights"):
        found, expected = getattr(loaded, name), getattr(schedule, name)
        assert (found is None) == (expected is None)
        assert expected is None or (torch.equal(found, expected) and found.dtype == expected.dtype)


def edit(**changes):
    """Write the record again with these fields; ... removes one."""

    def change(path):
        record = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))

    return change


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda path: path.unlink(), FileNotFoundError, "does not exist"),
        (lambda path: path.write_text(""), ValueError, "is empty"),
        (lambda path: path.write_text(path.read_text()[:60]), ValueError, "not complete JSON"),
        (lambda path: path.write_text("0.9, 0.5, 0"), ValueError, "not complete JSON"),
        (lambda path: path.write_bytes(b"\x89PNG\xff"), ValueError, "is not complete JSON"),
        (lambda path: path.write_text('{"sigmas": [1, 0]}'), ValueError, "not a step schedule"),
        (lambda path: path.write_text("[1, 0.5, 0]"), ValueError, "not a step schedule"),
        (edit(version=1), ValueError, "version 1, this program reads 2"),
        (edit(version=...), ValueError, "version None"),
        (edit(times=...), ValueError, "lacks the field 'times'"),
        (edit(start=...), ValueError, "lacks the field 'start'"),
        (edit(samples=...), ValueError, "lacks the field 'samples'"),
        (edit(provenance=...), ValueError, "lacks the field 'provenance'"),
        (edit(times=[0, 0.5, 1]), ValueError, "strictly decrease"),
        (edit(times=[1, math.nan, 0]), ValueError, "finite"),
        (edit(times=[[1, 0.5, 0], [1, 0]]), ValueError, "length"),
        (edit(times="1, 0"), ValueError, "str"),
        (edit(times=None), ValueError, "None"),
        (edit(start="warm"), ValueError, "start must be one of"),
        (edit(start_time=None), ValueError, "start_time a number"),
        (edit(provenance=None), ValueError, "provenance must be an object"),
        (edit(samples=[0]), ValueError, "samples"),
        (edit(mean={}), ValueError, "lacks the field"),
        (edit(orders=...), ValueError, "lacks the field 'orders'"),
        (edit(orders=[1, 2]), ValueError, "3 steps need whole orders"),
        (edit(orders=[1.5, 1, 1]), ValueError, "3 steps need whole orders"),
        (edit(orders=[1, 3, 1]), ValueError, "cannot exceed the calls made so far"),
        (edit(orders="1, 1, 1"), ValueError, "str"),
        (edit(weights=...), ValueError, "lacks the field 'weights'"),
        (edit(weights=[[1, 0, 0, 0]] * 3), ValueError, "needs a mean"),
    ],
)
def test_a_damaged_file_is_refused_by_name(damage, error, words, tmp_path):
    path = shared().save(tmp_path / "schedule.json")
    damage(path)
    with pytest.raises(error, match=words) as caught:
        StepSchedule.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (edit(mean=None), "needs a mean"),
        (edit(weights=[[1, 0, 0, 0]]), "2 steps need a row of at least 4 finite weights"),
        (edit(weights=[[1, 0, 0, 0], [1, 0, 0]]), "expected sequence of length"),
        (edit(weights=[[1, 0, 0, math.inf]] * 2), "2 steps need a row of at least 4 finite weights"),
        (edit(weights="1, 0"), "str"),
        (edit(weights=None), "takes no mean"),
        (edit(orders=[1, 1]), "take no orders"),
    ],
)
def test_damaged_weights_are_refused(damage, words, tmp_path):
    path = fitted().save(tmp_path / "schedule.json")
    damage(path)
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
