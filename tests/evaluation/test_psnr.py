"""PSNR against its definition, and confidence intervals against SciPy's."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from oss_exp.evaluation.psnr import Interval, psnr


def pictures(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images and references in [0, 1]."""
    images, reference = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    return images, reference


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (3, 1, 5, 7)])
def test_psnr_is_10_log10_of_one_over_each_images_own_mse(shape):
    images, reference = pictures(*shape)
    squares = (images.double().numpy() - reference.double().numpy()) ** 2
    expected = [10 * math.log10(1 / square.mean()) for square in squares]
    # 1e-7: torchmetrics divides by log(10) in float32.
    np.testing.assert_allclose(psnr(images, reference).numpy(), expected, rtol=1e-7)


def test_psnr_of_a_video_is_the_mean_of_its_frames():
    videos, reference = pictures(2, 3, 4, 6, 6)
    frames = torch.stack([psnr(videos[:, :, i], reference[:, :, i]) for i in range(4)])
    torch.testing.assert_close(psnr(videos, reference), frames.mean(0))


def test_psnr_of_an_image_does_not_depend_on_its_batch():
    images, reference = pictures(4, 3, 8, 8)
    alone = torch.cat([psnr(images[i : i + 1], reference[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(psnr(images, reference), alone, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("error", "decibels"), [(1.0, 0.0), (0.1, 20.0), (1e-5, 100.0), (1e-7, 120.0), (0.0, 120.0)]
)
def test_a_tenth_of_the_error_is_20_db_up_to_a_ceiling_of_120(error, decibels):
    reference = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    assert psnr(reference + error, reference).item() == pytest.approx(decibels, rel=1e-7)


@pytest.mark.parametrize("n", [2, 3, 30, 400])
def test_an_interval_equals_scipys(n):
    values = np.random.default_rng(0).normal(25, 3, n)
    interval = Interval.of(values)
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert interval.n == n
    bounds = [interval.low, interval.mean, interval.high]
    np.testing.assert_allclose(bounds, [low, values.mean(), high], rtol=1e-12)


def test_one_value_has_a_mean_but_no_interval():
    interval = Interval.of(np.array([21.5]))
    assert interval.to_dict() == {"mean": 21.5, "low": None, "high": None, "n": 1}
    assert str(interval) == "21.50"


def test_text_shows_mean_and_half_width():
    assert str(Interval(25.0, 23.75, 26.25, 9)) == "25.00 ± 1.25"
