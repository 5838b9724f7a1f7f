"""Distances are mean powers of feature differences, row by row; some call the network."""

import numpy as np
import pytest
import torch
from torch import nn

from oss_exp.distances import X0MSE, Inception, Select, XtMSE
from oss_exp.models.base import Model
from oss_exp.noise import FlowSchedule
from oss_exp.solvers import Euler
from oss_exp.stepsize import Problem

VIDEO = (2, 4, 3, 5)  # C, F, H, W


class Projection(nn.Module):
    """A stand-in for the Inception network: fixed random features of any images or videos."""

    def forward(self, images):
        flat = images.flatten(1)
        weights = torch.randn(
            flat.shape[1], 7, generator=torch.Generator().manual_seed(5), dtype=flat.dtype
        )
        return torch.tanh(flat @ weights)


def decode(x0):
    return (x0 + 1) / 2


def every_distance(norm: int) -> dict:
    """Return distances of videos."""
    xt = XtMSE(norm=norm)
    x0 = X0MSE(norm=norm)
    inception = Inception(Projection(), decode, norm=norm)
    return {
        "xt": xt,
        "x0": x0,
        "inception": inception,
        "all": Select(xt, frames=None, channels=None),
        "frames": Select(xt, frames=2, channels=None),
        "channels": Select(xt, frames=None, channels=1),
        "both": Select(xt, frames=3, channels=1),
        "nested": Select(Select(xt, frames=3, channels=None), frames=2, channels=1),
        "x0_both": Select(x0, frames=3, channels=1),
        "inception_first": Select(inception, frames=None, channels=3),
    }


ALL = [
    pytest.param(d, id=f"{name}-{norm}")
    for norm in (1, 2)
    for name, d in every_distance(norm).items()
]
LINEAR = [param for param in ALL if param.values[0].linear]


def videos(seed: int, rows: int = 5) -> torch.Tensor:
    return torch.randn(
        rows, *VIDEO, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


class Network:
    """A velocity that is not linear in the state and counts the rows of its calls."""

    def __init__(self):
        self.rows = 0

    def __call__(self, x, t):
        self.rows += len(x)
        return torch.sin(3 * x) + t.to(x).reshape(-1, *[1] * (x.ndim - 1))


TIMES = torch.linspace(0.9, 0.1, 5, dtype=torch.float64)


def value(distance, x, y, t=TIMES) -> torch.Tensor:
    """Return the distance of two states at the same times."""
    network = Network()
    t = t[: len(x)]
    return distance.between(distance.features(x, t, network), distance.features(y, t, network))


# --------------------------------------------------------------------------------------------------
# All of them
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ALL)
def test_a_distance_is_symmetric_and_0_only_between_equals(distance):
    x = videos(0)
    y = videos(1)
    assert value(distance, x, x).tolist() == [0] * 5
    assert bool((value(distance, x, y) > 0).all())
    assert torch.equal(value(distance, x, y), value(distance, y, x))


@pytest.mark.parametrize("distance", ALL)
def test_changing_one_row_changes_only_its_value(distance):
    x = videos(0)
    y = videos(1)
    before = value(distance, x, y)
    x[3] += 1
    changed = (value(distance, x, y) != before).tolist()
    assert changed == [False, False, False, True, False]


@pytest.mark.parametrize("distance", ALL)
def test_the_value_is_the_mean_power_of_the_feature_difference(distance):
    x, y = (distance.features(videos(seed), TIMES, Network()) for seed in (0, 1))
    expected = (x - y).abs().pow(distance.norm).flatten(1).mean(1)
    torch.testing.assert_close(distance.between(x, y), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("distance", LINEAR)
def test_linear_distances_have_linear_features_without_time_and_network(distance):
    def features(x):
        return distance.features(x, None, None)

    x = videos(0)
    y = videos(1)

    torch.testing.assert_close(
        features(2 * x - 3 * y), 2 * features(x) - 3 * features(y), rtol=1e-12, atol=1e-12
    )
    assert distance.calls == 0
    assert distance.quadratic == (distance.norm == 2)


@pytest.mark.parametrize("shape", [(7,), (3, 4, 4), VIDEO])
@pytest.mark.parametrize("norm", [1, 2])
def test_mse_equals_numpy_on_any_event_shape_and_in_float32(shape, norm):
    x, y = torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(0))
    expected = (np.abs(x.numpy() - y.numpy()).astype(np.float64) ** norm).reshape(4, -1).mean(1)
    result = value(XtMSE(norm=norm), x, y)
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("norm", [0, 3, -1, 1.5, None, "2", True, float("nan")])
@pytest.mark.parametrize(
    "make",
    [
        lambda norm: XtMSE(norm=norm),
        lambda norm: X0MSE(norm=norm),
        lambda norm: Inception(Projection(), norm=norm),
        lambda norm: Select(XtMSE(norm=norm), None, None),
    ],
    ids=["xt", "x0", "inception", "select"],
)
def test_a_norm_other_than_1_or_2_is_refused(make, norm):
    with pytest.raises(ValueError, match="norm must be one of 1, 2, got"):
        make(norm)


# --------------------------------------------------------------------------------------------------
# Distances that call the network
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [1, 2])
def test_x0_mse_compares_clean_predictions(norm):
    x = videos(0)
    y = videos(1)
    t = TIMES[:, None, None, None, None]
    v = Network()
    expected = ((x - t * v(x, TIMES)) - (y - t * v(y, TIMES))).abs().pow(norm).flatten(1).mean(1)
    torch.testing.assert_close(value(X0MSE(norm=norm), x, y), expected, rtol=1e-14, atol=0)


def test_at_the_data_the_clean_prediction_is_the_state_and_costs_no_call():
    x = videos(0)
    network = Network()
    assert torch.equal(X0MSE().features(x, torch.zeros(5, dtype=torch.float64), network), x)
    features = Inception(Projection(), decode).features(
        x, torch.zeros(5, dtype=torch.float64), network
    )
    assert torch.equal(features, Projection()(decode(x)))
    assert network.rows == 0

    mixed = torch.tensor([0.5, 0, 0, 0, 0], dtype=torch.float64)
    assert torch.equal(X0MSE().features(x, mixed, network)[1:], x[1:])


def test_inception_sees_the_decoded_clean_prediction():
    x = videos(0)
    x0 = X0MSE().features(x, TIMES, Network())
    features = Inception(Projection(), decode).features(x, TIMES, Network())
    torch.testing.assert_close(features, Projection()(decode(x0)), rtol=1e-14, atol=0)


def test_inception_takes_the_decoder_of_the_model_through_any_selection(mixture):
    bound = Select(Inception(Projection()), None, 3).bind(mixture)
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.zeros(5, dtype=torch.float64)
    assert torch.equal(bound.features(x, t, Network()), Projection()(mixture.decode(x))[:, :3])
    assert isinstance(mixture, Model)
    assert XtMSE().bind(mixture) == XtMSE()


@pytest.fixture(params=[X0MSE(), Inception(Projection(), decode)], ids=["x0", "inception"])
def candidates(request, gmm):
    """A problem whose teacher has run, its network, and three candidates for each sample."""
    network = Network()
    grid = FlowSchedule(shift=1.0).nodes(6)
    problem = Problem(network, gmm["z"][:4], grid, Euler(), request.param)
    problem.teacher.targets  # noqa: B018
    network.rows = 0
    return problem, network, torch.cat([problem.teacher.states[node] for node in (1, 2, 3)])


def test_the_cost_of_a_problem_counts_one_call_for_every_row_above_the_data(candidates):
    problem, network, x = candidates
    cost = problem.cost(x, torch.tensor([2]))
    assert network.rows == 12
    assert bool((cost[4:8] == 0).all())
    assert bool((cost[:4] > 0).all())


def test_the_cost_at_the_data_calls_no_network(candidates):
    problem, network, x = candidates
    problem.cost(x, torch.tensor([6]))
    assert network.rows == 0


def test_the_cost_of_each_sample_may_be_at_its_own_node(candidates):
    problem, _, x = candidates
    costs = problem.cost(x, torch.tensor([0, 6, 3, 1]))
    for m, node in enumerate([0, 6, 3, 1] * 3):
        assert costs[m] == problem.cost(x, torch.tensor([node]))[m]


# --------------------------------------------------------------------------------------------------
# Select
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("present", "frames", "used"),
    [(4, 2, [0, 3]), (4, 1, [0]), (4, 4, [0, 1, 2, 3]), (4, 3, [0, 1, 3])],
)
def test_select_uses_frames_spread_from_the_first_to_the_last(present, frames, used):
    x = torch.zeros(present, 2, present, 3, 5)
    x[range(present), :, range(present)] = 1  # row m differs from 0 in frame m alone
    result = value(Select(XtMSE(), frames=frames, channels=None), x, torch.zeros_like(x))
    assert result.nonzero().flatten().tolist() == used
    torch.testing.assert_close(result[used], torch.full((len(used),), 1 / frames).double())


def test_select_uses_the_first_channels():
    x = torch.zeros(4, 4, 3, 5)
    x[range(4), range(4)] = 1
    result = value(Select(XtMSE(), frames=None, channels=3), x, torch.zeros_like(x))
    assert result.nonzero().flatten().tolist() == [0, 1, 2]


def test_select_gives_the_network_the_full_state():
    x = videos(0)
    inputs = []

    def network(x, t):
        inputs.append(x)
        return x.flip(1)  # each channel of the output is the other of the input

    features = Select(X0MSE(), frames=2, channels=1).features(x, TIMES, network)
    assert torch.equal(inputs[0], x)
    expected = x[:, :1] - TIMES[:, None, None, None, None] * x[:, 1:]

    torch.testing.assert_close(features, expected[:, :, [0, 3]], rtol=1e-14, atol=0)


@pytest.mark.parametrize("norm", [1, 2])
def test_select_keeps_the_norm_of_what_it_selects_from(norm):
    x = videos(0)
    y = videos(1)
    inner = XtMSE(norm=norm)
    assert Select(inner, frames=None, channels=None).norm == norm
    assert torch.equal(value(Select(inner, frames=None, channels=None), x, y), value(inner, x, y))


def test_select_uses_the_frames_and_channels_of_the_released_search(oss_oracle, oss_arrays):
    z = oss_arrays["video.z"]  # (B, C, F, H, W)
    settings = set()
    for case in oss_oracle["video"]:
        frames = None if case["frame_type"] == "all" else int(case["frame_type"])
        channels = None if case["channel_type"] == "all" else int(case["channel_type"])
        expected = z[:, case["channels_used"]][:, :, case["frames_used"]]
        assert torch.equal(Select(XtMSE(), frames, channels).features(z, None, None), expected)
        settings.add((frames, channels))

    assert len(settings) > 2


@pytest.mark.parametrize(
    ("frames", "channels", "shape", "words"),
    [
        (5, None, (1, *VIDEO), "frames=5 but the states have only 4"),
        (None, 3, (1, *VIDEO), "channels=3 but the states have only 2"),
        (2, None, (1, 3, 8, 8), "frames needs videos.*frames=null"),
    ],
)
def test_select_refuses_what_the_states_do_not_have(frames, channels, shape, words):
    with pytest.raises(ValueError, match=words):
        value(Select(XtMSE(), frames, channels), torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize(("frames", "channels"), [(0, None), (None, 0), (-1, 1)])
def test_select_refuses_to_select_nothing(frames, channels):
    with pytest.raises(ValueError, match="at least 1"):
        Select(XtMSE(), frames, channels)
