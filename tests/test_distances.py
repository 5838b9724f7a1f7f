"""Distances are mean squares after a linear map, row by row."""

import numpy as np
import pytest
import torch

from oss_exp.distances import MSE, Select

VIDEO = (2, 4, 3, 5)  # C, F, H, W
DISTANCES = {
    "mse": MSE(),
    "all": Select(MSE(), frames=None, channels=None),
    "frames": Select(MSE(), frames=2, channels=None),
    "channels": Select(MSE(), frames=None, channels=1),
    "both": Select(MSE(), frames=3, channels=1),
    "nested": Select(Select(MSE(), frames=2, channels=None), frames=3, channels=1),
}


def videos(seed: int, rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, *VIDEO, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", DISTANCES)
def test_zero_only_between_equals_and_symmetric(name):
    distance, x, y = DISTANCES[name], videos(0), videos(1)
    assert distance(x, x).tolist() == [0] * 5
    assert bool((distance(x, y) > 0).all())
    assert torch.equal(distance(x, y), distance(y, x))


@pytest.mark.parametrize("name", DISTANCES)
def test_changing_one_row_changes_only_its_value(name):
    distance, x, y = DISTANCES[name], videos(0), videos(1)
    before = distance(x, y)
    x[3] += 1
    changed = (distance(x, y) != before).tolist()
    assert changed == [False, False, False, True, False]


@pytest.mark.parametrize("name", DISTANCES)
def test_features_are_linear(name):
    features, x, y = DISTANCES[name].features, videos(0), videos(1)
    torch.testing.assert_close(features(2 * x - 3 * y), 2 * features(x) - 3 * features(y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DISTANCES)
def test_the_value_is_the_mean_square_of_the_feature_difference(name):
    distance, x, y = DISTANCES[name], videos(0), videos(1)
    expected = (distance.features(x) - distance.features(y)).square().mean(1)
    torch.testing.assert_close(distance(x, y), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(7,), (3, 4, 4), VIDEO])
def test_mse_equals_numpy_on_any_event_shape_and_in_float32(shape):
    x, y = torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(0))
    expected = ((x.numpy() - y.numpy()).astype(np.float64) ** 2).reshape(4, -1).mean(1)
    value = MSE()(x, y)
    assert value.dtype == torch.float64
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("present", "wanted", "used"), [(4, 2, [0, 3]), (4, 1, [0]), (4, 4, [0, 1, 2, 3]), (4, 3, [0, 1, 3])]
)
def test_select_uses_frames_spread_from_the_first_to_the_last(present, wanted, used):
    x = torch.zeros(present, 2, present, 3, 5)
    x[range(present), :, range(present)] = 1  # row m differs from 0 in frame m alone
    value = Select(MSE(), frames=wanted, channels=None)(x, torch.zeros_like(x))
    assert value.nonzero().flatten().tolist() == used
    torch.testing.assert_close(value[used], torch.full((len(used),), 1 / wanted).double())


def test_select_uses_the_first_channels():
    x = torch.zeros(4, 4, 3, 5)
    x[range(4), range(4)] = 1
    assert Select(MSE(), frames=None, channels=3)(x, torch.zeros_like(x)).nonzero().flatten().tolist() == [0, 1, 2]


def test_select_uses_the_frames_and_channels_of_the_released_search(oss_oracle, oss_arrays):
    z = oss_arrays["video.z"]  # (B, C, F, H, W)
    settings = set()
    for case in oss_oracle["video"]:
        frames, channels = (None if case[key] == "all" else int(case[key]) for key in ("frame_type", "channel_type"))
        expected = z[:, case["channels_used"]][:, :, case["frames_used"]].flatten(1)
        assert torch.equal(Select(MSE(), frames, channels).features(z), expected)
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
        Select(MSE(), frames, channels)(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize(("frames", "channels"), [(0, None), (None, 0), (-1, 1)])
def test_select_refuses_to_select_nothing(frames, channels):
    with pytest.raises(ValueError, match="at least 1"):
        Select(MSE(), frames, channels)
