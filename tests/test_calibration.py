"""Calibrated states have the amplitudes of the table; tables and replays are the released ones."""

import json
import math
import re

import numpy as np
import pytest
import torch

from oss_exp.calibration import Calibration, amplitude
from oss_exp.schedule import Free, StepSchedule
from oss_exp.solvers import Euler, sample, trajectory


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def whole(**changes) -> Calibration:
    """Return a calibration of whole states with these fields changed."""
    fields = {
        "times": float64([1.0, 0.6, 0.1, 0.0]),
        "low": float64([-1.6, -1.2, -1.0, -0.9]),
        "high": float64([1.7, 1.0, 0.8, 0.7]),
        "provenance": {"seed": 3},
    }
    return Calibration(**fields | changes)


def by_channel(**changes) -> Calibration:
    """Return a calibration of each channel."""
    low = float64([[-1.6, -1.5], [-1.2, -2.0], [-1.0, 0.2], [-0.9, 0.3]])
    return whole(low=low, high=low + float64([1.0, 3.0]), **changes)


# --------------------------------------------------------------------------------------------------
# Amplitudes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 1), (2, 2), (3, 20), (3, 21), (1, 22), (4, 3, 7, 5), (0, 4)])
def test_quantiles_are_those_of_numpy(shape, dtype):
    x = randn(*shape).to(dtype)
    rows = x.double().numpy().reshape(shape[0], math.prod(shape[1:]))
    low, high = amplitude(x, per_channel=False)

    assert low.dtype == high.dtype == torch.float64
    for result, q in ((low, 0.05), (high, 0.95)):
        expected = np.quantile(rows, q, axis=1)
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-14, atol=1e-15)


def test_quantiles_of_each_channel():
    x = randn(4, 3, 7, 5)
    for result, q in zip(amplitude(x, per_channel=True), (0.05, 0.95), strict=True):
        expected = np.quantile(x.numpy(), q, axis=(2, 3))
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-14)


def test_the_order_of_the_elements_and_of_memory_does_not_matter():
    x = randn(2, 3, 4, 5)
    swapped = x.to(memory_format=torch.channels_last).flip(-1)
    low, high = amplitude(swapped, False)
    expected_low, expected_high = amplitude(x, False)
    assert low.equal(expected_low)
    assert high.equal(expected_high)


@pytest.mark.slow
def test_more_elements_than_a_float32_can_count():
    """Older versions of torch.quantile refuse more than 2^24 elements."""
    count = 2**24 + 2
    low, high = amplitude(torch.arange(count, dtype=torch.float64).flip(0)[None], per_channel=False)
    expected = (0.05 * (count - 1), 0.95 * (count - 1))
    assert (low.item(), high.item()) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_is_refused(bad):
    x = randn(2, 3, 4)
    x[1, 2, 3] = bad
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) holds NaN or infinity"):
        amplitude(x, per_channel=False)
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        whole()(x, float64(0.5), is_last=False)


def test_a_state_without_channels_is_refused():
    with pytest.raises(ValueError, match=r"per channel has no axis in \(5,\)"):
        amplitude(randn(5), per_channel=True)


# --------------------------------------------------------------------------------------------------
# Calibrated states
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [whole, by_channel])
def test_a_calibrated_state_has_the_amplitudes_of_the_table(make):
    calibration = make()
    x = 3 * randn(4, 2, 6, 5) - 1
    for node, t in enumerate(calibration.times):
        low, high = amplitude(calibration(x, t, is_last=False), calibration.per_channel)
        torch.testing.assert_close(low, calibration.low[node].expand_as(low), rtol=0, atol=1e-14)
        torch.testing.assert_close(high, calibration.high[node].expand_as(high), rtol=0, atol=1e-14)


@pytest.mark.parametrize("make", [whole, by_channel])
def test_between_two_nodes_the_table_is_linear_in_time(make):
    calibration = make()
    t = float64([0.6, 0.475, 0.1, 0.025, 0.0, 1.0])
    low, high = calibration.at(t)
    for result, table in ((low, calibration.low), (high, calibration.high)):
        early = 0.75 * table[1] + 0.25 * table[2]
        late = 0.25 * table[2] + 0.75 * table[3]
        expected = torch.stack([table[1], early, table[2], late, table[3], table[0]])
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-15)
        assert result[[0, 2, 4, 5]].equal(table[[1, 2, 3, 0]])  # equal to the bit at a node


@pytest.mark.parametrize("make", [whole, by_channel])
def test_every_row_has_its_own_time(make):
    calibration = make()
    x = randn(3, 2, 9)
    t = float64([0.9, 0.6, 0.05])
    together = calibration(x, t, is_last=False)
    for row in range(3):
        assert together[row].equal(calibration(x[row : row + 1], t[row], is_last=False)[0])


def test_the_scale_and_shift_of_a_state_do_not_matter():
    calibration = whole()
    x = randn(3, 40)
    t = float64(0.3)
    once = calibration(x, t, is_last=False)
    torch.testing.assert_close(calibration(5 * x - 2, t, is_last=False), once, rtol=0, atol=1e-14)
    torch.testing.assert_close(calibration(once, t, is_last=True), once, rtol=0, atol=1e-14)


def test_a_state_keeps_its_dtype():
    x = randn(3, 40)
    low = whole()(x.float(), float64(0.3), is_last=False)
    assert low.dtype == torch.float32
    expected = whole()(x, float64(0.3), is_last=False)
    torch.testing.assert_close(low.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [-0.01, 1.01, math.nan])
def test_a_time_outside_the_grid_is_refused(t):
    with pytest.raises(ValueError, match=f"for t = 1 to 0, asked for t = {t:.6g}; calibrate"):
        whole()(randn(2, 4), float64([0.5, t]), is_last=False)


def test_a_grid_that_begins_later_covers_no_earlier_time():
    late = whole(times=float64([0.9, 0.6, 0.1, 0.0]))
    late(randn(2, 4), float64(0.9 + 1e-12), is_last=False)  # the same time after rounding
    with pytest.raises(ValueError, match=r"asked for t = 0\.95"):
        late(randn(2, 4), float64(0.95), is_last=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, 1e-44, 1e-20])
def test_a_state_without_spread_is_only_shifted(spread, dtype):
    x = torch.stack([randn(21), torch.full((21,), 7.0)]).to(dtype)
    x[1] = spread * torch.arange(21)
    after = whole()(x, float64(0.6), is_last=False)
    low, high = amplitude(after, per_channel=False)
    assert (low[0].item(), high[0].item()) == pytest.approx((-1.2, 1.0), abs=1e-6)
    assert after[1].tolist() == pytest.approx([-0.1] * 21, abs=1e-7)


def test_a_table_without_spread_shrinks_to_its_value():
    flat = whole(low=float64([0.5] * 4), high=float64([0.5] * 4))
    x = flat(randn(2, 9), float64(0.5), is_last=False)
    assert x.flatten().tolist() == pytest.approx([0.5] * 18, abs=1e-15)


def test_last_step_only_leaves_all_earlier_states():
    x = randn(3, 40)
    t = float64(0.3)
    last = whole(last_step_only=True)
    assert last(x, t, is_last=False) is x
    assert last(x, t, is_last=True).equal(whole()(x, t, is_last=True))


def test_a_table_of_other_channels_is_refused():
    for x in (randn(2, 3, 4), randn(2)):
        with pytest.raises(ValueError, match="tables of 2 channels"):
            by_channel()(x, float64(0.5), is_last=False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"times": [1.0, 0.6, 0.6, 0.0]}, "strictly decreasing"),
        ({"times": [0.0, 0.1, 0.6, 1.0]}, "strictly decreasing"),
        ({"times": [[1.0, 0.6, 0.1, 0.0]]}, "strictly decreasing"),
        ({"times": [1.0], "low": [0.0], "high": [1.0]}, "two or more"),
        ({"times": [1.1, 0.6, 0.1, 0.0]}, r"in \[0, 1\], got 1.1"),
        ({"times": [1.0, 0.6, 0.1, -0.1]}, r"in \[0, 1\], got 1.0 to -0.1"),
        ({"times": [1.0, math.nan, 0.1, 0.0]}, "times of a calibration must be finite"),
        ({"low": [-1.0, -math.inf, -1.0, -1.0]}, "low of a calibration must be finite"),
        ({"low": [-1.0, -1.0, -1.0]}, r"must be \(4,\) or \(4, C\)"),
        ({"low": [[-1.0]] * 4}, r"got \(4, 1\) and \(4,\)"),
        ({"high": [1.0, 1.0, -1.1, 1.0]}, "low of a calibration must not exceed high"),
    ],
)
def test_the_constructor_refuses_what_is_not_a_table(fields, words):
    with pytest.raises(ValueError, match=words):
        whole(**{name: float64(value) for name, value in fields.items()})


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "calibration", [whole(), by_channel(last_step_only=True), whole(provenance={})]
)
def test_a_file_gives_the_same_calibration(calibration, tmp_path):
    read = Calibration.load(calibration.save(tmp_path / "made" / "calibration.json"))
    for name in ("times", "low", "high"):
        assert getattr(read, name).equal(getattr(calibration, name))
    assert read.last_step_only == calibration.last_step_only
    assert read.per_channel == calibration.per_channel
    assert read.provenance == calibration.provenance


DAMAGE = {
    "format": (
        lambda r: {**r, "format": "oss_exp/step_schedule"},
        "is of another format: `format` must be 'oss_exp/calibration', "
        'got "oss_exp/step_schedule"',
    ),
    "a list": (lambda r: [r], r"must be an object, got \[\{\.\.\.\}\]"),
    "version": (
        lambda r: {**r, "version": 99},
        "is of another version: `version` must be 1, got 99",
    ),
    "no low": (lambda r: {k: v for k, v in r.items() if k != "low"}, "field `low` is missing"),
    "no flag": (
        lambda r: {k: v for k, v in r.items() if k != "last_step_only"},
        "field `last_step_only` is missing",
    ),
    "more": (lambda r: {**r, "hihg": []}, "field `hihg` is unknown"),
    "quantiles": (
        lambda r: {**r, "quantiles": [0.01, 0.99]},
        r"field `quantiles` must be \[0\.05, 0\.95\]",
    ),
    "flag": (
        lambda r: {**r, "last_step_only": "no"},
        'field `last_step_only` must be true or false, got "no"',
    ),
    "provenance": (
        lambda r: {**r, "provenance": [1]},
        r"field `provenance` must be an object, got \[1\]",
    ),
    "words": (
        lambda r: {**r, "high": ["a"] * 4},
        'field `high.0` must be a number or a list, got "a"',
    ),
    "half": (lambda r: {**r, "high": [[1.0], 2.0]}, "field `high.1` must be a list, got 2.0"),
    "ragged": (lambda r: {**r, "high": [[1.0], [2.0, 3.0]]}, "is damaged"),
    "null": (lambda r: {**r, "times": None}, "field `times` must be a list, got null"),
    "values": (lambda r: {**r, "high": [-9.0] * 4}, "low of a calibration must not exceed high"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_refused_by_name(kind, tmp_path):
    change, words = DAMAGE[kind]
    path = whole().save(tmp_path / "calibration.json")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=words) as error:
        Calibration.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"), [("", "is empty"), ('{"format": "oss', "is not complete JSON")]
)
def test_a_truncated_file_is_refused(text, words, tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} {words}"):
        Calibration.load(path)


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "none.json"
    words = re.escape(f"calibration {path} does not exist")
    with pytest.raises(FileNotFoundError, match=words):
        Calibration.load(path)


def test_check_accepts_the_calibrated_model_and_grid_and_no_other():
    calibration = whole(provenance={"model": {"name": "mixture", "sha256": "a" * 64}})
    calibration.check("a" * 64, "mixture", calibration.times)

    words = r"made for model 'mixture' \(weights aaaaaaaaaaaa\), this run has 'other'"
    with pytest.raises(ValueError, match=words):
        calibration.check("b" * 64, "other", calibration.times)
    with pytest.raises(ValueError, match="a teacher of 3 steps from t = 1, this run's has 2"):
        calibration.check("a" * 64, "mixture", calibration.times[1:])
    with pytest.raises(ValueError, match="or other times"):
        calibration.check(
            "a" * 64, "mixture", calibration.times.clone().index_fill(0, torch.tensor(1), 0.61)
        )
    with pytest.raises(ValueError, match="made for model None"):
        whole().check("a" * 64, "mixture", calibration.times)


# --------------------------------------------------------------------------------------------------
# The released code
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [20, 50, 100])
@pytest.mark.parametrize("grid", ["uniform", "edm", "ddpm"])
def test_tables_and_replays_are_those_of_the_released_code(
    velocity, gmm, oss_oracle, oss_arrays, tmp_path, grid, size
):
    """Its tables leave out t = 0, where no network is called; its students start free."""
    case = f"{grid}_N{size}"
    nodes = oss_arrays[f"{case}.fm_steps"].flip(0)

    # The table, a row for each node.
    states = trajectory(Euler(), velocity, gmm["z"], nodes)
    amplitudes = [amplitude(x, False) for x in states]
    low = torch.stack([low for low, _ in amplitudes]).mean(1)
    high = torch.stack([high for _, high in amplitudes]).mean(1)
    assert (low[:-1] - oss_arrays[f"{case}.min_amp"].flip(0)).abs().max() < 1e-10
    assert (high[:-1] - oss_arrays[f"{case}.max_amp"].flip(0)).abs().max() < 1e-10

    # The replays.
    path = Calibration(nodes, low, high).save(tmp_path / "calibration.json")
    for k in (3, 5, 10):
        name = f"{grid}_N{size}_M{k}"
        indices = oss_oracle["cases"][name]["median_schedule"]
        times = nodes[[size - i for i in reversed(indices)] + [size]]
        steps = StepSchedule(times, Free(float(nodes[0])))
        final = sample(Euler(calibration=str(path)), velocity, gmm["z"], steps)
        assert (final - oss_arrays[f"{name}.student_final_median_renorm"]).abs().max() < 1e-10
        assert (final - sample(Euler(), velocity, gmm["z"], steps)).abs().max() > 1e-3
